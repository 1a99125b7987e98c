"""Quantized layers take the place of the right modules, and learn each call's timestep."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from quest_deploy.errors import CalibrationError
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.insert import (
    LayerQParams,
    channel_axis,
    insert,
    quantizable_layers,
    quantized_layers,
    share_quantizers,
)
from quest_deploy.quantize.layers import QuantizedConv2d, QuantizedLinear, TimestepContext
from quest_deploy.quantize.trace import Trace

Make = Callable[[int, int], tuple[nn.Module, TimestepContext]]


def test_every_linear_and_convolution_of_a_unet_is_quantizable(float_model: LoadedModel) -> None:
    expected = [n for n, m in float_model.denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert list(quantizable_layers(float_model.denoiser)) == expected


def test_a_convolution_that_pads_with_anything_but_zeros_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(1, 1, 3, padding_mode="circular"), nn.Conv2d(1, 1, 3))
    assert list(quantizable_layers(model)) == ["1"]


def test_named_layers_are_replaced_and_the_others_stay(
    float_model: LoadedModel, qparams: Callable[[int, int], dict[str, LayerQParams]]
) -> None:
    unet = copy.deepcopy(float_model.denoiser)
    chosen = {name: qparams(8, 8)[name] for name in ("conv_in", "time_embedding.linear_2")}
    insert(unet, chosen, TimestepContext(torch.tensor([1.0, 2.0])))
    assert {name: type(layer) for name, layer in quantized_layers(unet).items()} == {
        "conv_in": QuantizedConv2d,
        "time_embedding.linear_2": QuantizedLinear,
    }
    assert isinstance(unet.conv_out, nn.Conv2d)


def test_an_inserted_layer_starts_from_the_weights_it_replaces(
    float_model: LoadedModel, quantize_tiny: Make
) -> None:
    unet, _ = quantize_tiny(4, 4)
    for name, layer in quantized_layers(unet).items():
        assert torch.equal(layer.weight, float_model.denoiser.get_parameter(f"{name}.weight"))


def test_a_name_that_the_denoiser_lacks_is_refused(
    float_model: LoadedModel, qparams: Callable[[int, int], dict[str, LayerQParams]]
) -> None:
    unet = copy.deepcopy(float_model.denoiser)
    with pytest.raises(
        CalibrationError, match="1 layers are not in the UNet2DConditionModel, the first is 'conv_inn'"
    ):
        insert(unet, {"conv_inn": qparams(8, 8)["conv_in"]}, TimestepContext(torch.empty(0)))
    assert not quantized_layers(unet)


@pytest.mark.parametrize(
    ("arguments", "named", "group"),
    [
        ((torch.tensor([999.0, 0.0]),), {}, [2, 0]),
        ((), {"timestep": torch.tensor(999)}, [2]),
        ((0,), {}, [0]),
        ((), {"timestep": 500.5}, [1]),
    ],
    ids=["tensor", "by name", "number", "fraction"],
)
def test_a_call_tells_its_timestep_to_every_layer(
    quantize_tiny: Make, arguments: tuple, named: dict, group: list[int]
) -> None:
    unet, context = quantize_tiny(8, 8)
    context.boundaries = torch.tensor([300.0, 700.0])
    text = torch.zeros(2, 5, unet.config.cross_attention_dim)
    unet(torch.zeros(2, 4, 8, 8), *arguments, encoder_hidden_states=text, **named)
    assert context.group.tolist() == group
    assert all(layer.context is context for layer in quantized_layers(unet).values())


def test_queries_keys_and_values_read_one_tensor(traced: Trace) -> None:
    block = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert tuple(f"{block}.attn1.to_{part}" for part in "qkv") in traced.siblings
    # Queries of a cross attention come from the image, its keys and values from the text.
    assert tuple(f"{block}.attn2.to_{part}" for part in "kv") in traced.siblings
    assert len({name for names in traced.siblings for name in names}) == sum(map(len, traced.siblings))
    assert all(
        name.rpartition(".")[2] in ("to_q", "to_k", "to_v") for names in traced.siblings for name in names
    )


def test_siblings_with_the_same_scales_share_a_quantizer(quantize_tiny: Make, traced: Trace) -> None:
    unet, _ = quantize_tiny(4, 4)
    layers = quantized_layers(unet)
    (first, second, third), other = (
        [layers[name] for name in names] for names in (traced.siblings[0], traced.siblings[1])
    )
    kept = other[0].quantizer
    for layer in (first, second, third):
        layer.quantizer.log_scale.data.fill_(-1.0)
    other[1].quantizer.log_scale.data.add_(1.0)
    share_quantizers(unet, traced.siblings)
    assert first.quantizer is second.quantizer is third.quantizer
    assert other[0].quantizer is kept and other[1].quantizer is not kept
    for layer in layers.values():
        layer.freeze()
    assert all(layer.quantizer.frozen for layer in layers.values())


@pytest.mark.parametrize(
    ("layer", "axis"), [(nn.Conv2d(1, 1, 1), 1), (nn.Linear(1, 1), -1)], ids=["conv", "linear"]
)
def test_channels_lie_where_the_layer_reads_them(layer: nn.Module, axis: int) -> None:
    assert channel_axis(layer) == axis

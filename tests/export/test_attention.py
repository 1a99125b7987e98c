"""Quantized attention, split and rotated layers leave torch as the codes ONNX Runtime chooses, and as an engine."""

from __future__ import annotations

from dataclasses import dataclass

import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from quest_deploy.export.check import quantized_products, weight_only_products
from quest_deploy.export.graph import component_graph
from quest_deploy.export.passes.pack_int4 import PackInt4
from quest_deploy.export.to_onnx import quantized_layer_names
from quest_deploy.model.components import Denoiser, parameters_frozen
from quest_deploy.parity.codes import CodeRun, FlipReport, compare_codes, onnxruntime_codes, torch_codes
from quest_deploy.quantize.attention import (
    OPERANDS,
    OperandQParams,
    attentions,
    insert_attention,
    operand_name,
)
from quest_deploy.quantize.checkpoint import freeze
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.structure import rebuild
from tests.export.conftest import quantize_unet, unet_inputs, unet_spec
from tests.export.tensorrt import build

CHANNELS = 8


class SmallDenoiser(nn.Module):
    """The places in question, and little else, since tracing takes time: called like a U-Net of diffusers."""

    def __init__(self) -> None:
        from diffusers.models.attention import FeedForward
        from diffusers.models.attention_processor import Attention

        super().__init__()
        heads = {"query_dim": CHANNELS, "heads": 2, "dim_head": 4}
        self.conv_in = nn.Conv2d(4, CHANNELS, 3, padding=1)
        self.attn1 = Attention(**heads, norm_num_groups=2, residual_connection=True)
        self.attn2 = Attention(**heads, cross_attention_dim=8)
        self.ff = FeedForward(CHANNELS, mult=2)
        self.conv_out = nn.Conv2d(CHANNELS + 4, 4, 3, padding=1)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        hidden = self.attn1(self.conv_in(sample))
        tokens = hidden.flatten(2).transpose(1, 2)
        told = self.ff(self.attn2(tokens, encoder_hidden_states)).transpose(1, 2)
        told = told.unflatten(2, hidden.shape[2:])
        return (self.conv_out(torch.cat([hidden + told, sample], dim=1)),)


# Codes and scale of queries, keys and values, and whether probabilities have codes, in the two attentions.
SELF, CROSS = (-128, 127, 0.02, True), (-7, 8, 0.2, False)


def small_unet() -> nn.Module:
    """At W4A4, with quantized attention, its feed-forward rotated, its last convolution split."""
    torch.manual_seed(0)
    unet = parameters_frozen(SmallDenoiser())
    rebuild(unet, {"splits": {"conv_out": CHANNELS}, "rotations": {"ff": 16}})
    quantize_unet(unet, 4, 4)
    qparams = {}
    for name in attentions(unet):
        qmin, qmax, scale, probabilities = SELF if name.endswith("attn1") else CROSS
        given = dict.fromkeys(OPERANDS, (qmin, qmax, scale)) | {"probabilities": (0, 127, 0.006)}
        for operand, (low, high, step) in given.items():
            if operand != "probabilities" or probabilities:
                group_scale = step * torch.tensor([1.0, 1.4, 0.8])
                qparams[operand_name(name, operand)] = OperandQParams(
                    group_scale=group_scale, qmin=low, qmax=high
                )
    insert_attention(unet, qparams, next(iter(quantized_layers(unet).values())).context)
    freeze(unet)
    return unet


@dataclass(frozen=True)
class Deployed:
    """One quantized denoiser in torch, and its graphs for both targets."""

    module: nn.Module
    tensorrt: onnx.ModelProto
    onnxruntime: onnx.ModelProto


@pytest.fixture(scope="module")
def deployed() -> Deployed:
    """The small denoiser. Packing codes is all that the two targets differ in, so it is traced once."""
    module = parameters_frozen(Denoiser(small_unet(), unet_spec()))
    graph = component_graph(module, unet_spec(), granularity=1, opset=21, target="tensorrt-rtx")
    tensorrt = ir.to_proto(graph)
    PackInt4()(graph)
    return Deployed(module, tensorrt, ir.to_proto(graph))


def probes() -> list[dict[str, Tensor]]:
    return [unet_inputs(2, 2, 8, 12, 5), unet_inputs(2, 1, 8, 8, 3)]


@pytest.fixture(scope="module")
def report(deployed: Deployed, tmp_path_factory: pytest.TempPathFactory) -> FlipReport:
    """Torch against ONNX Runtime, every product given the same codes."""
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    onnx.save(deployed.onnxruntime, path)
    torch.manual_seed(0)
    given = probes()
    upper: list[CodeRun] = [torch_codes(deployed.module, probe) for probe in given]
    lower = onnxruntime_codes(path, given, [run.codes for run in upper])
    assert not isinstance(lower, str), lower
    found = compare_codes(upper, lower)
    assert isinstance(found, FlipReport)
    return found


def test_parity_sees_every_operand_and_every_half(report: FlipReport) -> None:
    names = {layer.layer for layer in report.layers}
    expected = {f"unet.attn1.processor.{operand}" for operand in OPERANDS}
    expected |= {f"unet.attn2.processor.{operand}" for operand in OPERANDS if operand != "probabilities"}
    expected |= {f"unet.conv_out.{half}.quantizer" for half in ("first", "second")}
    expected |= {"unet.ff.net.2.quantizer"}
    assert expected <= names and report.unmatched == ()


def test_codes_agree(report: FlipReport) -> None:
    # Float operators between the products may round differently: DESIGN §7 allows one code in 10^4, by one.
    assert report.total.differing <= 1e-4 * report.total.places and report.total.max_difference <= 1
    assert float(report.noise_snr_db.min()) >= 50


def test_both_products_are_counted(deployed: Deployed) -> None:
    names = quantized_layer_names(deployed.module)
    products = {name for name in names if ".processor." in name}
    assert products == {
        "unet.attn1.processor.scores",
        "unet.attn1.processor.output",
        "unet.attn2.processor.scores",
    }
    assert quantized_products(deployed.onnxruntime.graph) == len(names)
    assert quantized_products(deployed.tensorrt.graph) == len(names)
    # Values of the cross attention have codes, its probabilities have none: that is no stored weight.
    assert weight_only_products(deployed.tensorrt.graph) == 0


def test_a_tensorrt_for_rtx_engine_is_built(deployed: Deployed) -> None:
    assert build(deployed.tensorrt) > 0

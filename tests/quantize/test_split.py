"""Split layers: found where two feature maps are concatenated, the same function in float, two grids when quantized."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from quest_deploy.artifacts import write_artifact
from quest_deploy.errors import CalibrationError
from quest_deploy.model.components import predict
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import affine
from quest_deploy.quantize.calibrate import CalibrationSet, collect_inputs
from quest_deploy.quantize.checkpoint import freeze, load_checkpoint, save_checkpoint
from quest_deploy.quantize.initialize import initialize
from quest_deploy.quantize.insert import insert, quantizable_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.recipe import load_recipe
from quest_deploy.quantize.split import SplitConv2d, find_concatenations, split_channels, split_layers


@pytest.fixture(scope="module")
def found(float_model: LoadedModel) -> dict[str, int]:
    """The convolutions of the tiny U-Net that read a skip concatenation."""
    return find_concatenations(float_model.denoiser, float_model.denoiser_spec)


def test_the_layers_behind_skip_concatenations_are_found(
    float_model: LoadedModel, found: dict[str, int]
) -> None:
    expected = {
        name
        for name in quantizable_layers(float_model.denoiser)
        if name.startswith("up_blocks.") and name.endswith((".conv1", ".conv_shortcut"))
    }
    assert set(found) == expected and len(expected) == 8


def test_the_first_half_is_what_comes_from_below(float_model: LoadedModel, found: dict[str, int]) -> None:
    # Widths 8 and 16, one layer a block: the middle has 16 channels, the skips 16, 8, 8 and 8.
    channels = [found[f"up_blocks.{block}.resnets.{index}.conv1"] for block in (0, 1) for index in (0, 1)]
    assert channels == [16, 16, 16, 8]


def test_a_split_convolution_computes_what_it_computed() -> None:
    conv, x = nn.Conv2d(7, 5, 3, stride=2, padding=1), torch.randn(2, 7, 9, 6)
    torch.testing.assert_close(SplitConv2d(conv, 3)(x), conv(x), rtol=1e-5, atol=1e-5)


def test_halves_of_different_ranges_keep_more_when_split() -> None:
    conv, x = nn.Conv2d(8, 6, 3, padding=1, bias=False), torch.randn(4, 8, 10, 10)
    x[:, 4:] *= 30.0
    with torch.no_grad():
        conv.weight[:, 4:] /= 30.0
        split = SplitConv2d(conv, 4)
        true = conv(x)

        def quantized(layer: nn.Module, given: torch.Tensor) -> torch.Tensor:
            grid = affine.search_grid(given, 4)
            scale = affine.search_weight_scale(layer.weight, 4)[:, None, None, None]
            weight = affine.fake_quantize(layer.weight, scale, -8, 7)
            given = affine.fake_quantize(given, grid.scale, grid.qmin, grid.qmax)
            return nn.functional.conv2d(given, weight, padding=1)

        whole = (quantized(conv, x) - true).square().mean()
        halves = quantized(split.first, x[:, :4]) + quantized(split.second, x[:, 4:])
    assert (halves - true).square().mean() < whole / 2


def test_a_split_denoiser_predicts_what_it_predicted(
    float_model: LoadedModel, recorded: CalibrationSet, found: dict[str, int]
) -> None:
    denoiser = copy.deepcopy(float_model.denoiser)
    split_layers(denoiser, found)
    sample, timestep, conditioning, target = recorded.batch(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with torch.no_grad():
        torch.testing.assert_close(
            predict(denoiser, sample, timestep, conditioning), target, rtol=1e-4, atol=1e-4
        )
    assert split_channels(denoiser) == found


@pytest.mark.parametrize(
    ("name", "channels"),
    [("up_blocks.0.resnets.0.conv1", 99), ("nothing", 1), ("time_embedding.linear_1", 1)],
)
def test_impossible_splits_are_refused(float_model: LoadedModel, name: str, channels: int) -> None:
    with pytest.raises(CalibrationError, match="quantize the model again"):
        split_layers(copy.deepcopy(float_model.denoiser), {name: channels})


def test_a_checkpoint_holds_split_layers(
    tmp_path: Path, float_model: LoadedModel, recorded: CalibrationSet, found: dict[str, int]
) -> None:
    denoiser, context = copy.deepcopy(float_model.denoiser), TimestepContext(recorded.boundaries())
    split_layers(denoiser, found)
    inputs = collect_inputs(denoiser, recorded, prompts_per_step=1, positions=8, seed=0)
    assert all(inputs[f"{name}.first"].shape[-1] == channels for name, channels in found.items())
    bits = dict.fromkeys(inputs, (4, 4))
    insert(denoiser, initialize(denoiser, inputs, bits, method="minmax"), context)
    freeze(denoiser.requires_grad_(False))
    path = tmp_path / "checkpoint"
    with write_artifact(path, stage="checkpoint", config={}) as writer:
        save_checkpoint(
            writer.path,
            float_model,
            denoiser,
            recipe=load_recipe("w4a4"),
            activation_bits=dict.fromkeys(inputs, 4),
            context=context,
            history={},
        )
    loaded = load_checkpoint(path).denoiser
    sample, timestep, conditioning, _ = recorded.batch(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with torch.no_grad():
        got, expected = (predict(each, sample, timestep, conditioning) for each in (loaded, denoiser))
    assert torch.equal(got, expected) and split_channels(loaded) == found

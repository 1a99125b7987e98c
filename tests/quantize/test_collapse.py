"""Timestep groups that agree become one, as many as the noise SNR allows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import FinetuneConfig, PhaseConfig, Recipe
from quest_deploy.errors import ConfigError
from quest_deploy.manifest import QUANTIZATION_NAME
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.collapse import Collapsed, collapse_groups, grouped, spread
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.layers import ActivationQuantizer, TimestepContext

PROMPTS = torch.tensor([1, 3])
APART = "up_blocks.1.resnets.0.conv2"
CLOSE = "mid_block.resnets.0.conv1"
TwoSides = Callable[[float], Collapsed]


@pytest.fixture
def student(quantize_tiny: Callable[[int, int], tuple[nn.Module, TimestepContext]]) -> nn.Module:
    """Groups of one layer 60 times apart, of another 1 %, of the others a third."""
    denoiser, _ = quantize_tiny(8, 8)
    for name, factors in {APART: (1.0, 60.0, 1.0), CLOSE: (1.0, 1.01, 1.0)}.items():
        quantizer = of(denoiser, name)
        quantizer.set_group_scale(quantizer.group_scale().min() * torch.tensor(factors))
    return denoiser


@pytest.fixture
def collapse(student: nn.Module, float_model: LoadedModel, recorded: CalibrationSet) -> TwoSides:
    return lambda limit: collapse_groups(student, float_model.denoiser, recorded, PROMPTS, limit_db=limit)


def of(denoiser: nn.Module, name: str) -> ActivationQuantizer:
    quantizer = quantized_layers(denoiser)[name].quantizer
    assert quantizer is not None
    return quantizer


def scales(denoiser: nn.Module) -> dict[str, Tensor]:
    return {name: quantizer.group_scale().clone() for name, quantizer in grouped(denoiser).items()}


def test_without_a_limit_every_quantizer_gets_the_largest_of_its_scales(
    student: nn.Module, collapse: TwoSides
) -> None:
    before = {name: found.max() for name, found in scales(student).items()}
    found = collapse(1e9)
    assert found.collapsed == found.quantizers == len(before)
    assert not grouped(student)
    for name, largest in before.items():
        quantizer: Any = student.get_submodule(name)
        torch.testing.assert_close(quantizer.group_scale(), largest.reshape(1))


def test_the_smallest_spread_goes_first_and_what_costs_more_than_the_limit_stays(
    student: nn.Module, collapse: TwoSides
) -> None:
    before = scales(student)
    found = collapse(0.5)
    left = grouped(student)
    assert 0 < found.collapsed < found.quantizers
    assert found.collapsed_snr_db >= found.snr_db - 0.5
    assert f"{APART}.quantizer" in left
    assert f"{CLOSE}.quantizer" not in left
    gone = [spread(scale) for name, scale in before.items() if name not in left]
    assert max(gone) <= min(spread(before[name]) for name in left)


def test_a_limit_that_nothing_meets_leaves_every_scale_as_it_was(
    student: nn.Module, collapse: TwoSides
) -> None:
    before = scales(student)
    # More than is there to be gained.
    found = collapse(-1000.0)
    assert (found.collapsed, found.collapsed_snr_db) == (0, found.snr_db)
    for name, scale in scales(student).items():
        torch.testing.assert_close(scale, before[name], rtol=1e-6, atol=0)


def test_what_is_measured_is_what_a_frozen_network_gives(
    student: nn.Module, collapse: TwoSides, float_model: LoadedModel, recorded: CalibrationSet
) -> None:
    found = collapse(0.5)
    for layer in quantized_layers(student).values():
        layer.freeze()
    again = collapse_groups(student, float_model.denoiser, recorded, PROMPTS, limit_db=-1000.0)
    assert again.snr_db == pytest.approx(found.collapsed_snr_db, abs=0.01)


def test_frozen_quantizers_collapse_as_others_do() -> None:
    x, group = torch.randn(3, 4), torch.tensor([0, 1, 2])
    quantizer = ActivationQuantizer(torch.tensor([0.1, 0.2, 0.4]), -127, 127)
    quantizer.freeze()
    quantizer.set_group_scale(torch.tensor([0.4]))
    found, unscale = quantizer(x, group)
    assert unscale is None
    assert quantizer.num_groups == 1
    torch.testing.assert_close(found, (x / 0.4).round() * 0.4)


def config(**changes: Any) -> FinetuneConfig:
    phase = PhaseConfig(layers="all", steps=1, batch_size=1)
    recipe = {
        "name": "tiny",
        "weight_bits": 8,
        "activation_bits": 8,
        "calibration_prompts": 2,
        "validation_prompts": 1,
        "calibration_steps": 2,
        "initializer": "nearest",
        "temporal": phase,
        "sensitive": phase,
    }
    return FinetuneConfig(recipe=Recipe(**(recipe | changes)), prompts=("a", "b"), seed=0)


@pytest.mark.thorough
def test_a_checkpoint_has_the_collapsed_groups_and_says_so(tmp_path: Path, tiny_model: Path) -> None:
    events: list[str] = []
    finetune(
        tiny_model,
        tmp_path / "out",
        config(collapse_loss_db=100.0),
        progress=lambda event: events.append(event.stage),
    )
    details = read_artifact(tmp_path / "out", stage="checkpoint").manifest.details["collapse"]
    layers = json.loads((tmp_path / "out" / QUANTIZATION_NAME).read_text())["layers"].values()
    assert {layer["groups"] for layer in layers} == {1}
    assert details["collapsed"] == details["quantizers"] > 0
    assert "collapse timestep groups" in events


def test_a_limit_below_zero_is_an_error_of_the_recipe() -> None:
    with pytest.raises(ConfigError, match=r"collapse_loss_db is -0\.1, expected"):
        config(collapse_loss_db=-0.1)

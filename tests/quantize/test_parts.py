"""The parts before training: what the recipe asks for reaches each layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from quest_deploy.config import FinetuneConfig, PhaseConfig, Recipe
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import affine
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.insert import LayerQParams, quantizable_layers
from quest_deploy.quantize.parts import find_scales, initialize_one, initialize_together
from quest_deploy.quantize.recording import TRAJECTORIES, record
from quest_deploy.quantize.resume import WorkDirectory
from quest_deploy.quantize.trace import Trace

LAYER = "mid_block.resnets.0.conv1"
PHASE = PhaseConfig(layers="none", steps=0)
RECIPE = Recipe(name="test", weight_bits=4, activation_bits=4, temporal=PHASE, sensitive=PHASE)


@pytest.mark.parametrize("exponent", [0.3, 0.9])
def test_a_layer_has_the_row_of_the_recipes_exponent(
    float_model: LoadedModel, inputs: dict[str, Tensor], exponent: float
) -> None:
    layer, x = quantizable_layers(float_model.denoiser)[LAYER], inputs[LAYER]
    recipe = dataclasses.replace(RECIPE, migration_exponent=exponent)
    row = initialize_one(layer, x, (4, 4), recipe).row
    assert row is not None
    assert torch.equal(row, affine.migration_row(x, layer.weight.detach(), exponent))


def test_layers_that_read_one_tensor_start_from_one_grid_and_row(
    float_model: LoadedModel, inputs: dict[str, Tensor], traced: Trace
) -> None:
    names = traced.siblings[0]
    layers = {name: quantizable_layers(float_model.denoiser)[name] for name in names}
    x = inputs[names[0]] * torch.linspace(0.01, 9, inputs[names[0]].shape[-1])
    recipe = dataclasses.replace(RECIPE, migration_exponent=0.5)
    found = initialize_together(layers, x, (4, 4), recipe)
    every = torch.cat([layer.weight.detach() for layer in layers.values()])
    for name, layer in layers.items():
        assert torch.equal(found[name].row, affine.migration_row(x, every, 0.5))
        assert torch.equal(found[name].group_scale, found[names[0]].group_scale)
        alone = affine.search_weight_scale(layer.weight.detach() * found[name].row, 4)
        assert torch.allclose(found[name].weight_scale, alone)
    rows = [initialize_one(layer, x, (4, 4), recipe).row for layer in layers.values()]
    assert not torch.equal(rows[0], rows[1])


def test_trajectories_on_disk_are_there_once_after_an_interruption_too(
    float_model: LoadedModel, work: WorkDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when they were in one file, and before those of the parts were deleted."""
    recipe = dataclasses.replace(
        RECIPE, calibration_prompts=2, validation_prompts=1, calibration_steps=2, targets="disk"
    )
    config = FinetuneConfig(recipe=recipe, prompts=("a", "b"))
    with monkeypatch.context() as killed:
        killed.setattr(WorkDirectory, "drop", lambda work, names: None)
        record(float_model, config, work, lambda event: None)
    assert work.names(TRAJECTORIES) == [TRAJECTORIES, f"{TRAJECTORIES}-000000"]
    record(float_model, config, work, lambda event: None)
    assert work.names(TRAJECTORIES) == [TRAJECTORIES]


def test_scales_come_in_the_order_of_the_layers_after_an_interruption_too(
    float_model: LoadedModel, recorded: CalibrationSet, work: WorkDirectory, traced: Trace
) -> None:
    names = ("time_embedding.linear_1", "conv_in", "conv_out")
    assert list(names) != sorted(names)
    bits = dict.fromkeys(names, (4, 4))
    config = FinetuneConfig(recipe=RECIPE)

    def scales() -> dict[str, LayerQParams]:
        return find_scales(float_model, recorded, bits, config, work, lambda event: None, trace=traced)

    fresh = scales()
    work.drop(["scales"])  # as where the run was killed before these
    again = scales()
    assert list(fresh) == list(again) == list(names)
    assert all(torch.equal(fresh[name].weight_scale, again[name].weight_scale) for name in names)

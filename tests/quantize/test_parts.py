"""The parts before training: what the recipe asks for reaches each layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from quest_deploy.config import PhaseConfig, Recipe
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import affine
from quest_deploy.quantize.insert import quantizable_layers
from quest_deploy.quantize.parts import initialize_one

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

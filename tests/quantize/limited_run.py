"""A small run, and a memory limit that has room for so many prompts of it."""

from __future__ import annotations

import dataclasses

from quest_deploy.config import FinetuneConfig, PhaseConfig, Recipe
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.memory import GIGABYTE, forward_memory, held_bytes, placeholder

NONE = PhaseConfig(layers="none", steps=0)
RECIPE = Recipe(
    name="limited",
    weight_bits=4,
    activation_bits=8,
    calibration_prompts=8,
    validation_prompts=1,
    calibration_steps=2,
    adaround_iterations=20,
    temporal=NONE,
    sensitive=NONE,
)
CONFIG = FinetuneConfig(recipe=RECIPE, prompts=tuple("abcdefgh"))


def limited(model: LoadedModel, prompts: float, recipe: Recipe = RECIPE) -> Recipe:
    """`recipe` with a limit that has room for a pass of so many prompts beside the model and what was recorded."""
    data = placeholder(model, CONFIG)
    each = forward_memory(model.denoiser, data)
    needed = held_bytes(model, data, recipe) + each.fixed + each.each * prompts
    return dataclasses.replace(recipe, memory_limit_gb=needed / GIGABYTE)

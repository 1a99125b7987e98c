"""Other layers that compute the same: what a recipe changes in a denoiser before anything is quantized.

It is done to the full-precision denoiser too, so that both have the same layers, with the same inputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from quest_deploy.config import Recipe
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.rotate import find_feed_forwards, rotate_layers, rotated_blocks
from quest_deploy.quantize.split import find_concatenations, split_channels, split_layers


def restructure(model: LoadedModel, recipe: Recipe) -> None:
    """Change the denoiser of a full-precision model, in place, as `recipe` has it: whatever there is of it."""
    if recipe.split:
        split_layers(model.denoiser, find_concatenations(model.denoiser, model.denoiser_spec))
    if recipe.rotation is not None:
        rotate_layers(model.denoiser, find_feed_forwards(model.denoiser))


def structure(denoiser: nn.Module) -> dict[str, dict[str, int]]:
    """What was changed in a denoiser, as ``quest.json`` tells it."""
    return {"splits": split_channels(denoiser), "rotations": rotated_blocks(denoiser)}


def rebuild(denoiser: nn.Module, changes: Mapping[str, Any]) -> None:
    """Change a denoiser, in place, as :func:`structure` tells it of another one of the same class.

    Raises:
        CalibrationError: a name or a size that the denoiser does not have.
    """
    split_layers(denoiser, changes.get("splits", {}))
    rotate_layers(denoiser, changes.get("rotations", {}))

"""Whether a recipe fits a model: everything that does not is told at once, before anything is recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from quest_deploy.checks import raise_if_any
from quest_deploy.config import Recipe
from quest_deploy.errors import ConfigError
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.auto_layers import check_auto
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.memory import enable_checkpointing, without_values
from quest_deploy.quantize.operands import check_operands
from quest_deploy.quantize.select import check_layers, layer_bits
from quest_deploy.quantize.static import check_companions
from quest_deploy.quantize.tables import check_tables
from quest_deploy.quantize.trace import Trace


def check_fit(model: LoadedModel, trace: Trace, recipe: Recipe) -> None:
    """See that `model` has what `recipe` asks for.

    Args:
        model: Full precision; left as it is.
        trace: Of its denoiser.
        recipe: Every field of which may ask for something.

    Raises:
        ConfigError: lists everything that the model does not have.
    """
    # Overrides change no names, and may stand for no layer.
    quantized = layer_bits(trace.roles, dataclasses.replace(recipe, overrides=()))
    checks: tuple[Callable[[], None], ...] = (
        lambda: check_layers(trace.roles, recipe),
        lambda: check_tables(trace, recipe),
        lambda: check_auto(model.denoiser, trace.roles, quantized, recipe),
        lambda: check_operands(model.denoiser, recipe),
        lambda: check_companions(model, recipe),
        lambda: _check_checkpointing(model, recipe),
    )
    problems = []
    for check in checks:
        try:
            check()
        except ConfigError as error:
            problems.append(str(error))
    raise_if_any(problems, f"recipe {recipe.name}")


def _check_checkpointing(model: LoadedModel, recipe: Recipe) -> None:
    if recipe.gradient_checkpointing:
        context = TimestepContext(torch.empty(0))
        enable_checkpointing(without_values(model.denoiser, context), context)

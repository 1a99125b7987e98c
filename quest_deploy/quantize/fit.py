"""Whether a recipe fits a model: everything that does not is told at once, before anything is recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping

import torch
from torch import nn

from quest_deploy.checks import raise_if_any
from quest_deploy.config import PhaseConfig, Recipe
from quest_deploy.errors import ConfigError
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.auto_layers import check_auto
from quest_deploy.quantize.insert import Role
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.memory import enable_checkpointing, without_values
from quest_deploy.quantize.operands import check_operands
from quest_deploy.quantize.phases import nothing_to_train, phases
from quest_deploy.quantize.select import AUTO, check_layers, layer_bits, matching, patterns
from quest_deploy.quantize.static import check_companions
from quest_deploy.quantize.tables import check_tables
from quest_deploy.quantize.trace import Trace
from quest_deploy.quantize.train import norm_parameters


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
        lambda: _check_learning(model.denoiser, trace.roles, quantized, recipe),
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


def _check_learning(
    denoiser: nn.Module, roles: Mapping[str, Role], quantized: Collection[str], recipe: Recipe
) -> None:
    idle = [
        name
        for name, phase in phases(recipe)
        if not _learns(denoiser, roles, quantized, phase, temporal=name == "temporal")
    ]
    if idle:
        raise ConfigError("; ".join(map(nothing_to_train, idle)))


def _learns(
    denoiser: nn.Module,
    roles: Mapping[str, Role],
    quantized: Collection[str],
    phase: PhaseConfig,
    *,
    temporal: bool,
) -> bool:
    """Whether :func:`quest_deploy.quantize.train.trainable` would find anything in the student of `denoiser`."""
    own = [name for name, role in roles.items() if (role == "temporal") == temporal]
    # Of layers, or of the tables in their place.
    if own and phase.learning_rate_scales:
        return True
    wanted = patterns(phase.layers)
    chosen = AUTO in wanted or any(not matching(roles, one).isdisjoint(quantized) for one in wanted)
    if chosen and (phase.learning_rate_weights or phase.learning_rate_scales):
        return True
    if not phase.learning_rate_floats:
        return False
    biases = [denoiser.get_submodule(name).bias for name in own if name in quantized]
    return any(bias is not None for bias in biases) or (not temporal and bool(norm_parameters(denoiser)))


def _check_checkpointing(model: LoadedModel, recipe: Recipe) -> None:
    if recipe.gradient_checkpointing:
        context = TimestepContext(torch.empty(0))
        enable_checkpointing(without_values(model.denoiser, context), context)

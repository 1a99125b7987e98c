"""The student: a copy of the denoiser with quantized layers; and one without values, to see what it will take."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quest_deploy.config import FinetuneConfig, Recipe
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import adaround, auto_layers, parts, phases, static
from quest_deploy.quantize.attention import insert_attention
from quest_deploy.quantize.blocks import shapes_of
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.insert import LayerQParams, insert, quantizable_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.memory import (
    enable_checkpointing,
    forward_memory,
    held_bytes,
    placeholder,
    prompts_at_once,
    without_values,
)
from quest_deploy.quantize.operands import any_operands
from quest_deploy.quantize.select import layer_bits
from quest_deploy.quantize.tables import insert_tables, make_context
from quest_deploy.quantize.trace import Trace
from quest_deploy.quantize.walk import any_steps


def make_student(
    model: LoadedModel,
    qparams: Mapping[str, LayerQParams],
    rounded: Mapping[str, Tensor],
    context: TimestepContext,
) -> nn.Module:
    """A copy of the denoiser with quantized layers.

    Args:
        model: The full-precision model.
        qparams: Scales.
        rounded: Weights to start from, of the layers that have others than the model's.
        context: The timestep groups.
    """
    student = copy.deepcopy(model.denoiser)
    layers = quantizable_layers(student)
    with torch.no_grad():
        for name, weight in rounded.items():
            layers[name].weight.copy_(weight)
    insert(student, qparams, context)
    return student


def any_scales(
    denoiser: nn.Module, bits: Mapping[str, tuple[int, int]], data: CalibrationSet
) -> dict[str, LayerQParams]:
    """Scales of the layers with `bits`, of the shapes that a run finds and of any values: for estimates."""
    groups = data.timesteps.numel()
    return {
        name: LayerQParams(
            weight_bits=bits[name][0],
            weight_scale=torch.full([layer.weight.shape[0]], 0.01),
            activation_bits=bits[name][1],
            group_scale=torch.full([groups], 0.1),
        )
        for name, layer in quantizable_layers(denoiser).items()
        if name in bits
    }


def complete(
    student: nn.Module,
    model: LoadedModel,
    trace: Trace,
    data: CalibrationSet,
    context: TimestepContext,
    recipe: Recipe,
) -> Trace:
    """Give a student what a run trains it with beside its layers, of any values, in place: for estimates.

    Returns:
        The roles of layers that are left beside time-embedding tables.
    """
    trained = insert_tables(student, model.denoiser, trace, context, data.device)
    insert_attention(student, any_operands(model.denoiser, data, recipe), context)
    student.requires_grad_(False)
    if recipe.gradient_checkpointing:
        enable_checkpointing(student, context)
    return trained


def adaround_plans(
    student: nn.Module, model: LoadedModel, data: CalibrationSet, context: TimestepContext, recipe: Recipe
) -> list[adaround.Plan]:
    """How each part of the network learns its rounding: for estimates.

    Args:
        student: Attention in float; no value is read.
        model: The full-precision model.
        data: The shapes of what is recorded.
        context: The student's.
        recipe: Its limit.

    Raises:
        ConfigError: not even one sample of a part fits.
    """
    held = held_bytes(model, data, recipe) + adaround.own_bytes(student)
    forward = forward_memory(student, data, context)
    limit_gb = recipe.memory_limit_gb
    return [
        adaround.plan(
            student.get_submodule(name),
            own,
            data,
            context,
            held_bytes=held,
            forward=forward,
            limit_gb=limit_gb,
        )
        for name, own in shapes_of(student, data, context).items()
    ]


def check_limit(model: LoadedModel, trace: Trace, config: FinetuneConfig) -> None:
    """See that the parts of a run that come late can keep the recipe's memory limit, before the first one begins.

    A run that ends at the limit cannot be resumed with another one: rounding goes by it.

    Args:
        model: Full precision; no value of its denoiser is copied.
        trace: Of its denoiser.
        config: As it stands for this model.

    Raises:
        ConfigError: one cannot; says how much is needed.
    """
    recipe = config.recipe
    if recipe.memory_limit_gb is None:
        return
    data = placeholder(model, config)
    context, bits = make_context(data.boundaries(), data.timesteps, recipe), layer_bits(trace.roles, recipe)
    prompts_at_once(model, data, recipe, 1, parts.seen_bytes(model, data, list(bits)))
    if recipe.initializer == "gptq":
        parts.plan_rounding(model, data, list(bits), recipe)
    bare = dataclasses.replace(
        model, denoiser=without_values(model.denoiser, TimestepContext(torch.empty(0)))
    )
    student = make_student(bare, any_scales(model.denoiser, bits, data), {}, context)
    if recipe.initializer == "adaround":
        adaround_plans(student.requires_grad_(False), model, data, context, recipe)
    trained = complete(student, model, trace, data, context, recipe)
    if auto_layers.asked(recipe):
        config = auto_layers.any_layers(model.denoiser, trace.roles, bits, config)
    inputs = phases.Inputs(
        model=model, student=student, trace=trained, data=data, context=context, config=config
    )
    phases.slices_within(inputs, recipe.memory_limit_gb, any_steps(model, recipe))
    if recipe.vae_decoder == "w8a8":
        static.latents_at_once(model, recipe)

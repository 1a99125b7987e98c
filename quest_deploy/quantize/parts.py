"""The parts of finetuning between recording and training, each resumable: find scales, round the weights."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.config import FinetuneConfig, ProgressEvent, Recipe
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import adaround, calibrate, gptq
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.initialize import initialize_layer
from quest_deploy.quantize.insert import LayerQParams, quantizable_layers
from quest_deploy.quantize.layers import Quantizable, TimestepContext
from quest_deploy.quantize.memory import (
    GIGABYTE,
    PassMemory,
    forward_memory,
    held_bytes,
    limit_count,
    prompts_at_once,
    size_bytes,
)
from quest_deploy.quantize.resume import Throttle, WorkDirectory, flatten_qparams, unflatten_qparams
from quest_deploy.quantize.select import for_layer
from quest_deploy.quantize.time_inputs import inputs_over_time, joined
from quest_deploy.quantize.trace import Trace

logger = logging.getLogger(__name__)

Progress = Callable[[ProgressEvent], None]
PROMPTS_PER_STEP = 8
POSITIONS_PER_STEP = 64
ROWS_PER_STEP = 256


def find_scales(
    model: LoadedModel,
    data: CalibrationSet,
    bits: Mapping[str, tuple[int, int]],
    config: FinetuneConfig,
    work: WorkDirectory,
    progress: Progress,
    *,
    trace: Trace,
) -> dict[str, LayerQParams]:
    """Starting scales of every layer with `bits`, from what it is given on the recorded trajectories.

    Those that carry time are given every timestep; the timeless ones have one scale for all. Where the recipe shares
    inputs, siblings of the same bits share scales and channel row.
    """
    recipe = config.recipe
    saved = work.load("inputs")
    if saved is None:
        inputs = layer_inputs(
            model,
            trace,
            data,
            seed=config.seed,
            report=reporter(progress, "collect activations"),
            names=bits,
            work=work,
            at_once=prompts_at_once(
                model, data, recipe, PROMPTS_PER_STEP, seen_bytes(model, data, list(bits))
            ),
        )
        work.save("inputs", inputs)
        work.drop(work.names(calibrate.PIECES))
    else:
        inputs = saved[0]
    # Files hold tensors in an order of their own, and what is drawn later goes by this one.
    inputs = {name: inputs[name] for name in bits if name in inputs}
    saved = work.load("scales")
    qparams = {} if saved is None else unflatten_qparams(*saved)
    throttle = Throttle(work)
    layers = quantizable_layers(model.denoiser)
    for done, name in enumerate(inputs, start=1):
        if name not in qparams:
            together = sharing(name, trace, recipe, bits)
            own = for_layer(recipe, name, trace.timeless)
            qparams |= initialize_together(
                {other: layers[other] for other in together}, inputs[name], bits[name], own
            )
            if throttle.due() or done == len(inputs):
                tensors, facts = flatten_qparams(qparams)
                work.save("scales", tensors, **facts)
        progress(ProgressEvent(stage="search scales", completed=done, total=len(inputs)))
    return {name: qparams[name] for name in inputs}


def sharing(name: str, trace: Trace, recipe: Recipe, bits: Mapping[str, tuple[int, int]]) -> tuple[str, ...]:
    """The layers that have one quantizer for their inputs with the layer `name`, itself among them."""
    for siblings in trace.siblings if recipe.shared_inputs else ():
        if name in siblings:
            return tuple(other for other in siblings if bits.get(other) == bits[name])
    return (name,)


def layer_inputs(
    model: LoadedModel,
    trace: Trace,
    data: CalibrationSet,
    *,
    seed: int,
    names: Collection[str] | None = None,
    report: Callable[[int, int], None] = lambda completed, total: None,
    work: WorkDirectory | None = None,
    at_once: int | None = None,
    prompts_per_step: int = PROMPTS_PER_STEP,
    positions: int = POSITIONS_PER_STEP,
) -> dict[str, Tensor]:
    """What starting scales are found from: as `collect_inputs` has it, and of layers of time at every timestep.

    Args:
        model: Full precision.
        trace: Its.
        data: Recorded trajectories.
        seed: For the choice of positions.
        names: The layers that are looked at; None means all.
        report: Called after each timestep.
        work: Where to keep what was seen, to go on from after an interruption.
        at_once: The most prompts that are run together; None means all. The result is the same.
        prompts_per_step: How many prompts are run at each timestep.
        positions: How many tokens or pixels of each layer's input are kept per timestep.
    """
    inputs = calibrate.collect_inputs(
        model.denoiser,
        data,
        prompts_per_step=prompts_per_step,
        positions=positions,
        seed=seed,
        report=report,
        work=work,
        names=names,
        at_once=at_once,
    )
    between = inputs_over_time(
        model.denoiser, trace, data, inputs, last_time=model.last_time, positions=positions, seed=seed
    )
    return inputs | {name: joined(inputs[name], rows) for name, rows in between.items()}


def initialize_one(layer: Quantizable, inputs: Tensor, bits: tuple[int, int], recipe: Recipe) -> LayerQParams:
    """Starting scales of one layer as the recipe wants them; `inputs` as `collect_inputs` gives them.

    The search runs where the layer's weight lies; what it finds is on the CPU.
    """
    device = layer.weight.device
    with device:
        found = initialize_layer(
            layer,
            inputs.to(device),
            *bits,
            method="search",
            time_aware=recipe.time_aware,
            channel_wise=recipe.channel_wise,
            migration_exponent=recipe.migration_exponent,
        )
    return dataclasses.replace(
        found,
        weight_scale=found.weight_scale.cpu(),
        group_scale=None if found.group_scale is None else found.group_scale.cpu(),
        row=None if found.row is None else found.row.cpu(),
    )


def initialize_together(
    layers: Mapping[str, Quantizable], inputs: Tensor, bits: tuple[int, int], recipe: Recipe
) -> dict[str, LayerQParams]:
    """Starting scales of layers that read the same tensor: as of one layer with all their outputs.

    Args:
        layers: Linear, if there are several.
        inputs: As `collect_inputs` gives them.
        bits: Of weights and activations.
        recipe: How.
    """
    weights = [layer.weight.detach() for layer in layers.values()]
    if len(weights) == 1:
        return {name: initialize_one(layer, inputs, bits, recipe) for name, layer in layers.items()}
    joint = nn.Linear(weights[0].shape[1], sum(len(weight) for weight in weights), bias=False, device="meta")
    joint.weight = nn.Parameter(torch.cat(weights), requires_grad=False)
    found = initialize_one(joint, inputs, bits, recipe)
    scales = found.weight_scale.split([len(weight) for weight in weights])
    # Copies: safetensors stores no tensor twice.
    return {
        name: dataclasses.replace(copy.deepcopy(found), weight_scale=scale.clone())
        for name, scale in zip(layers, scales, strict=True)
    }


def round_weights(
    model: LoadedModel,
    data: CalibrationSet,
    qparams: dict[str, LayerQParams],
    config: FinetuneConfig,
    work: WorkDirectory,
    progress: Progress,
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights rounded by the initializer (none: all go to nearest), by layer; and what there is to tell of it."""
    if config.recipe.initializer == "adaround":
        context, report = TimestepContext(data.boundaries()), reporter(progress, "round weights")
        weights, errors = adaround.reconstruct(
            model.denoiser,
            data,
            qparams,
            context,
            config,
            work,
            report,
            held_bytes(model, data, config.recipe),
        )
        return weights, {"adaround": errors}
    if config.recipe.initializer == "gptq":
        return compensate_errors(model, data, qparams, config, work, progress), {}
    return {}, {}


def compensate_errors(
    model: LoadedModel,
    data: CalibrationSet,
    qparams: dict[str, LayerQParams],
    config: FinetuneConfig,
    work: WorkDirectory,
    progress: Progress,
) -> dict[str, Tensor]:
    """Weights rounded with error compensation, as many layers at a time as their Hessians leave memory for."""
    rounded: dict[str, Tensor] = {}
    plan = plan_rounding(model, data, list(qparams), config.recipe)
    at_once = plan.prompts
    together = [
        (f"rounded-{index:04d}" + (f"+{part:04d}" if part else ""), some, names)
        for index, names in enumerate(gptq.chunks(model.denoiser, list(qparams)))
        for part, some in enumerate(gptq.chunks(model.denoiser, names, plan.room))
    ]
    for key, names, beside in together:
        saved = work.load(key)
        if saved is None:
            part = gptq.compensate(
                model.denoiser,
                data,
                qparams,
                names,
                beside=beside,
                at_once=at_once,
                prompts_per_step=PROMPTS_PER_STEP,
                rows_per_step=ROWS_PER_STEP,
                seed=config.seed,
                report=reporter(progress, "round weights"),
                work=work,
                key=key,
            )
            work.save(key, part)
            work.drop(work.names(f"{key}-"))
        else:
            part = saved[0]
        rounded.update(part)
    left = sorted(qparams.keys() - rounded.keys())
    if left:
        logger.info(
            "%d layers are too wide or grouped and are rounded to nearest, e.g. %s", len(left), left[0]
        )
    return rounded


@dataclass(frozen=True, kw_only=True)
class RoundingPlan:
    """How layers are rounded with error compensation.

    Attributes:
        room: Bytes of Hessians that are gathered together; None means what `gptq.chunks` allows.
        prompts: The most that are run together.
        memory_bytes: The most at once, the model and what was recorded included.
    """

    room: float | None
    prompts: int
    memory_bytes: int


def plan_rounding(
    model: LoadedModel, data: CalibrationSet, names: Sequence[str], recipe: Recipe
) -> RoundingPlan:
    """How the layers `names` are rounded within the limit; one layer's Hessian is gathered in any case.

    Raises:
        ConfigError: not even one prompt, or one layer, fits.
    """
    every = quantizable_layers(model.denoiser)
    layers = [every[name] for chunk in gptq.chunks(model.denoiser, names) for name in chunk]
    # The rounded weights of the layers that are done.
    beside = size_bytes([layer.weight for layer in layers])
    held = held_bytes(model, data, recipe) + beside
    largest = max(map(gptq.hessian_bytes, layers), default=0)
    copies = PassMemory(fixed=0, each=max(map(gptq.rounding_bytes, layers), default=0))
    limit, room = recipe.memory_limit_gb, None
    if limit is not None:
        limit_count(1, held + largest, limit, copies)
        forward = forward_memory(model.denoiser, data)
        left = limit * GIGABYTE - held
        # Half of what a pass leaves, so that several prompts go through it.
        room = min((left - forward.fixed - forward.each) / 2, left - copies.each, gptq.MAX_HESSIAN_BYTES)
        room = max(room, largest)
    chunks = (
        some
        for chunk in gptq.chunks(model.denoiser, names)
        for some in gptq.chunks(model.denoiser, chunk, room)
    )
    hessians = max((sum(gptq.hessian_bytes(every[name]) for name in some) for some in chunks), default=0)
    prompts = prompts_at_once(model, data, recipe, PROMPTS_PER_STEP, beside + hessians)
    forward = forward_memory(model.denoiser, data)
    most = max(forward.fixed + forward.each * min(prompts, data.num_prompts), copies.each)
    return RoundingPlan(room=room, prompts=prompts, memory_bytes=held + hessians + most)


def seen_bytes(model: LoadedModel, data: CalibrationSet, names: Sequence[str]) -> int:
    """What the inputs of layers take that are kept while activations are collected."""
    layers = quantizable_layers(model.denoiser)
    rows = data.timesteps.numel() * (POSITIONS_PER_STEP + calibrate.EXTREME_ROWS)
    return sum(4 * rows * layers[name].weight.shape[1] for name in names)


def reporter(progress: Progress, stage: str) -> Callable[[int, int], None]:
    """What tells `progress` how far `stage` is."""
    return lambda completed, total: progress(ProgressEvent(stage=stage, completed=completed, total=total))

"""AdaRound block reconstruction (arXiv 2004.10568; by blocks as BRECQ, 2102.05426, and Q-Diffusion, 2302.04304, do).

Every weight goes to the floor or the ceiling of its place on the grid, whichever makes a block's output most like that
of full precision. The choice is learned with a soft rounding that a regulariser drives to 0 or 1::

    W_q = s * clamp(floor(W / s) + h(V)),    h(V) = clamp(1.2 * sigmoid(V) - 0.1, 0, 1)
    loss = |block(x) - target|^2 / |nearest(x) - target|^2 + 10 * mean(1 - |2 h(V) - 1|^beta)

with scales fixed, beta falling from 20 to 2, and no regulariser for the first fifth. Blocks are done in the order in
which the network runs them. A block's inputs x come from the quantized network, whose earlier blocks are done and whose
activations are quantized; the targets are what the full-precision network answers at that place. (Q-Diffusion's first
stage leaves activations in float.) Both terms of the loss are relative: neither a layer's width nor the scale of its
output asks for other settings.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quest_deploy.config import FinetuneConfig
from quest_deploy.quantize.blocks import (
    Samples,
    chosen_pairs,
    collect,
    shapes_of,
    tensors,
)
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.grid import channel_shape, dequantize, weight_bounds
from quest_deploy.quantize.insert import LayerQParams, insert, quantized_layers
from quest_deploy.quantize.layers import QuantizedLayer, TimestepContext
from quest_deploy.quantize.memory import (
    META,
    PassMemory,
    PeakMemory,
    forward_memory,
    limit_count,
    size_bytes,
    without_values,
)
from quest_deploy.quantize.resume import WorkDirectory

BATCH_SIZE = 32
PROMPTS_PER_STEP = 8
LOWER, UPPER = -0.1, 1.1
WARM_UP = 0.2
BETA_START, BETA_END = 20.0, 2.0
REGULARISATION = 10.0
# How far a logit can go in a whole run, whatever its length; |V| = 2.4 is the end of the soft range.
TRAVEL = 80.0
RATES = (1e-3, 0.3)
Report = Callable[[int, int], None]


@dataclass(frozen=True)
class Rounding:
    """The learned rounding of one weight.

    Attributes:
        floor: float32, the weight's shape: the grid's place below, in steps.
        scale: float32 [c_out, 1, ...].
        logits: V, in the weight's shape.
        bounds: Smallest and largest code.
    """

    floor: Tensor
    scale: Tensor
    logits: Tensor
    bounds: tuple[int, int]

    def soft(self) -> Tensor:
        """The weight while it is learned."""
        return (self.floor + rectified_sigmoid(self.logits)).clamp(*self.bounds) * self.scale

    def codes(self) -> Tensor:
        """int8, the weight's shape: what was learned."""
        return (self.floor + (self.logits >= 0)).clamp(*self.bounds).to(torch.int8)


def rectified_sigmoid(logits: Tensor) -> Tensor:
    """h(V), in [0, 1], which it reaches at finite V."""
    return (torch.sigmoid(logits) * (UPPER - LOWER) + LOWER).clamp(0, 1)


def start_rounding(layer: QuantizedLayer) -> Rounding:
    """The rounding whose soft weight is the float weight (where that lies within the grid)."""
    weight = layer.scaled_weight().detach()
    scale = channel_shape(layer.weight_scale().detach(), weight.ndim, 0)
    floor = (weight / scale).floor()
    fraction = (weight / scale - floor - LOWER) / (UPPER - LOWER)
    return Rounding(floor, scale, fraction.logit().requires_grad_(True), weight_bounds(layer.weight_bits))


def regulariser(rounding: Sequence[Rounding], beta: float) -> Tensor:
    """Mean over all weights of 1 - |2 h - 1|^beta: how undecided they are, a scalar."""
    total = sum(one.logits.numel() for one in rounding)
    distances = [(2 * rectified_sigmoid(one.logits) - 1).abs() for one in rounding]
    return torch.stack([(1 - distance.pow(beta)).sum() for distance in distances]).sum() / total


def beta_at(progress: float) -> float | None:
    """The regulariser's exponent at `progress` in [0, 1] of a run; None while there is no regulariser."""
    if progress < WARM_UP:
        return None
    done = (progress - WARM_UP) / (1 - WARM_UP)
    return BETA_END + 0.5 * (BETA_START - BETA_END) * (1 + math.cos(math.pi * done))


def learn_rounding(
    part: nn.Module,
    samples: Samples,
    context: TimestepContext,
    *,
    iterations: int,
    generator: torch.Generator,
    at_once: int = BATCH_SIZE,
) -> tuple[dict[str, Tensor], float, float]:
    """Learn how the weights of one part of the network are rounded; nearest stays where that is better.

    Args:
        part: A block with quantized layers, or a single such layer; its weights end on their grid.
        samples: What it is given and should answer.
        context: Its layers' timestep groups.
        iterations: Updates.
        generator: Chooses the samples of each.
        at_once: The most samples that go through the part at once; gradients are those of all of an update's.

    Returns:
        The weights by the layers' names inside `part` ("" is itself), divided by their channel rows; and the mean
        squared error of the output with weights rounded to nearest, and with these.
    """
    layers = quantized_layers(part)
    codes = {name: layer.weight_codes() for name, layer in layers.items()}
    nearest = learned = squared_error(part, samples, context, at_once)
    if nearest > 0:
        rounding = {name: start_rounding(layer) for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.rounding = rounding[name].soft
        update = functools.partial(_update, part, samples, context, list(rounding.values()), nearest, at_once)
        _descend(update, [one.logits for one in rounding.values()], samples, iterations, generator)
        for layer in layers.values():
            layer.rounding = None
        _put(layers, {name: one.codes() for name, one in rounding.items()})
        learned = squared_error(part, samples, context, at_once)
    if learned >= nearest:
        _put(layers, codes)
        learned = nearest
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}, nearest, learned


def _descend(
    update: Callable[[Tensor, float | None], None],
    logits: Sequence[Tensor],
    samples: Samples,
    iterations: int,
    generator: torch.Generator,
) -> None:
    """Gradient descent on the logits: `update` adds their gradients, of the chosen samples at that beta."""
    rate = min(max(TRAVEL / iterations, RATES[0]), RATES[1])
    optimizer = torch.optim.Adam(logits, lr=rate)
    n = samples.timestep.numel()
    for step in range(iterations):
        chosen = torch.randint(n, (min(n, BATCH_SIZE),), generator=generator)
        optimizer.zero_grad(set_to_none=True)
        update(chosen, beta_at(step / iterations))
        optimizer.step()


def _update(
    part: nn.Module,
    samples: Samples,
    context: TimestepContext,
    rounding: Sequence[Rounding],
    nearest: float,
    at_once: int,
    chosen: Tensor,
    beta: float | None,
) -> None:
    """Add the gradients of the loss of `chosen` samples to the logits of `rounding`, whose soft weights `part` uses."""
    for number, some in enumerate(chosen.split(at_once)):
        loss = _error(part, samples.batch(some), context) / nearest
        if some.numel() < chosen.numel():
            loss = loss * (some.numel() / chosen.numel())
        if beta is not None and number == 0:
            loss = loss + REGULARISATION * regulariser(rounding, beta)
        loss.backward()


@torch.no_grad()
def _put(layers: Mapping[str, QuantizedLayer], codes: Mapping[str, Tensor]) -> None:
    """Set the float weights to their grid's values, so that they are rounded to these codes."""
    for name, layer in layers.items():
        weight = dequantize(codes[name], channel_shape(layer.weight_scale(), layer.weight.ndim, 0))
        row = layer.row()
        layer.weight.copy_(weight if row is None else weight / channel_shape(row, weight.ndim, 1))


def _error(part: nn.Module, samples: Samples, context: TimestepContext) -> Tensor:
    context.set_timestep(samples.timestep)
    outputs = tensors(part(*samples.args, **samples.kwargs))
    errors = [(got - wanted).square().mean() for got, wanted in zip(outputs, samples.targets, strict=True)]
    return torch.stack(errors).mean()


@torch.no_grad()
def squared_error(
    part: nn.Module, samples: Samples, context: TimestepContext, at_once: int = BATCH_SIZE
) -> float:
    """Mean squared error of a part's output over all samples, as it is rounded now."""
    n = samples.timestep.numel()
    sums = [
        float(_error(part, samples.batch(index), context)) * index.numel()
        for index in torch.arange(n).split(min(at_once, BATCH_SIZE))
    ]
    return sum(sums) / n


def part_memory(part: nn.Module, samples: Samples, context: TimestepContext) -> PassMemory:
    """What gradients of the logits of a part's weights take, for each sample. No value is read."""
    before, shapes = context.now, samples.to(META)
    bare = without_values(part, context)
    rounding = []
    for layer in quantized_layers(bare).values():
        rounding.append(start_rounding(layer))
        layer.rounding = rounding[-1].soft

    def peak(count: int) -> int:
        with PeakMemory() as memory:
            few = torch.zeros(count, dtype=torch.int64, device=META)
            _update(bare, shapes, context, rounding, 1.0, count, few, BETA_START)
        for one in rounding:
            one.logits.grad = None
        return memory.peak

    found = PassMemory.measured(peak, BATCH_SIZE)
    context.now = before
    return found


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How one part is gone about.

    Attributes:
        prompts: The most that are run together while its samples are collected.
        at_once: The most samples that go through it together.
        memory_bytes: The most at once, what is held all the time included.
    """

    prompts: int
    at_once: int
    memory_bytes: int


def plan(
    part: nn.Module,
    shapes: Samples,
    data: CalibrationSet,
    context: TimestepContext,
    *,
    held_bytes: int,
    forward: PassMemory,
    limit_gb: float | None,
) -> Plan:
    """How a part's rounding is learned within the limit.

    Args:
        part: With quantized layers.
        shapes: Of its samples, as `shapes_of` gives them.
        data: Recorded trajectories, or their shapes.
        context: Its layers'.
        held_bytes: What is in memory all the time.
        forward: Of a pass through the whole network.
        limit_gb: What may be, at most; None means no limit.

    Raises:
        ConfigError: not even one sample fits.
    """
    samples, shown = count_samples(data), min(PROMPTS_PER_STEP, data.num_prompts)
    kept = shapes.size_bytes * samples // shapes.timestep.numel()
    # The place below, logits, their gradients and Adam's two moments.
    beside = kept + 5 * size_bytes(list(part.parameters()))
    memory = part_memory(part, shapes, context)
    prompts = limit_count(shown, held_bytes + kept, limit_gb, forward)
    at_once = limit_count(min(BATCH_SIZE, samples), held_bytes + beside, limit_gb, memory)
    # Samples are there twice while those of all passes are joined.
    most = max(
        2 * kept,
        kept + forward.fixed + forward.each * prompts,
        beside + memory.fixed + memory.each * at_once,
    )
    return Plan(prompts=prompts, at_once=at_once, memory_bytes=held_bytes + most)


def own_bytes(student: nn.Module) -> int:
    """Of the copy of the denoiser that is rounded, what its layers keep of their weights, and what is given back."""
    weights: list[Tensor] = [layer.weight for layer in quantized_layers(student).values()]
    return size_bytes([*student.parameters(), *student.buffers()]) + 2 * size_bytes(weights)


def count_samples(data: CalibrationSet) -> int:
    """How many samples each part has."""
    return data.timesteps.numel() * min(PROMPTS_PER_STEP, data.num_prompts) * data.targets.shape[2]


def reconstruct(
    denoiser: nn.Module,
    data: CalibrationSet,
    qparams: Mapping[str, LayerQParams],
    context: TimestepContext,
    config: FinetuneConfig,
    work: WorkDirectory | None = None,
    report: Report = lambda completed, total: None,
    held_bytes: int = 0,
) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
    """Learn the rounding of the whole network, part by part.

    Args:
        denoiser: Full-precision diffusers module.
        data: Recorded trajectories.
        qparams: Scales of the layers.
        context: The timestep groups.
        config: Its seed, and its recipe's number of updates for each part.
        work: Where finished parts are kept, and found when the run is resumed.
        report: Called after each part.
        held_bytes: What is in memory beside the copy of the denoiser that is rounded: it counts where the recipe has a
            limit.

    Returns:
        Rounded weights by layer name, divided by their channel rows: the float weights to go on from. And by part, the
        mean squared error of its output before (nearest) and after.
    """
    student = copy.deepcopy(denoiser)
    insert(student, qparams, context)
    student.requires_grad_(False)
    layers = quantized_layers(student)
    limit = config.recipe.memory_limit_gb
    held = held_bytes + own_bytes(student)
    pairs = chosen_pairs(data, PROMPTS_PER_STEP, config.seed)
    shapes = shapes_of(student, data, context)
    forward = None if limit is None else forward_memory(student, data, context)
    weights: dict[str, Tensor] = {}
    errors: dict[str, tuple[float, float]] = {}
    for index, (name, given) in enumerate(shapes.items()):
        key = f"adaround-{index:04d}"
        saved = None if work is None else work.load(key)
        if saved is None:
            part, prompts, at_once = student.get_submodule(name), PROMPTS_PER_STEP, BATCH_SIZE
            if forward is not None:
                own = plan(
                    part,
                    given,
                    data,
                    context,
                    held_bytes=held,
                    forward=forward,
                    limit_gb=limit,
                )
                prompts, at_once = own.prompts, own.at_once
            samples = collect(student, denoiser, name, data, pairs, prompts)
            generator = torch.Generator().manual_seed(config.seed + index)
            found, before, after = learn_rounding(
                part,
                samples,
                context,
                iterations=config.recipe.adaround_iterations,
                generator=generator,
                at_once=at_once,
            )
            done = {f"{name}.{inner}" if inner else name: weight for inner, weight in found.items()}
            if work is not None:
                work.save(key, done, before=before, after=after)
        else:
            done, before, after = saved[0], saved[1]["before"], saved[1]["after"]
            with torch.no_grad():
                for layer, weight in done.items():
                    layers[layer].weight.copy_(weight)
        weights |= done
        errors[name] = (before, after)
        report(index + 1, len(shapes))
    return weights, errors

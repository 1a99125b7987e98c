"""What quantizing one layer alone does to the noise prediction, layer by layer.

The denoiser stays as it is but for one layer, whose weight is replaced by its quantized values and whose input passes
a quantizer; then a fixed set of (prompt, timestep) pairs of the full-precision trajectories is predicted again. Scales
are those that finetuning would start from, weights are rounded to nearest.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy import sampling
from quest_deploy.config import Recipe
from quest_deploy.metrics import IDENTICAL_DB, snr_db
from quest_deploy.model import components
from quest_deploy.quantize import affine
from quest_deploy.quantize.allocate import Bits
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.grid import channel_shape, weight_bounds
from quest_deploy.quantize.initialize import initialize_layer
from quest_deploy.quantize.insert import Role, Roles, channel_axis, insert, quantizable_layers
from quest_deploy.quantize.layers import ActivationQuantizer, Quantizable, TimestepContext
from quest_deploy.quantize.select import for_layer

BATCH_PAIRS = 16
Entry = dict[str, Any]
"""One layer's `name`, `role`, `weights`, `macs` and `damage`, in JSON types."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Which (prompt, step) pairs are predicted, all prompts of a step together.

    Attributes:
        prompt: int64 [s * p].
        step: int64 [s * p].
        steps: s.
    """

    prompt: Tensor
    step: Tensor
    steps: int


def choose_pairs(data: CalibrationSet, *, steps: int, prompts: int) -> Pairs:
    """`prompts` trajectories at each of `steps` evenly spread steps; other trajectories from step to step."""
    total = data.timesteps.numel()
    chosen = torch.linspace(0, total - 1, min(steps, total)).round().long()
    prompts = min(prompts, data.num_prompts)
    prompt = torch.arange(chosen.numel() * prompts) % data.num_prompts
    return Pairs(prompt=prompt, step=chosen.repeat_interleave(prompts), steps=chosen.numel())


def run_pairs(denoiser: nn.Module, data: CalibrationSet, prompt: Tensor, step: Tensor) -> Tensor:
    """The denoiser's outputs for the given pairs, one row for each guidance branch: [branches, n, c, h, w]."""
    sample, timestep, conditioning = data.inputs(prompt, step)
    output = components.predict(denoiser, sample, timestep, conditioning)
    return output.unflatten(0, (-1, prompt.numel()))


def predict(
    denoiser: nn.Module,
    data: CalibrationSet,
    pairs: Pairs,
    guidance_scale: float,
    at_once: int = BATCH_PAIRS,
) -> Tensor:
    """The guided noise prediction of all pairs, at most `at_once` of them run together, [s * p, c, h, w]."""
    chunks = zip(pairs.prompt.split(at_once), pairs.step.split(at_once), strict=True)
    outputs = torch.cat([run_pairs(denoiser, data, prompt, step) for prompt, step in chunks], dim=1)
    return sampling.guide(outputs.flatten(0, 1), guidance_scale) if outputs.shape[0] == 2 else outputs[0]


def damage_between(reference: Tensor, prediction: Tensor, steps: int) -> dict[str, Any]:
    """How far a prediction of pairs is from the reference.

    Args:
        reference: [s * p, c, h, w].
        prediction: The same shape.
        steps: s.

    Returns:
        `relative_error` (mean over pairs of the squared error over the squared signal), its mean at each step as
        `relative_error_by_step`, `step_snr_db`, the mean of those steps' decibels, as layers' damages that are added up
        predict it, and `snr_db`, the mean of the pairs' decibels.
    """
    snr = snr_db(reference, prediction)
    error = (10 ** (-snr / 10)).reshape(steps, -1).mean(dim=1)
    return {
        "relative_error": float(error.mean()),
        "relative_error_by_step": error.tolist(),
        "step_snr_db": float((-10 * error.log10()).clamp(max=IDENTICAL_DB).mean()),
        "snr_db": float(snr.clamp(max=IDENTICAL_DB).mean()),
    }


@torch.no_grad()
def measure_sensitivity(
    denoiser: nn.Module,
    data: CalibrationSet,
    inputs: Mapping[str, Tensor],
    recipe: Recipe,
    *,
    roles: Mapping[str, Role],
    bits: Sequence[Bits],
    pairs: Pairs,
    finished: Mapping[str, Entry],
    after_layer: Callable[[Entry, int, int], None],
    timeless: Collection[str] = (),
) -> list[Entry]:
    """Quantize each layer alone, to each of `bits`.

    Args:
        denoiser: Full-precision diffusers module; its layers are changed and restored.
        data: Recorded trajectories.
        inputs: What each layer was given, from `layer_inputs`.
        recipe: Guidance scale, and whether scales are time-aware and channel-wise.
        roles: The part that each layer plays.
        bits: What each layer is quantized to.
        pairs: Which predictions are compared.
        finished: Entries that are there already, by layer.
        after_layer: Told each entry, and how many of how many layers are done.
        timeless: Layers that the timestep does not reach, which have one activation scale in any case.

    Returns:
        One entry a layer, in module order.
    """
    context = TimestepContext(data.boundaries())
    insert(denoiser, {}, context)
    layers = quantizable_layers(denoiser)
    macs = count_macs(denoiser, data)
    reference = predict(denoiser, data, pairs, recipe.guidance_scale)
    entries = []
    for done, (name, layer) in enumerate(layers.items(), start=1):
        entry = finished.get(name)
        if entry is None:
            damage = {}
            own = for_layer(recipe, name, timeless)
            for wanted, weight, quantizer in quantized_parts(layer, inputs[name], own, bits):
                with quantized_alone(layer, weight, quantizer, context):
                    prediction = predict(denoiser, data, pairs, recipe.guidance_scale)
                damage[str(wanted)] = damage_between(reference, prediction, pairs.steps)
            entry = {
                "name": name,
                "role": roles[name],
                "outlet": isinstance(roles, Roles) and name in roles.outlets,
                "weights": layer.weight.numel(),
                "macs": macs[name],
                "damage": damage,
            }
        entries.append(entry)
        after_layer(entry, done, len(layers))
    return entries


def quantized_parts(
    layer: Quantizable, inputs: Tensor, recipe: Recipe, bits: Sequence[Bits]
) -> Iterator[tuple[Bits, Tensor | None, ActivationQuantizer | None]]:
    """For each of `bits` the quantized weight and the quantizer of the input, either None where it stays in float.

    An activation that is quantized alone takes the channel row that it would have beside 8-bit weights.
    """
    qparams = {}
    for wanted in bits:
        if wanted.activation is None:
            assert wanted.weight is not None
            scale = affine.search_weight_scale(layer.weight, wanted.weight)
            yield wanted, rounded_weight(layer.weight, scale, wanted.weight, None), None
            continue
        both = (wanted.weight or 8, wanted.activation)
        if both not in qparams:
            qparams[both] = initialize_layer(
                layer,
                inputs,
                *both,
                method="search",
                time_aware=recipe.time_aware,
                channel_wise=recipe.channel_wise,
                migration_exponent=recipe.migration_exponent,
            )
        found = qparams[both]
        assert found.group_scale is not None
        weight = None
        if wanted.weight is not None:
            weight = rounded_weight(layer.weight, found.weight_scale, wanted.weight, found.row)
        quantizer = ActivationQuantizer(
            found.group_scale, found.qmin, found.qmax, row=found.row, channel_axis=channel_axis(layer)
        )
        yield wanted, weight, quantizer


def rounded_weight(weight: Tensor, scale: Tensor, bits: int, row: Tensor | None) -> Tensor:
    """The values that a quantized weight stands for, the channel row taken out again.

    Args:
        weight: [c_out, c_in, ...].
        scale: [c_out].
        bits: 4 or 8.
        row: [c_in] or None.
    """
    factor = torch.ones(()) if row is None else channel_shape(row, weight.ndim, 1)
    per_channel = channel_shape(scale, weight.ndim, 0)
    return affine.fake_quantize(weight * factor, per_channel, *weight_bounds(bits)) / factor


@contextlib.contextmanager
def quantized_alone(
    layer: Quantizable,
    weight: Tensor | None,
    quantizer: ActivationQuantizer | None,
    context: TimestepContext,
) -> Iterator[None]:
    """`layer` with another weight and a quantized input while the body runs; restored exactly, whatever happens."""
    original = layer.weight.data
    handle = None
    try:
        if weight is not None:
            layer.weight.data = weight
        if quantizer is not None:
            handle = layer.register_forward_pre_hook(functools.partial(_quantize_input, quantizer, context))
        yield
    finally:
        layer.weight.data = original
        if handle is not None:
            handle.remove()


def _quantize_input(
    quantizer: ActivationQuantizer, context: TimestepContext, layer: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    x, unscale = quantizer(args[0], context.group)
    if unscale is not None:
        x = x * unscale
    if quantizer.row is not None:
        x = x * channel_shape(quantizer.row, x.ndim, quantizer.channel_axis)
    return (x, *args[1:])


def count_macs(denoiser: nn.Module, data: CalibrationSet) -> dict[str, int]:
    """Multiplications and additions of each layer in a forward pass of one image's one guidance branch."""
    macs: dict[str, int] = {}
    rows = 1

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def count(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            weight: Tensor = module.weight  # type: ignore[assignment]
            # Each output channel of each position takes one row of the weight. Layers may run more than once.
            macs[name] = macs.get(name, 0) + output.numel() // weight.shape[0] * weight.numel() // rows

        return count

    handles = [
        layer.register_forward_hook(hook(name)) for name, layer in quantizable_layers(denoiser).items()
    ]
    try:
        prompt = torch.zeros(1, dtype=torch.int64)
        rows = data.batch(prompt, prompt)[0].shape[0]
        run_pairs(denoiser, data, prompt, prompt)
    finally:
        for handle in handles:
            handle.remove()
    return macs

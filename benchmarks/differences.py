"""What each deliberate difference from the published quantizers costs, against a torch version faithful to them.

One kind of tensor is quantized at a time, everything else stays in full precision, nothing is finetuned; both sides get
the same calibration data. The damage is what the network's output loses on full-precision trajectories.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import published
from benchmarks.environment import header
from benchmarks.settings import MODEL, Settings
from benchmarks.tables import Table, number
from quest_deploy.metrics import mean_db, snr_db
from quest_deploy.model.components import predict
from quest_deploy.model.load import LoadedModel, load_model
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize import affine, calibrate
from quest_deploy.quantize.attention import PROBABILITIES, insert_attention
from quest_deploy.quantize.calibrate import EXTREME_ROWS, CalibrationSet
from quest_deploy.quantize.grid import channel_shape, weight_bounds
from quest_deploy.quantize.initialize import initialize_layer
from quest_deploy.quantize.insert import channel_axis, insert, quantizable_layers
from quest_deploy.quantize.layers import Quantizable, TimestepContext
from quest_deploy.quantize.operands import (
    VALUES_PER_STEP,
    AttentionBits,
    collect_operands,
    initialize_operands,
)
from quest_deploy.quantize.parts import layer_inputs
from quest_deploy.quantize.trace import trace

NAME = "differences"
PROMPTS, CALIBRATION_PROMPTS = 16, 32
POSITIONS, PROMPTS_PER_STEP = 512, 8
SOFTMAX_CODES = 255

Weights = Callable[[Quantizable], Tensor]
Quantize = Callable[[Tensor, int], Tensor]
"""(a layer's input, timestep group) -> what its weight is multiplied with."""
Inputs = Callable[[str, Quantizable], Quantize]


def run(settings: Settings) -> dict[str, Any]:
    """Measure every difference, both ways."""
    model = load_model(MODEL)
    heldout, data, inputs = recorded(model, settings)
    quantizers = Quantizers(inputs)
    rows = []
    for what, sides in differences(quantizers, data.boundaries()):
        print(f"\n{what}", flush=True)
        figures = {side: damage(change(model.denoiser), heldout) for side, change in sides.items()}
        rows.append({"what": what, **figures})
    ours = deployable_softmax(model.denoiser, data, settings.seed)
    row = {
        "what": "softmax on 128 codes, a scale for each attention and timestep, instead of 256 codes",
        "ours": damage(ours, heldout),
    }
    with published_softmax():
        row["published"] = damage(model.denoiser, heldout)
    rows.append(row)
    return {
        **header(settings),
        "prompts": heldout.num_prompts,
        "calibration_prompts": data.num_prompts,
        "layers": len(inputs),
        "layers_whose_range_misses_zero": quantizers.without_zero(),
        "rows": rows,
    }


def recorded(
    model: LoadedModel, settings: Settings
) -> tuple[CalibrationSet, CalibrationSet, dict[str, Tensor]]:
    """Full-precision trajectories of held-out prompts and of calibration prompts, and layers' inputs on the latter."""
    few = settings.quick
    heldout = _record(model, settings.prompts[: 2 if few else PROMPTS], settings, settings.noise_seeds[0])
    prompts = load_prompts(default="calibration")[: 2 if few else CALIBRATION_PROMPTS]
    data = _record(model, prompts, settings, settings.seed)
    inputs = layer_inputs(
        model,
        trace(model),
        data,
        seed=settings.seed,
        prompts_per_step=PROMPTS_PER_STEP,
        positions=POSITIONS,
    )
    return heldout, data, inputs


def _record(model: LoadedModel, prompts: Sequence[str], settings: Settings, seed: int) -> CalibrationSet:
    return calibrate.record_trajectories(
        model,
        prompts,
        steps=settings.denoising_steps,
        guidance_scale=settings.guidance_scale,
        seed=seed,
        batch_size=settings.batch_size,
    )


@torch.no_grad()
def damage(denoiser: nn.Module, data: CalibrationSet) -> float:
    """Noise SNR of the output in dB: mean over steps, prompts and branches."""
    figures = []
    for step in range(data.timesteps.numel()):
        prompt = torch.arange(data.num_prompts)
        sample, timestep, conditioning, target = data.batch(prompt, torch.full_like(prompt, step))
        figures.append(snr_db(target, predict(denoiser, sample, timestep[:1], conditioning)))
    return round(mean_db(torch.stack(figures)), 3)


class Quantizers:
    """Both sides' quantizers of a layer, from samples of its input by name, [G, s + 2, c]."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        self.inputs = inputs

    def without_zero(self) -> int:
        """In how many layers some timestep's values all have one sign."""
        found = 0
        for samples in self.inputs.values():
            flat = samples.flatten(1)
            found += bool(((flat.amin(1) > 0) | (flat.amax(1) < 0)).any())
        return found

    def published(self, bits: int, *, by_channel: bool = False, with_zero: bool = True) -> Inputs:
        """A grid for each timestep group, and for each channel where asked; all values at 8 bits, searched below."""

        def make(name: str, layer: Quantizable) -> Quantize:
            samples = self.inputs[name] if bits == 8 else self.inputs[name][:, :-EXTREME_ROWS]
            low, high = published.ranges(
                samples, bits, by_channel=by_channel, with_zero=with_zero, search=bits < 8
            )

            def quantize(x: Tensor, group: int) -> Tensor:
                ends = (
                    channel_shape(end[group, 0], x.ndim, channel_axis(layer)) if by_channel else end[group]
                    for end in (low, high)
                )
                return published.asymmetric(
                    x, *(end if by_channel else end.reshape(()) for end in ends), bits
                )

            return quantize

        return make

    def deployable(self, bits: int, *, row: bool = False) -> Inputs:
        """This project's grid: a scale for each timestep group, and one row of channels where asked."""

        def make(name: str, layer: Quantizable) -> Quantize:
            qparams = initialize_layer(
                layer, self.inputs[name], 8, bits, method="search", time_aware=True, channel_wise=row
            )
            scale, bounds = qparams.group_scale, (qparams.qmin, qparams.qmax)
            assert scale is not None
            if qparams.row is None:
                return lambda x, group: affine.fake_quantize(x, scale[group], *bounds)
            divisor = qparams.row

            def quantize(x: Tensor, group: int) -> Tensor:
                by = channel_shape(divisor, x.ndim, channel_axis(layer))
                return affine.fake_quantize(x / by, scale[group], *bounds) * by

            return quantize

        return make


def symmetric_weight(bits: int) -> Weights:
    """This project's grid of weights."""

    def quantize(layer: Quantizable) -> Tensor:
        scale = affine.search_weight_scale(layer.weight.data, bits)
        return affine.fake_quantize(
            layer.weight.data, channel_shape(scale, layer.weight.ndim, 0), *weight_bounds(bits)
        )

    return quantize


def asymmetric_weight(bits: int) -> Weights:
    """The published one."""
    return lambda layer: published.weight(layer.weight.data, bits)


def differences(
    quantizers: Quantizers, boundaries: Tensor
) -> Iterator[tuple[str, dict[str, Callable[[nn.Module], nn.Module]]]]:
    """Name of each difference, and how either side changes a denoiser."""

    def inputs(quantize: Inputs) -> Callable[[nn.Module], nn.Module]:
        return lambda denoiser: simulate(denoiser, boundaries, inputs=quantize)

    def weights(quantize: Weights) -> Callable[[nn.Module], nn.Module]:
        return lambda denoiser: simulate(denoiser, boundaries, weights=quantize)

    for bits in (4, 8):
        yield (
            f"symmetric instead of asymmetric {bits}-bit weights",
            {"ours": weights(symmetric_weight(bits)), "published": weights(asymmetric_weight(bits))},
        )
    yield (
        "symmetric instead of asymmetric 8-bit activations",
        {"ours": inputs(quantizers.deployable(8)), "published": inputs(quantizers.published(8))},
    )
    yield (
        "4-bit activations, clip bounds inside int8 instead of a zero-point",
        {"ours": inputs(quantizers.deployable(4)), "published": inputs(quantizers.published(4))},
    )
    yield (
        "4-bit activations by channel, rank-1 row instead of a scale inside the sum",
        {
            "ours": inputs(quantizers.deployable(4, row=True)),
            "published": inputs(quantizers.published(4, by_channel=True)),
        },
    )
    yield (
        "4-bit ranges that always contain 0",
        {
            "ours": inputs(quantizers.published(4)),
            "published": inputs(quantizers.published(4, with_zero=False)),
        },
    )


def simulate(
    denoiser: nn.Module, boundaries: Tensor, *, weights: Weights | None = None, inputs: Inputs | None = None
) -> nn.Module:
    """A copy of `denoiser` with other weights, and with hooks that quantize what enters its layers."""
    result = copy.deepcopy(denoiser)
    context = TimestepContext(boundaries)
    insert(result, {}, context)
    for name, layer in quantizable_layers(result).items():
        if weights is not None:
            layer.weight.data = weights(layer)
        if inputs is not None:
            layer.register_forward_pre_hook(_input_hook(inputs(name, layer), context))
    return result


def _input_hook(quantize: Quantize, context: TimestepContext) -> Any:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        # One timestep at a time is measured, so that all samples are of one group.
        return (quantize(args[0], int(context.group[0])), *args[1:])

    return hook


def deployable_softmax(denoiser: nn.Module, data: CalibrationSet, seed: int) -> nn.Module:
    """A copy of `denoiser` with this project's quantizers of all probabilities, as finetuning starts from them."""
    samples = collect_operands(
        denoiser, data, prompts_per_step=PROMPTS_PER_STEP, values=VALUES_PER_STEP, seed=seed
    )
    every = AttentionBits(operands=8, probabilities=True, max_keys=sys.maxsize)
    operands = initialize_operands(samples, every, time_aware=True)
    result, context = copy.deepcopy(denoiser), TimestepContext(data.boundaries())
    insert(result, {}, context)
    probabilities = {name: one for name, one in operands.items() if name.endswith(f".{PROBABILITIES}")}
    insert_attention(result, probabilities, context)
    return result


@contextmanager
def published_softmax() -> Iterator[None]:
    """While the body runs, attention computes its probabilities openly, on 256 codes from 0 to 1."""
    original = F.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        return affine.fake_quantize(scores.softmax(dim=-1), 1 / SOFTMAX_CODES, 0, SOFTMAX_CODES) @ value

    F.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


def tables(result: dict[str, Any]) -> list[Table]:
    """One row for each difference."""
    return [
        Table(
            title="Differences from the published quantizers",
            columns=("difference", "deployable, dB", "published, dB", "difference, dB"),
            rows=tuple(
                (
                    row["what"],
                    number(row["ours"]),
                    number(row["published"]),
                    f"{row['ours'] - row['published']:+.2f}",
                )
                for row in result["rows"]
            ),
            note=f"Noise SNR of the network's output over {result['prompts']} held-out prompts where that one kind of "
            "tensor is quantized in every layer, first and last included, and everything else is in full precision; "
            f"nothing is finetuned. Ranges come from {result['calibration_prompts']} calibration prompts. "
            f"{result['layers_whose_range_misses_zero']} of {result['layers']} layers have a timestep whose inputs all "
            "have one sign.",
        )
    ]

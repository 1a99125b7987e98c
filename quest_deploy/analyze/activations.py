"""How the inputs of each layer are distributed, timestep by timestep.

QuEST (arXiv 2402.03666, section 4) argues from three imbalances: rare large values, channels of other sizes than most,
and ranges that change with the timestep. Here each is a number for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.insert import channel_axis, quantizable_layers, quantized_layers
from quest_deploy.quantize.layers import ActivationQuantizer, QuantizedLayer
from quest_deploy.quantize.sensitivity import run_pairs

PERCENTILES = (0.1, 1.0, 50.0, 99.0, 99.9)
SERIES = ("min", "max", *(f"p{p:g}" for p in PERCENTILES), "mean", "std", "kurtosis", "channel_imbalance")
MAX_QUANTILE_VALUES = 1 << 15
KEPT_VALUES = 4096
HISTOGRAM_BINS = 60
TINY = 1e-12
SMALLEST = torch.finfo(torch.float32).tiny
Report = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Activations:
    """The inputs of one layer; of a layer that runs more than once in a call, those of the first run.

    Attributes:
        series: A number for each timestep, by the names of :data:`SERIES`; a quantized layer adds `clipped`, the share
            of values outside its clip bounds.
        largest: float32 [c_in]: each channel's largest magnitude over all timesteps.
        row: float32 [c_in], the row that a quantized layer divides its input by, or None.
        kept: Some values at the timesteps whose histograms may be drawn, by step.
    """

    series: dict[str, list[float]] = field(default_factory=dict)
    largest: Tensor
    row: Tensor | None
    kept: dict[int, Tensor] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The series, and over all timesteps `channel_imbalance`, `timestep_imbalance` and the median kurtosis.

        ``quantized_channel_imbalance`` is what is left of the channels' imbalance behind the layer's row.
        """
        ranges = [high - low for low, high in zip(self.series["min"], self.series["max"], strict=True)]
        result: dict[str, Any] = {
            "by_timestep": {
                name: [round_figure(value) for value in values] for name, values in self.series.items()
            },
            "channel_imbalance": round_figure(imbalance(self.largest)),
            "timestep_imbalance": round_figure(max(ranges) / max(min(ranges), TINY)),
            "kurtosis": round_figure(float(torch.tensor(self.series["kurtosis"]).median())),
        }
        if self.row is not None:
            result["quantized_channel_imbalance"] = round_figure(imbalance(self.largest / self.row))
        return result


@torch.no_grad()
def collect_activations(
    denoiser: nn.Module,
    data: CalibrationSet,
    *,
    keep_steps: Sequence[int],
    prompts_per_step: int,
    seed: int,
    report: Report = lambda completed, total: None,
) -> dict[str, Activations]:
    """Statistics of every layer's input, in the order in which the layers run.

    Args:
        denoiser: Full-precision diffusers module or one with quantized layers.
        data: Recorded full-precision trajectories, whose latents either is given.
        keep_steps: Steps at which some values are kept.
        prompts_per_step: How many trajectories are run at each timestep.
        seed: For the choice of kept values.
        report: Called after each timestep.
    """
    generator = torch.Generator().manual_seed(seed)
    result: dict[str, Activations] = {}
    step = 0

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def observe(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].movedim(channel_axis(layer), -1).flatten(0, -2)
            largest = rows.abs().amax(dim=0)
            found = result.get(name)
            if found is None:
                row = layer.row() if isinstance(layer, QuantizedLayer) else None
                found = result[name] = Activations(largest=largest.clone(), row=row)
            torch.maximum(found.largest, largest, out=found.largest)
            if len(found.series.get("min", ())) > step:
                return
            for key, value in describe(rows, largest, generator).items():
                found.series.setdefault(key, []).append(value)
            if isinstance(layer, QuantizedLayer) and layer.quantizer is not None:
                share = clipped_share(args[0], layer.quantizer, layer.context.group)
                found.series.setdefault("clipped", []).append(share)
            if step in keep_steps:
                found.kept[step] = subsample(rows.flatten(), KEPT_VALUES, generator)

        return observe

    layers: dict[str, nn.Module] = {**quantizable_layers(denoiser), **quantized_layers(denoiser)}
    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        steps = data.timesteps.numel()
        prompt = torch.arange(min(prompts_per_step, data.num_prompts))
        for step in range(steps):
            run_pairs(denoiser, data, prompt, torch.full_like(prompt, step))
            report(step + 1, steps)
    finally:
        for handle in handles:
            handle.remove()
    return result


def describe(rows: Tensor, largest: Tensor, generator: torch.Generator) -> dict[str, float]:
    """One timestep's numbers, by the names of :data:`SERIES`; a Gaussian's kurtosis is 3.

    Args:
        rows: float32 [m, c].
        largest: float32 [c], each channel's largest magnitude.
        generator: For the values that percentiles are taken of, where there are very many.
    """
    values = rows.flatten()
    wanted = torch.tensor(PERCENTILES, dtype=values.dtype) / 100
    quantiles = torch.quantile(subsample(values, MAX_QUANTILE_VALUES, generator), wanted).tolist()
    mean = values.mean()
    centered = values - mean
    variance = centered.square().mean()
    # Of the standardized values: fourth powers of small ones are nothing.
    standard = centered / variance.sqrt().clamp_min(SMALLEST)
    return {
        "min": float(values.min()),
        "max": float(values.max()),
        **{f"p{p:g}": value for p, value in zip(PERCENTILES, quantiles, strict=True)},
        "mean": float(mean),
        "std": float(variance.sqrt()),
        "kurtosis": float(standard.square().square().mean()),
        "channel_imbalance": imbalance(largest),
    }


def imbalance(largest: Tensor) -> float:
    """The largest channel's magnitude over the median channel's: 1 where all are alike."""
    return float(largest.max() / largest.median().clamp_min(TINY))


def clipped_share(x: Tensor, quantizer: ActivationQuantizer, group: Tensor) -> float:
    """Share of the layer's input that the quantizer clips."""
    shape = (-1, *[1] * (x.ndim - 1))
    scale = quantizer.group_scale()
    scale = scale.index_select(0, group).reshape(shape) if scale.numel() > 1 else scale
    if quantizer.row is not None:
        x = x / quantizer.row.reshape(
            [-1 if axis == quantizer.channel_axis % x.ndim else 1 for axis in range(x.ndim)]
        )
    codes = (x / scale).round()
    return float(((codes < quantizer.qmin) | (codes > quantizer.qmax)).float().mean())


def subsample(values: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """At most `count` of the values [n]."""
    if values.numel() <= count:
        return values.clone()
    return values[torch.randint(values.numel(), (count,), generator=generator)]


def histograms(layers: dict[str, Activations], names: Sequence[str]) -> dict[str, Any]:
    """Histograms of the kept values of some layers: `edges`, and by step the share of values in each bin.

    The edges of a layer are common to its steps and leave out the rarest thousandth of the values. Layers that were not
    seen are left out.
    """
    result: dict[str, Any] = {}
    for name in filter(layers.__contains__, names):
        kept = layers[name].kept
        low, high = torch.cat(list(kept.values())).quantile(torch.tensor([0.0005, 0.9995])).tolist()
        edges = torch.linspace(low, max(high, low + TINY), HISTOGRAM_BINS + 1)
        result[name] = {
            "edges": [round_figure(value) for value in edges.tolist()],
            "share_by_step": {
                str(step): [
                    round_figure(value)
                    for value in (torch.histogram(values, edges).hist / values.numel()).tolist()
                ]
                for step, values in kept.items()
            },
        }
    return result


def round_figure(value: float) -> float:
    """Five significant digits, so that the JSON can be read."""
    return float(f"{value:.5g}")

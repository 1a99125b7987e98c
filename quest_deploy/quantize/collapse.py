"""One activation scale in place of a scale for each timestep group, where the noise prediction hardly notices.

A quantizer with groups costs a deployed network two passes over memory: its input times r, and the layer's output
times 1 / r (DESIGN §2). Quantizers whose scales hardly change with the timestep are given one scale, the largest of
theirs so that nothing is clipped that was not before: those of smallest spread first, as many of them as leave the
noise SNR, on prompts that took no part in training, within a limit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.metrics import IDENTICAL_DB, snr_db
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.layers import ActivationQuantizer
from quest_deploy.quantize.sensitivity import BATCH_PAIRS, Pairs, run_pairs

STEPS = 8


@dataclass(frozen=True, kw_only=True)
class Collapsed:
    """What was done.

    Attributes:
        quantizers: How many have groups of different scale.
        collapsed: How many of them were given one scale.
        snr_db: Noise SNR of the network before, in dB.
        collapsed_snr_db: And after.
    """

    quantizers: int
    collapsed: int
    snr_db: float
    collapsed_snr_db: float

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {key: round(value, 4) for key, value in asdict(self).items()}


def grouped(denoiser: nn.Module) -> dict[str, ActivationQuantizer]:
    """Quantizers with more than one group, by name; one that several layers share is there once."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, ActivationQuantizer) and module.num_groups > 1
    }


def spread(scales: Tensor) -> float:
    """How many times the smallest of some scales the largest is."""
    return float(scales.max() / scales.min())


@torch.no_grad()
def collapse_groups(
    student: nn.Module,
    teacher: nn.Module,
    data: CalibrationSet,
    prompts: Tensor,
    *,
    limit_db: float,
    progress: Callable[[int, int], None] = lambda completed, total: None,
    at_once: int = BATCH_PAIRS,
) -> Collapsed:
    """Give as many quantizers one scale as cost at most `limit_db` together.

    Args:
        student: Denoiser with quantized layers, frozen or not; changed.
        teacher: The same in full precision.
        data: Recorded trajectories.
        prompts: int64 [p], the trajectories that judge.
        limit_db: How much of the noise SNR may be lost, in dB.
        progress: Told how many of how many measurements are done.
        at_once: The most pairs that are run together.
    """
    steps = torch.linspace(0, data.timesteps.numel() - 1, min(STEPS, data.timesteps.numel())).round().long()
    pairs = Pairs(
        prompt=prompts.repeat(steps.numel()),
        step=steps.repeat_interleave(prompts.numel()),
        steps=steps.numel(),
    )
    reference = _outputs(teacher, data, pairs, at_once)

    def measured() -> float:
        found = snr_db(reference, _outputs(student, data, pairs, at_once)).clamp(max=IDENTICAL_DB)
        return float(found.mean())

    quantizers = grouped(student)
    learned = {name: quantizer.group_scale().clone() for name, quantizer in quantizers.items()}
    spreads = {name: spread(scales) for name, scales in learned.items()}
    # Quantizers of equal spread may be copies that read one tensor, and stay copies.
    limits = sorted(set(spreads.values()))
    total = 1 + len(limits).bit_length()
    before = measured()
    progress(1, total)
    best, snr = 0, before
    low, high, done = 1, len(limits), 1
    while low <= high:
        middle = (low + high) // 2
        _apply(quantizers, learned, _up_to(spreads, limits[middle - 1]))
        found = measured()
        done += 1
        progress(done, total)
        if found >= before - limit_db:
            best, snr, low = middle, found, middle + 1
        else:
            high = middle - 1
    progress(total, total)
    chosen = _up_to(spreads, limits[best - 1]) if best else []
    _apply(quantizers, learned, chosen)
    return Collapsed(quantizers=len(quantizers), collapsed=len(chosen), snr_db=before, collapsed_snr_db=snr)


def _up_to(spreads: dict[str, float], limit: float) -> list[str]:
    return [name for name, found in spreads.items() if found <= limit]


def _apply(
    quantizers: dict[str, ActivationQuantizer], learned: dict[str, Tensor], chosen: Sequence[str]
) -> None:
    for name, quantizer in quantizers.items():
        scales = learned[name]
        quantizer.set_group_scale(scales.max().reshape(1) if name in chosen else scales)


def _outputs(denoiser: nn.Module, data: CalibrationSet, pairs: Pairs, at_once: int) -> Tensor:
    """What the network says to all pairs, rows of guidance branches one after the other."""
    chunks = zip(pairs.prompt.split(at_once), pairs.step.split(at_once), strict=True)
    outputs = [run_pairs(denoiser, data, prompt, step) for prompt, step in chunks]
    return torch.cat(outputs, dim=1).flatten(0, 1)

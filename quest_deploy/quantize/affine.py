"""Scales from data: min-max, percentile and least-error searches. Stateless: tensors in, scales out."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from quest_deploy.quantize.grid import activation_bounds, weight_bounds

PERCENTILES = (0.999, 0.9999, 0.99999, 1.0)
MAX_SEARCH_VALUES = 1 << 16
WEIGHT_SEARCH_STEPS = 80
WEIGHT_SEARCH_NORM = 2.4
MIN_SCALE = 1e-8


@dataclass(frozen=True)
class Grid:
    """One per-tensor activation grid."""

    scale: float
    qmin: int
    qmax: int


def fake_quantize(x: Tensor, scale: Tensor | float, qmin: int, qmax: int) -> Tensor:
    """s * clamp(rne(x / s)), for searches; `scale` broadcasts to `x`."""
    return torch.clamp(torch.round(x / scale), qmin, qmax) * scale


def minmax_weight_scale(weight: Tensor, bits: int) -> Tensor:
    """float32 [c_out]: the largest magnitude of each output channel on the largest code.

    Args:
        weight: [c_out, ...].
        bits: 4 or 8.
    """
    largest = weight.flatten(1).abs().amax(dim=1)
    return (largest / weight_bounds(bits)[1]).clamp_min(MIN_SCALE)


def search_weight_scale(weight: Tensor, bits: int, *, steps: int = WEIGHT_SEARCH_STEPS) -> Tensor:
    """float32 [c_out]: for each output channel the shrunken range of least L2.4 error (80 steps of 1 %).

    Args:
        weight: [c_out, ...].
        bits: 4 or 8.
        steps: How many ranges, from the whole down to a fifth of it, are tried.
    """
    flat = weight.flatten(1)
    full = minmax_weight_scale(weight, bits)
    best, best_error = full, torch.full_like(full, torch.inf)
    for step in range(steps):
        scale = full * (1 - 0.8 * step / steps)
        error = (fake_quantize(flat, scale[:, None], *weight_bounds(bits)) - flat).abs_()
        error = error.pow_(WEIGHT_SEARCH_NORM).sum(dim=1)
        better = error < best_error
        best, best_error = torch.where(better, scale, best), torch.where(better, error, best_error)
    return best.clamp_min(MIN_SCALE)


def minmax_grid(x: Tensor, bits: int) -> Grid:
    """The grid that covers every value of `x`, and 0."""
    qmin, qmax, scale = activation_bounds(float(x.min()), float(x.max()), bits)
    return Grid(scale, qmin, qmax)


def search_grid(x: Tensor, bits: int) -> Grid:
    """The grid of least squared error among the whole, percentile and shrunken ranges of `x`.

    Args:
        x: [..., c], channels last.
        bits: 4 or 8.
    """
    everything = x.flatten()
    low, high = float(everything.min()), float(everything.max())
    stride = everything.numel() // MAX_SEARCH_VALUES + 1
    while math.gcd(stride, x.shape[-1]) > 1:  # else it visits some channels alone
        stride += 1
    values = everything[::stride]
    wanted = torch.tensor([end for p in PERCENTILES for end in (1 - p, p)], dtype=values.dtype)
    ends = torch.quantile(values, wanted).tolist()
    candidates = list(zip(ends[::2], ends[1::2], strict=True))
    candidates += [(low * shrink, high * shrink) for shrink in (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)]
    # One-sided tails (SiLU, GELU) need their two ends shrunk separately.
    candidates += [(low, high * shrink) for shrink in (0.8, 0.6, 0.45, 0.3)]
    grids = [
        Grid(scale, qmin, qmax) for qmin, qmax, scale in (activation_bounds(*c, bits) for c in candidates)
    ]
    errors = [float((fake_quantize(values, g.scale, g.qmin, g.qmax) - values).square().mean()) for g in grids]
    return grids[errors.index(min(errors))]


def search_group_scale(
    x: Tensor, grid: Grid, *, low: float = 0.3, high: float = 1.7, steps: int = 29
) -> Tensor:
    """float32 [G]: for each timestep group the scale of least squared error, clip bounds unchanged.

    Args:
        x: float32 [G, ...].
        grid: The common grid, around whose scale is searched.
        low: Smallest multiple of its scale.
        high: Largest multiple.
        steps: How many multiples are tried.
    """
    flat = x.flatten(1)
    best = torch.full((flat.shape[0],), grid.scale)
    best_error = torch.full_like(best, torch.inf)
    for multiple in torch.linspace(low, high, steps).tolist():
        scale = grid.scale * multiple
        error = (fake_quantize(flat, scale, grid.qmin, grid.qmax) - flat).square_().mean(dim=1)
        better = error < best_error
        best = torch.where(better, torch.full_like(best, scale), best)
        best_error = torch.where(better, error, best_error)
    return best.clamp_min(MIN_SCALE)


def minmax_group_scale(x: Tensor, grid: Grid) -> Tensor:
    """float32 [G]: for each timestep group the least scale whose clip bounds hold every value.

    Args:
        x: float32 [G, ...].
        grid: The common grid, whose clip bounds are kept.
    """
    flat = x.flatten(1)
    scale = flat.amax(dim=1) / grid.qmax if grid.qmax else torch.zeros(flat.shape[0])
    if grid.qmin:
        scale = torch.maximum(scale, flat.amin(dim=1) / grid.qmin)
    # A group in which nothing happens must not have a scale that makes the others' multiplier vanish.
    return torch.maximum(scale, scale.max() * 1e-3).clamp_min(MIN_SCALE)


def migration_row(x: Tensor, weight: Tensor, exponent: float) -> Tensor:
    """float32 [c_in]: b_c = max|x_c|^a / max|W_c|^(1-a), geometric mean 1 (SmoothQuant, arXiv 2211.10438, equation 4).

    Args:
        x: [..., c_in].
        weight: [c_out, c_in, ...].
        exponent: a in (0, 1]: how much of the difficulty moves from the activations to the weights.
    """
    activation = x.flatten(0, -2).abs().amax(dim=0).clamp_min(1e-5)
    by_channel = weight.transpose(0, 1).flatten(1).abs().amax(dim=1).clamp_min(1e-5)
    log_row = exponent * activation.log() - (1 - exponent) * by_channel.log()
    row: Tensor = (log_row - log_row.mean()).exp()
    return row.clamp(1e-3, 1e3)

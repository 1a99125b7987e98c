"""The published quantizers, as torch arithmetic that no runtime executes: what the deployable ones are compared with.

Written after the formulas of QuEST's and Q-Diffusion's papers: x_q = s (clamp(round(x / s) + z, 0, 2^b - 1) - z) with a
free zero-point z. `parts` are the tensors that share one grid: leading axes are kept, the others are searched together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_deploy.quantize.affine import WEIGHT_SEARCH_NORM, WEIGHT_SEARCH_STEPS

SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5, 0.4)
LEAST_SCALE = 1e-8


def asymmetric(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """`x` on the grid of 2^bits codes from `low` to `high` (both broadcast), which need not contain 0."""
    levels = 2**bits - 1
    scale = ((high - low) / levels).clamp_min(LEAST_SCALE)
    zero_point = torch.round(-low / scale)
    return scale * (torch.clamp(torch.round(x / scale) + zero_point, 0, levels) - zero_point)


def weight(weight: Tensor, bits: int) -> Tensor:
    """[c_out, ...], asymmetric for each output channel: the shrunken range of least L2.4 error."""
    flat = weight.flatten(1)
    low, high = flat.amin(1, keepdim=True).clamp_max(0), flat.amax(1, keepdim=True).clamp_min(0)
    best, least = flat, torch.full_like(low, torch.inf)
    for step in range(WEIGHT_SEARCH_STEPS):
        shrink = 1 - 0.8 * step / WEIGHT_SEARCH_STEPS
        candidate = asymmetric(flat, low * shrink, high * shrink, bits)
        error = (candidate - flat).abs().pow(WEIGHT_SEARCH_NORM).sum(1, keepdim=True)
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    return best.reshape(weight.shape)


def ranges(x: Tensor, bits: int, *, by_channel: bool, with_zero: bool, search: bool) -> tuple[Tensor, Tensor]:
    """Ends of the range of each timestep group, and of each channel where asked.

    Args:
        x: Samples of a layer's input, [G, s, c].
        bits: Of the grid.
        by_channel: One range for each channel, else one for all.
        with_zero: Whether the range is widened to contain 0.
        search: Whether the shrunken range of least squared error is taken, else all of it.

    Returns:
        Low and high end, [G, 1, c] or [G, 1, 1].
    """
    axes = (1,) if by_channel else (1, 2)
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    if with_zero:
        low, high = low.clamp_max(0), high.clamp_min(0)
    if not search:
        return low, high
    best_low, best_high, least = low, high, torch.full_like(low, torch.inf)
    for shrink in SHRINKS:
        near, far = (low * shrink, high * shrink) if with_zero else _shrunken(low, high, shrink)
        error = (asymmetric(x, near, far, bits) - x).square().mean(axes, keepdim=True)
        better = error < least
        best_low, best_high = torch.where(better, near, best_low), torch.where(better, far, best_high)
        least = torch.minimum(error, least)
    return best_low, best_high


def _shrunken(low: Tensor, high: Tensor, shrink: float) -> tuple[Tensor, Tensor]:
    """A range shrunk around its middle."""
    middle, half = (low + high) / 2, (high - low) / 2 * shrink
    return middle - half, middle + half

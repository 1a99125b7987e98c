"""How far two tensors, two sets of integer codes or two images are apart.

Pure functions. A decibel figure is +inf where the two are equal; JSON has no infinity, so reports write "identical",
and means count such a sample as :data:`IDENTICAL_DB`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

IDENTICAL_DB = 200.0
"""What an exact match counts in a mean: above all that float32 can show (one value off by one ulp is about 180 dB)."""

TOKEN_DIMENSIONS = (2, 3)
"""Of codes whose last axis is all that a token has; images have four."""

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5


def snr_db(reference: Tensor, candidate: Tensor) -> Tensor:
    """Signal-to-noise ratio of each sample, 10 log10(sum ref^2 / sum (ref - cand)^2).

    Args:
        reference: [n, ...].
        candidate: [n, ...].

    Returns:
        float64 [n]; +inf where the two are equal, NaN where either holds a NaN.
    """
    _same_shape(reference, candidate)
    signal = reference.double().flatten(1)
    error = signal - candidate.double().flatten(1)
    return _ratio_db(signal.square().sum(1), error.square().sum(1))


def psnr_db(reference: Tensor, candidate: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image with pixels in [0, 1], -10 log10(mean squared error).

    Args:
        reference: [n, c, h, w].
        candidate: [n, c, h, w].

    Returns:
        float64 [n]; +inf where the two are equal.
    """
    _same_shape(reference, candidate)
    error = (reference.double() - candidate.double()).flatten(1).square().mean(1)
    return _ratio_db(torch.ones_like(error), error)


def ssim(reference: Tensor, candidate: Tensor) -> Tensor:
    """Structural similarity of each image: Wang et al. 2004, Gaussian window 11x11 with sigma 1.5, K1 0.01, K2 0.03.

    Local statistics are weighted by the window and taken at its valid positions only, then averaged over positions and
    channels. (torchmetrics averages over a reflected border as well, which changes small images by several hundredths.)
    Images of fewer than 11 pixels get the largest window of odd size that fits.

    Args:
        reference: [n, c, h, w] in [0, 1].
        candidate: [n, c, h, w].

    Returns:
        float64 [n], 1 where the two are equal.
    """
    _same_shape(reference, candidate)
    window = min(SSIM_WINDOW, (min(reference.shape[-2:]) - 1) // 2 * 2 + 1)
    # In float64, since the local variances are differences of nearly equal sums.
    x, y = (image.double().flatten(0, 1)[:, None] for image in (reference, candidate))
    mean_x, mean_y, square_x, square_y, product = (
        _window_mean(values, window) for values in (x, y, x * x, y * y, x * y)
    )
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    variances = (square_x - mean_x**2) + (square_y - mean_y**2)
    contrast_structure = (2 * (product - mean_x * mean_y) + c2) / (variances + c2)
    return (luminance * contrast_structure).reshape(reference.shape[0], -1).mean(1)


def _window_mean(values: Tensor, window: int) -> Tensor:
    """Gaussian-weighted local mean of [n, 1, h, w] at the valid positions of the window."""
    offsets = torch.arange(window, dtype=values.dtype, device=values.device) - window // 2
    line = torch.exp(-(offsets**2) / (2 * SSIM_SIGMA**2))
    line = line / line.sum()
    rows = torch.nn.functional.conv2d(values, line.reshape(1, 1, -1, 1))
    return torch.nn.functional.conv2d(rows, line.reshape(1, 1, 1, -1))


def cosine(reference: Tensor, candidate: Tensor) -> Tensor:
    """Cosine of the angle between each pair of samples, float64 [n]."""
    _same_shape(reference, candidate)
    return torch.nn.functional.cosine_similarity(
        reference.double().flatten(1), candidate.double().flatten(1), dim=1
    )


@dataclass(frozen=True, kw_only=True)
class CodeFlips:
    """How many integer codes differ between two runtimes, and by how much at most."""

    places: int
    differing: int
    max_difference: int

    @property
    def fraction(self) -> float:
        """Share of the places whose codes differ."""
        return self.differing / self.places if self.places else 0.0

    def __add__(self, other: CodeFlips) -> CodeFlips:
        return CodeFlips(
            places=self.places + other.places,
            differing=self.differing + other.differing,
            max_difference=max(self.max_difference, other.max_difference),
        )


def code_flips(reference: Tensor, candidate: Tensor) -> CodeFlips:
    """Compare two int8 tensors of one shape, place by place.

    Tokens [..., tokens, c] of equal reference codes count once, and differ where one of them does: a prompt is padded
    with hundreds of tokens that are all the same computation, so that one tie would be counted as often.
    """
    _same_shape(reference, candidate)
    # int16: the difference of two int8 codes does not fit int8.
    difference = (reference.to(torch.int16) - candidate.to(torch.int16)).abs()
    if difference.ndim in TOKEN_DIMENSIONS and difference.numel():
        difference = _distinct(reference.flatten(0, -2), difference.flatten(0, -2))
    return CodeFlips(
        places=difference.numel(),
        differing=int(torch.count_nonzero(difference)),
        max_difference=int(difference.max()) if difference.numel() else 0,
    )


def _distinct(rows: Tensor, values: Tensor) -> Tensor:
    """The largest of `values` [n, c] among equal `rows` [n, c], once for each distinct row."""
    # Sorting numbers is faster than sorting rows; integers wrap, so equal rows have equal sums.
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(1 << 60, (rows.shape[1],), generator=generator, dtype=torch.int64)
    sums = (rows.cpu().to(torch.int64) * factors).sum(1)
    _, group = sums.unique(return_inverse=True)
    index = group.to(values.device)[:, None].expand_as(values)
    count = int(group.max()) + 1
    return values.new_zeros(count, values.shape[1]).scatter_reduce(0, index, values, "amax")


def mean_db(values: Tensor) -> float:
    """Mean of decibel figures in which an exact match counts as :data:`IDENTICAL_DB`; +inf where all match."""
    if bool(torch.isposinf(values).all()):
        return math.inf
    return float(values.clamp(max=IDENTICAL_DB).mean())


def paired_interval(
    differences: Tensor | Sequence[float],
    *,
    statistic: Literal["mean", "median"] = "mean",
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Percentile-bootstrap interval of the mean or median of paired differences.

    Args:
        differences: One finite number for each pair, [n].
        statistic: Of the differences.
        confidence: Coverage of the interval.
        resamples: Number of bootstrap samples.
        seed: Of the resampling.

    Returns:
        Low end, the statistic, high end. One pair tells nothing about spread: its ends are infinite.

    Raises:
        ValueError: there is no difference, or one is not finite.
    """
    values = torch.as_tensor(differences, dtype=torch.float64).flatten()
    if not values.numel() or not bool(torch.isfinite(values).all()):
        raise ValueError(f"paired_interval: got {values.tolist()}, expected one or more finite numbers")

    def of(samples: Tensor) -> Tensor:
        return samples.mean(-1) if statistic == "mean" else samples.quantile(0.5, dim=-1)

    middle = float(of(values))
    if values.numel() == 1:
        return -math.inf, middle, math.inf
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(values.numel(), (resamples, values.numel()), generator=generator)
    tail = (1 - confidence) / 2
    low, high = torch.quantile(
        of(values[picks]), torch.tensor([tail, 1 - tail], dtype=torch.float64)
    ).tolist()
    return low, middle, high


def _ratio_db(signal: Tensor, error: Tensor) -> Tensor:
    # An error of 0 is an exact match even where the signal is 0 too (0/0 would be NaN).
    ratio = 10 * (signal.log10() - error.log10())
    return torch.where(error == 0, torch.full_like(ratio, math.inf), ratio)


def _same_shape(reference: Tensor, candidate: Tensor) -> None:
    if reference.shape != candidate.shape:
        raise ValueError(
            f"got shapes {list(reference.shape)} and {list(candidate.shape)}, expected one shape"
        )


def share_low(count: int, total: int, *, z: float = 1.96) -> float:
    """Lower end of Wilson's score interval of a share (Wilson 1927), for 95 % as it stands.

    Args:
        count: How many have it.
        total: Of how many, at least 1.
        z: Standard normal quantile of the coverage.
    """
    share, spread = count / total, z * z / total
    middle = share + spread / 2
    half = math.sqrt(spread * (share * (1 - share) + spread / 4))
    return max(0.0, (middle - half) / (1 + spread))

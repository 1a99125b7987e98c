"""Searches for scales: each claim against the plain choice that it replaces."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quest_deploy.quantize import affine
from quest_deploy.quantize.grid import weight_bounds

QUICK = settings(max_examples=25, deadline=None)
BITS = st.sampled_from([4, 8])
SEEDS = st.integers(0, 9999)


def heavy_tailed(seed: int, *shape: int) -> Tensor:
    """Gaussian values, a few of them a hundred times as large."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return torch.where(torch.rand(shape, generator=generator) > 0.99, values * 100, values)


def weight_error(weight: Tensor, scale: Tensor, bits: int, power: float) -> Tensor:
    error = affine.fake_quantize(weight, scale[:, None], *weight_bounds(bits)) - weight
    return error.abs().pow(power).sum(dim=1)


def grid_error(x: Tensor, grid: affine.Grid) -> float:
    return float((affine.fake_quantize(x, grid.scale, grid.qmin, grid.qmax) - x).square().mean())


@QUICK
@given(seed=SEEDS, bits=BITS)
def test_minmax_scales_keep_every_weight_within_half_a_step(seed: int, bits: int) -> None:
    weight = heavy_tailed(seed, 4, 30)
    scale = affine.minmax_weight_scale(weight, bits)
    error = (affine.fake_quantize(weight, scale[:, None], *weight_bounds(bits)) - weight).abs()
    assert (error <= 0.5 * scale[:, None] * (1 + 1e-5)).all()


@QUICK
@given(seed=SEEDS, bits=BITS)
def test_the_weight_search_is_never_worse_than_min_max(seed: int, bits: int) -> None:
    weight = heavy_tailed(seed, 4, 30)
    found = weight_error(weight, affine.search_weight_scale(weight, bits), bits, affine.WEIGHT_SEARCH_NORM)
    plain = weight_error(weight, affine.minmax_weight_scale(weight, bits), bits, affine.WEIGHT_SEARCH_NORM)
    assert (found <= plain).all()


def test_the_weight_search_shrinks_a_range_that_one_outlier_widens() -> None:
    weight = torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([3.0])])[None]
    assert affine.search_weight_scale(weight, 4) < 0.6 * affine.minmax_weight_scale(weight, 4)


def test_channels_are_searched_apart() -> None:
    weight = heavy_tailed(0, 3, 50)
    together = affine.search_weight_scale(weight, 4)
    apart = torch.cat([affine.search_weight_scale(weight[i : i + 1], 4) for i in range(3)])
    assert torch.equal(together, apart)


def test_a_channel_of_zeros_has_a_usable_scale() -> None:
    assert (affine.search_weight_scale(torch.zeros(2, 9), 4) > 0).all()


@pytest.mark.parametrize(("bits", "largest"), [(4, 7), (8, 127)])
def test_a_minmax_scale_is_the_largest_magnitude_on_the_largest_code(bits: int, largest: int) -> None:
    weight = torch.tensor([[0.5, -2.0], [0.25, 0.0]])
    torch.testing.assert_close(
        affine.minmax_weight_scale(weight, bits), torch.tensor([2.0, 0.25]) / largest, rtol=1e-6, atol=0
    )


@QUICK
@given(seed=SEEDS, bits=BITS)
def test_a_minmax_grid_keeps_every_value_within_a_step(seed: int, bits: int) -> None:
    x = heavy_tailed(seed, 200)
    grid = affine.minmax_grid(x, bits)
    error = (affine.fake_quantize(x, grid.scale, grid.qmin, grid.qmax) - x).abs().max()
    # Half a step from rounding the value, half from rounding the zero-point.
    assert error <= grid.scale * (1 + 1e-5)


@QUICK
@given(seed=SEEDS, bits=BITS, one_sided=st.booleans())
def test_the_grid_search_is_never_worse_than_min_max(seed: int, bits: int, one_sided: bool) -> None:
    x = heavy_tailed(seed, 500)
    x = torch.nn.functional.silu(x) if one_sided else x
    assert grid_error(x, affine.search_grid(x, bits)) <= grid_error(x, affine.minmax_grid(x, bits))


def test_the_grid_search_gives_up_rare_outliers_at_four_bits() -> None:
    x = torch.cat([torch.linspace(-1, 1, 100_000), torch.tensor([40.0])])
    assert affine.search_grid(x, 4).scale < 0.2 * affine.minmax_grid(x, 4).scale


@pytest.mark.parametrize("channels", [64, 96, 320, 1280])
def test_the_grid_search_sees_all_channels(channels: int) -> None:
    # All that matters is in the last channel, which strides of even length pass by.
    x = 0.01 * torch.randn(affine.MAX_SEARCH_VALUES * 4 // channels - 1, channels)
    x[:, -1] = torch.linspace(-1, 1, x.shape[0])
    # It judges by a sample: one per cent for that.
    assert grid_error(x, affine.search_grid(x, 4)) <= 1.01 * grid_error(x, affine.minmax_grid(x, 4))


def test_positive_values_get_all_codes_on_their_side() -> None:
    grid = affine.search_grid(torch.linspace(0, 1, 1000), 4)
    assert (grid.qmin, grid.qmax) == (0, 15)


@QUICK
@given(seed=SEEDS, bits=BITS)
def test_a_scale_for_each_group_is_never_worse_than_the_common_one(seed: int, bits: int) -> None:
    x = heavy_tailed(seed, 3, 300) * torch.tensor([[0.5], [1.0], [1.5]])
    grid = affine.search_grid(x, bits)
    found = affine.search_group_scale(x, grid)
    for group in range(3):
        own = affine.Grid(float(found[group]), grid.qmin, grid.qmax)
        # The multiple 1 of the common scale comes out of linspace with a rounding error.
        assert grid_error(x[group], own) <= grid_error(x[group], grid) * (1 + 1e-4)


def test_group_scales_follow_the_spread_of_their_group() -> None:
    x = torch.linspace(-1, 1, 500) * torch.tensor([[0.5], [1.0], [1.6]])
    scale = affine.search_group_scale(x, affine.minmax_grid(x[1], 4))
    torch.testing.assert_close(scale / scale[1], torch.tensor([0.5, 1.0, 1.6]), rtol=0.15, atol=0)


@QUICK
@given(seed=SEEDS, bounds=st.sampled_from([(-128, 127), (0, 15), (-15, 0), (-3, 12)]))
def test_a_minmax_scale_for_each_group_is_the_least_that_clips_nothing(
    seed: int, bounds: tuple[int, int]
) -> None:
    qmin, qmax = bounds
    x = heavy_tailed(seed, 3, 50).clamp(-1e3 if qmin else 0, 1e3 if qmax else 0)
    scale = affine.minmax_group_scale(x, affine.Grid(1.0, qmin, qmax))
    ratio = x / scale[:, None]
    assert (ratio >= qmin * (1 + 1e-5)).all() and (ratio <= qmax * (1 + 1e-5)).all()
    used = torch.maximum(
        ratio.amax(dim=1) / qmax if qmax else torch.zeros(3),
        ratio.amin(dim=1) / qmin if qmin else torch.zeros(3),
    )
    torch.testing.assert_close(used, torch.ones(3), rtol=1e-5, atol=0)


def test_a_silent_group_does_not_make_the_others_multipliers_vanish() -> None:
    x = torch.stack([torch.zeros(50), torch.linspace(-1, 1, 50)])
    scale = affine.minmax_group_scale(x, affine.Grid(1.0, -128, 127))
    assert scale.max() / scale.min() <= 1001


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_a_migration_row_is_that_of_smoothquant_with_mean_one(exponent: float) -> None:
    x = torch.randn(2, 40, 5) * torch.tensor([1.0, 10.0, 0.1, 3.0, 1.0])
    weight = torch.randn(7, 5)
    published = x.abs().amax((0, 1)) ** exponent / weight.abs().amax(0) ** (1 - exponent)
    expected = published / published.log().mean().exp()
    torch.testing.assert_close(affine.migration_row(x, weight, exponent), expected, rtol=1e-5, atol=0)

"""The grid by its definition: what survives, where the rest goes, and what gradient it passes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quest_deploy.quantize.grid import (
    activation_bounds,
    dequantize_weight,
    quantize,
    quantize_dequantize,
    weight_bounds,
)

SCALES = st.floats(2.0**-20, 1024.0, width=32).filter(lambda scale: scale > 0)
RATIOS = st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=50)
BOUNDS = st.sampled_from([(-128, 127), (-127, 127), (-8, 7), (0, 15), (-3, 12), (-15, 0)])
QUICK = settings(max_examples=50, deadline=None)


@QUICK
@given(scale=SCALES, bounds=BOUNDS)
def test_representable_values_survive(scale: float, bounds: tuple[int, int]) -> None:
    s = torch.tensor(scale)
    values = torch.arange(bounds[0], bounds[1] + 1) * s
    assert torch.equal(quantize_dequantize(values, s, *bounds), values)


def test_ties_go_to_even() -> None:
    halves = torch.tensor([-3.5, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 3.5])
    assert quantize(halves, torch.tensor(1.0), -8, 7).tolist() == [-4, -2, -2, 0, 0, 2, 2, 4]


@QUICK
@given(ratios=RATIOS, scale=SCALES, bounds=BOUNDS)
def test_codes_are_the_rounded_quotient_inside_the_bounds(
    ratios: list[float], scale: float, bounds: tuple[int, int]
) -> None:
    values = np.array(ratios, np.float32) * np.float32(scale)
    expected = np.clip(np.rint(values / np.float32(scale)), *bounds).astype(np.int8)
    assert np.array_equal(quantize(torch.from_numpy(values), torch.tensor(scale), *bounds).numpy(), expected)


@QUICK
@given(ratios=RATIOS, scale=SCALES, zero_point=st.integers(0, 15))
def test_a_shifted_grid_is_the_asymmetric_quantizer_with_a_zero_point(
    ratios: list[float], scale: float, zero_point: int
) -> None:
    values = np.array(ratios, np.float32) * np.float32(scale)
    unsigned = np.clip(np.rint(values / np.float32(scale)) + zero_point, 0, 15)
    expected = ((unsigned - zero_point) * np.float32(scale)).astype(np.float32)
    got = quantize_dequantize(torch.from_numpy(values), torch.tensor(scale), -zero_point, 15 - zero_point)
    assert np.array_equal(got.numpy(), expected)


@QUICK
@given(ratios=RATIOS, scale=SCALES, bounds=BOUNDS)
def test_quantizing_twice_changes_nothing_more(
    ratios: list[float], scale: float, bounds: tuple[int, int]
) -> None:
    s = torch.tensor(scale)
    once = quantize_dequantize(torch.tensor(ratios) * s, s, *bounds)
    assert torch.equal(quantize_dequantize(once, s, *bounds), once)


@QUICK
@given(ratios=RATIOS, scale=SCALES, bounds=BOUNDS)
def test_values_are_their_codes_times_the_scale(
    ratios: list[float], scale: float, bounds: tuple[int, int]
) -> None:
    s = torch.tensor(scale)
    values = torch.tensor(ratios) * s
    assert torch.equal(quantize_dequantize(values, s, *bounds), quantize(values, s, *bounds).float() * s)


def test_the_gradient_passes_inside_the_clip_range_and_stops_outside() -> None:
    values = torch.tensor([-9.0, -8.0, -0.4, 0.0, 6.6, 7.0, 7.1], requires_grad=True)
    quantize_dequantize(values, torch.tensor(1.0), -8, 7).sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_the_custom_ops_keep_what_torch_demands_of_them() -> None:
    values = torch.linspace(-3, 3, 12).reshape(3, 4).requires_grad_(True)
    torch.library.opcheck(quantize_dequantize, (values, torch.tensor(0.3), -8, 7))
    codes = torch.arange(12, dtype=torch.int8).reshape(3, 4)
    torch.library.opcheck(dequantize_weight, (codes, torch.ones(3), 0, 8))


@pytest.mark.parametrize("axis", [0, 1])
def test_a_weight_scale_belongs_to_one_index_of_its_axis(axis: int) -> None:
    codes = torch.ones(3, 3, 2, 2, dtype=torch.int8)
    scale = torch.tensor([0.5, 1.0, 2.0])
    weight = dequantize_weight(codes, scale, axis, 8)
    for channel in range(3):
        assert weight.select(axis, channel).unique().tolist() == [scale[channel]]


@pytest.mark.parametrize(("bits", "expected"), [(4, (-8, 7)), (8, (-127, 127))])
def test_weight_codes_are_symmetric_and_fit_their_bits(bits: int, expected: tuple[int, int]) -> None:
    assert weight_bounds(bits) == expected


ENDS = st.tuples(st.floats(-100, 100), st.floats(-100, 100)).map(sorted)


@QUICK
@given(ends=ENDS, bits=st.sampled_from([4, 8]))
def test_activation_bounds_hold_zero_inside_int8(ends: list[float], bits: int) -> None:
    qmin, qmax, scale = activation_bounds(*ends, bits)
    assert -128 <= qmin <= 0 <= qmax <= 127
    assert qmax - qmin == 2**bits - 1
    assert scale > 0


@QUICK
@given(ends=ENDS, bits=st.sampled_from([4, 8]))
def test_activation_bounds_cover_the_range_to_half_a_step(ends: list[float], bits: int) -> None:
    qmin, qmax, scale = activation_bounds(*ends, bits)
    slack = 0.5 * scale * (1 + 1e-9) + 1e-9
    assert qmin * scale <= min(ends[0], 0) + slack
    assert qmax * scale >= max(ends[1], 0) - slack


def test_eight_bit_activations_use_the_whole_symmetric_grid() -> None:
    assert activation_bounds(0.0, 12.7, 8) == (-128, 127, pytest.approx(0.1))

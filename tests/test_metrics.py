"""Figures of merit: closed forms, properties, and SSIM against a direct evaluation of its definition."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from quest_deploy.metrics import (
    IDENTICAL_DB,
    code_flips,
    cosine,
    mean_db,
    paired_interval,
    psnr_db,
    share_low,
    snr_db,
    ssim,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(n: int = 2, size: int = 16, seed: int = 0) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def gaussian_window() -> Tensor:
    offsets = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(line, line)
    return window / window.sum()


def direct_ssim(first: Tensor, second: Tensor) -> float:
    """SSIM of two [c, h, w] images by its definition, one window at a time."""
    window, values = gaussian_window(), []
    c1, c2 = 0.01**2, 0.03**2
    channels, height, width = first.shape
    for c in range(channels):
        for y in range(height - 10):
            for x in range(width - 10):
                a = first[c, y : y + 11, x : x + 11].double()
                b = second[c, y : y + 11, x : x + 11].double()
                ma, mb = (window * a).sum(), (window * b).sum()
                va, vb = (window * (a - ma) ** 2).sum(), (window * (b - mb) ** 2).sum()
                cov = (window * (a - ma) * (b - mb)).sum()
                values.append((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(torch.stack(values).mean())


@settings(deadline=None, max_examples=40)
@given(st.floats(1e-4, 0.9), st.integers(0, 1000))
def test_snr_of_a_scaled_signal_is_closed_form(error: float, seed: int) -> None:
    reference = noise(3, 4, 5, seed=seed).double()
    expected = -20 * math.log10(error)
    assert snr_db(reference, reference * (1 + error)) == pytest.approx([expected] * 3, abs=1e-6)


@settings(deadline=None, max_examples=40)
@given(st.floats(0.01, 100), st.integers(0, 1000))
def test_snr_does_not_depend_on_the_unit(scale: float, seed: int) -> None:
    reference, candidate = noise(2, 8, seed=seed).double(), noise(2, 8, seed=seed + 1).double()
    assert snr_db(reference * scale, candidate * scale) == pytest.approx(
        snr_db(reference, candidate).tolist(), abs=1e-9
    )


def test_snr_is_taken_sample_by_sample() -> None:
    reference = torch.ones(2, 4)
    candidate = reference.clone()
    candidate[1] += 0.1
    assert snr_db(reference, candidate).tolist() == [math.inf, pytest.approx(20, abs=1e-5)]


def test_snr_of_equal_silence_is_infinite_and_of_noise_over_silence_minus_infinite() -> None:
    silence = torch.zeros(1, 4)
    assert snr_db(silence, silence).item() == math.inf
    assert snr_db(silence, silence + 1).item() == -math.inf


def test_snr_of_a_nan_is_nan() -> None:
    candidate = torch.ones(2, 4)
    candidate[0, 2] = math.nan
    result = snr_db(torch.ones(2, 4), candidate)
    assert math.isnan(result[0]) and result[1] == math.inf


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match=r"\[1, 4\] and \[4, 4\]"):
        snr_db(torch.ones(1, 4), torch.ones(4, 4))


def test_psnr_of_a_constant_offset_is_closed_form() -> None:
    reference = torch.full((2, 3, 12, 12), 0.5, dtype=torch.float64)
    assert psnr_db(reference, reference + 0.1) == pytest.approx([20, 20], abs=1e-9)


def test_psnr_is_taken_image_by_image() -> None:
    reference = images()
    candidate = reference.clone()
    candidate[1, 0, 0, 0] += 0.5
    expected = -10 * math.log10(0.25 / reference[1].numel())
    assert psnr_db(reference, candidate).tolist() == [math.inf, pytest.approx(expected, abs=1e-4)]


def test_ssim_of_equal_images_is_one() -> None:
    assert ssim(images(), images()) == pytest.approx([1, 1], abs=1e-12)


def test_ssim_of_constant_images_is_closed_form() -> None:
    a, b = 0.25, 0.75
    flat = torch.ones(1, 3, 16, 16)
    expected = (2 * a * b + 1e-4) / (a**2 + b**2 + 1e-4)
    assert ssim(a * flat, b * flat).item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("strength", [0.02, 0.1, 1.0])
def test_ssim_agrees_with_its_definition(strength: float) -> None:
    first = images(1, 14, seed=3)
    second = (first + strength * noise(1, 3, 14, 14, seed=4)).clamp(0, 1)
    assert ssim(first, second).item() == pytest.approx(direct_ssim(first[0], second[0]), abs=1e-6)


def test_ssim_is_taken_image_by_image() -> None:
    first = images(2)
    second = first.clone()
    second[1] = 1 - second[1]
    values = ssim(first, second)
    assert values[0] == pytest.approx(1, abs=1e-12) and values[1] < 0


def test_ssim_of_images_smaller_than_its_window_tells_them_apart() -> None:
    first = images(2, size=8)
    second = torch.stack([first[0], 1 - first[1]])
    values = ssim(first, second)
    assert values[0] == pytest.approx(1, abs=1e-12) and values[1] < 0


def test_cosine_of_opposites_is_minus_one() -> None:
    values = noise(2, 9)
    assert cosine(values, -values) == pytest.approx([-1, -1], abs=1e-9)


def test_code_flips_count_places_and_the_largest_difference() -> None:
    reference = torch.tensor([-128, 0, 5, 127], dtype=torch.int8)
    candidate = torch.tensor([127, 0, 6, 127], dtype=torch.int8)
    flips = code_flips(reference, candidate)
    assert (flips.places, flips.differing, flips.max_difference, flips.fraction) == (4, 2, 255, 0.5)


def test_code_flips_of_several_layers_add_up() -> None:
    same = code_flips(torch.zeros(6, dtype=torch.int8), torch.zeros(6, dtype=torch.int8))
    other = code_flips(torch.zeros(2, dtype=torch.int8), torch.tensor([0, 3], dtype=torch.int8))
    total = same + other
    assert (total.places, total.differing, total.max_difference) == (8, 1, 3)


def test_equal_tokens_count_once_and_differ_where_one_of_them_does() -> None:
    words = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int8)
    padding = torch.tensor([7, -128, 9], dtype=torch.int8).expand(50, 3)
    reference = torch.cat([words, padding])[None].repeat(2, 1, 1)
    candidate = reference.clone()
    candidate[0, 2:20, 1] = 127
    candidate[1, 40:, 1] = -126
    candidate[1, 0, 0] = 2
    flips = code_flips(reference, candidate)
    assert (flips.places, flips.differing, flips.max_difference) == (3 * 3, 2, 255)


def test_tokens_that_differ_anywhere_are_counted_each() -> None:
    reference = torch.randint(-128, 128, (2, 300, 16), dtype=torch.int8)
    assert code_flips(reference, reference).places == reference.numel()


def test_images_are_counted_place_by_place() -> None:
    flips = code_flips(torch.zeros(2, 3, 4, 4, dtype=torch.int8), torch.ones(2, 3, 4, 4, dtype=torch.int8))
    assert (flips.places, flips.differing) == (96, 96)


def test_a_mean_counts_an_exact_match_as_the_ceiling() -> None:
    assert mean_db(torch.tensor([math.inf, 100.0])) == pytest.approx((IDENTICAL_DB + 100) / 2)
    assert mean_db(torch.tensor([math.inf, math.inf])) == math.inf


def test_interval_of_one_constant_difference_has_no_width() -> None:
    assert paired_interval([0.5] * 8) == (0.5, 0.5, 0.5)


def test_interval_is_the_same_for_the_same_seed() -> None:
    values = noise(20)
    assert paired_interval(values, seed=3) == paired_interval(values, seed=3)
    assert paired_interval(values, seed=3) != paired_interval(values, seed=4)


def test_interval_agrees_with_the_normal_one_for_many_pairs() -> None:
    values = noise(400).double() + 1
    low, mean, high = paired_interval(values)
    half = 1.96 * values.std().item() / 20
    assert (low, high) == (pytest.approx(mean - half, abs=0.01), pytest.approx(mean + half, abs=0.01))


def test_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    covered = 0
    for seed in range(200):
        low, _, high = paired_interval(noise(32, seed=seed), resamples=400, seed=seed)
        covered += low <= 0 <= high
    assert 0.88 <= covered / 200 <= 0.99


def test_one_pair_has_an_unbounded_interval() -> None:
    assert paired_interval([2.0]) == (-math.inf, 2.0, math.inf)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf]])
def test_interval_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        paired_interval(values)


def test_the_median_of_pairs_is_not_moved_by_a_few_outliers() -> None:
    differences = torch.cat([torch.linspace(-0.1, 0.1, 61), torch.tensor([40.0, 50.0, 60.0])])
    low, median, high = paired_interval(differences, statistic="median")
    assert -0.05 < low < median < high < 0.05
    assert paired_interval(differences)[1] > 2


# By hand; where all or none have it in closed form.
@pytest.mark.parametrize(
    ("count", "total", "low"), [(1, 10, 0.0179), (0, 7, 0.0), (7, 7, 7 / (7 + 1.96**2)), (50, 100, 0.4038)]
)
def test_the_lower_end_of_a_share_is_wilsons(count: int, total: int, low: float) -> None:
    assert share_low(count, total) == pytest.approx(low, abs=5e-5)

"""Statistics of activations: closed forms, and what the layers really saw."""

from __future__ import annotations

import pytest
import torch

from quest_deploy.analyze.activations import (
    Activations,
    clipped_share,
    describe,
    histograms,
    imbalance,
    round_figure,
    subsample,
)
from quest_deploy.quantize.layers import ActivationQuantizer


def described(rows: torch.Tensor) -> dict[str, float]:
    return describe(rows, rows.abs().amax(dim=0), torch.Generator().manual_seed(0))


def test_gaussian_has_kurtosis_three_and_its_own_percentiles() -> None:
    rows = torch.randn(2000, 50, generator=torch.Generator().manual_seed(0))
    got = described(rows)
    assert got["kurtosis"] == pytest.approx(3.0, abs=0.1)
    assert got["std"] == pytest.approx(1.0, abs=0.01)
    assert got["p99"] == pytest.approx(2.326, abs=0.1)
    assert got["p50"] == pytest.approx(0.0, abs=0.05)


def test_two_values_have_the_least_kurtosis() -> None:
    rows = torch.tensor([[-1.0, 1.0], [1.0, -1.0]])
    got = described(rows)
    assert (got["min"], got["max"], got["mean"], got["std"]) == (-1.0, 1.0, 0.0, 1.0)
    assert got["kurtosis"] == pytest.approx(1.0, rel=1e-6)


def test_one_large_channel_is_an_imbalance() -> None:
    rows = torch.ones(5, 9)
    rows[2, 4] = -30.0
    assert described(rows)["channel_imbalance"] == pytest.approx(30.0, rel=1e-6)
    assert imbalance(torch.ones(4)) == 1.0


def test_silent_layer_gives_finite_numbers() -> None:
    assert all(torch.isfinite(torch.tensor(value)) for value in described(torch.zeros(3, 4)).values())


def activations(ranges: list[tuple[float, float]]) -> Activations:
    series = {
        "min": [low for low, _ in ranges],
        "max": [high for _, high in ranges],
        "kurtosis": [3.0] * len(ranges),
    }
    return Activations(
        series=series, largest=torch.tensor([1.0, 2.0, 8.0]), row=torch.tensor([1.0, 2.0, 4.0])
    )


def test_timestep_imbalance_is_the_widest_range_over_the_narrowest() -> None:
    assert activations([(-1.0, 1.0), (-4.0, 6.0)]).summary()["timestep_imbalance"] == 5.0


def test_channel_row_takes_imbalance_away() -> None:
    summary = activations([(0.0, 1.0)]).summary()
    assert (summary["channel_imbalance"], summary["quantized_channel_imbalance"]) == (4.0, 2.0)


@pytest.mark.parametrize("row", [None, torch.tensor([1.0, 2.0])], ids=["no row", "row"])
def test_clipped_share_counts_values_beyond_the_bounds(row: torch.Tensor | None) -> None:
    quantizer = ActivationQuantizer(torch.tensor([1.0, 0.1]), -8, 7, row=row)
    x = torch.tensor([[7.0, 14.0], [0.5, 1.5]])
    # At scale 1 the codes 7 and 14 (7 behind the row), at scale 0.1 the codes 5 and 15 (7.5 behind the row).
    expected = 0.5 if row is None else 0.25
    assert clipped_share(x, quantizer, torch.tensor([0, 1])) == expected


def test_histogram_shares_nearly_add_up_to_one() -> None:
    kept = {0: torch.randn(4000), 3: 2 * torch.randn(4000)}
    layer = Activations(largest=torch.ones(1), row=None, kept=kept)
    result = histograms({"layer": layer}, ["layer"])["layer"]
    assert result["edges"] == sorted(result["edges"])
    for share in result["share_by_step"].values():
        # The rarest thousandth of the values lies outside.
        assert 0.99 < sum(share) <= 1.0 + 1e-6


def test_constant_input_has_a_histogram() -> None:
    layer = Activations(largest=torch.ones(1), row=None, kept={0: torch.zeros(10)})
    assert sum(histograms({"layer": layer}, ["layer"])["layer"]["share_by_step"]["0"]) == pytest.approx(1.0)


def test_subsample_keeps_all_of_few_and_the_asked_number_of_many() -> None:
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(subsample(torch.arange(5.0), 9, generator), torch.arange(5.0))
    assert subsample(torch.arange(50.0), 9, generator).numel() == 9


def test_figures_keep_five_digits() -> None:
    assert round_figure(1234.5678) == 1234.6


@pytest.mark.parametrize("scale", [1e-15, 1e-4, 1.0, 1e6])
def test_kurtosis_does_not_depend_on_the_unit(scale: float) -> None:
    rows = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    kurtosis = [described(values)["kurtosis"] for values in (rows, rows * scale)]
    assert kurtosis[1] == pytest.approx(kurtosis[0], rel=1e-3)

"""The published quantizers: what the deployable ones are measured against has to be right itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from benchmarks import published
from benchmarks.differences import damage, deployable_softmax, published_softmax
from quest_deploy.model.load import load_model
from quest_deploy.quantize import affine, calibrate
from quest_deploy.quantize.attention import PROBABILITIES, operand_quantizers


def test_an_asymmetric_grid_holds_its_ends_and_has_2_to_the_bits_values() -> None:
    x = torch.linspace(-1, 2, 1001)
    on_grid = published.asymmetric(x, torch.tensor(-1.0), torch.tensor(2.0), 4)
    assert on_grid.unique().numel() == 16
    torch.testing.assert_close(on_grid[[0, -1]], x[[0, -1]], atol=1e-6, rtol=0)
    assert float((on_grid - x).abs().max()) <= 3 / 15 / 2 + 1e-6


def test_a_grid_may_leave_zero_out() -> None:
    x = torch.linspace(5, 6, 101)
    inside = published.asymmetric(x, torch.tensor(5.0), torch.tensor(6.0), 4)
    assert float((inside - x).abs().max()) <= 1 / 15 / 2 + 1 / 15 / 2 + 1e-6


def test_an_asymmetric_weight_is_nearer_than_a_symmetric_one_where_weights_lean() -> None:
    weight = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    symmetric = affine.fake_quantize(weight, affine.search_weight_scale(weight, 4)[:, None], -8, 7)
    errors = [(grid - weight).square().mean() for grid in (published.weight(weight, 4), symmetric)]
    assert errors[0] < errors[1] / 2


@pytest.mark.parametrize("with_zero", [True, False])
def test_ranges_are_by_group_and_channel(with_zero: bool) -> None:
    x = torch.tensor([[[1.0, -4.0], [2.0, -3.0]], [[10.0, 1.0], [20.0, 2.0]]])
    low, high = published.ranges(x, 8, by_channel=True, with_zero=with_zero, search=False)
    assert low.shape == high.shape == (2, 1, 2)
    assert low[0, 0].tolist() == [0.0 if with_zero else 1.0, -4.0]
    assert high[1, 0].tolist() == [20.0, 2.0]


def test_a_searched_range_gives_up_an_outlier() -> None:
    x = torch.cat([torch.linspace(-1, 1, 400), torch.tensor([1.5])])[None, :, None]
    _, high = published.ranges(x, 4, by_channel=False, with_zero=True, search=True)
    assert float(high) < 1.5


def test_attention_computes_the_same_openly_but_for_256_codes() -> None:
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    expected = F.scaled_dot_product_attention(query, key, value)
    with published_softmax():
        found = F.scaled_dot_product_attention(query, key, value)
    assert F.scaled_dot_product_attention(query, key, value).equal(expected)
    assert not torch.equal(found, expected)
    # Half a code in each of five probabilities.
    assert float((found - expected).abs().max()) <= 5 * 0.5 / 255 * float(value.abs().max())


def test_the_deployable_softmax_is_the_one_that_finetuning_starts_from(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    data = calibrate.record_trajectories(model, ("a", "b"), steps=2, guidance_scale=2.0, seed=0, batch_size=2)
    denoiser = deployable_softmax(model.denoiser, data, seed=0)
    found = operand_quantizers(denoiser)
    assert found and {name.rpartition(".")[2] for name in found} == {PROBABILITIES}
    assert all(one.group_scale().numel() == 2 for one in found.values())
    assert 20 < damage(denoiser, data) < 100
    assert not operand_quantizers(model.denoiser)

"""Where finetuning starts from: bits by role, groups by recipe, rows only where they pay."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quest_deploy.errors import CalibrationError
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import affine
from quest_deploy.quantize.calibrate import EXTREME_ROWS
from quest_deploy.quantize.initialize import choose_row, initialize, initialize_layer

GROUPS = torch.tensor([0.3, 1.0, 2.0])[:, None, None]
PLAIN = {"method": "search", "time_aware": True, "channel_wise": True}


def test_time_aware_scales_differ_by_group_and_others_do_not() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 200, 6) * GROUPS
    aware = initialize_layer(layer, x, 4, 4, **PLAIN).group_scale
    common = initialize_layer(layer, x, 4, 4, **(PLAIN | {"time_aware": False})).group_scale
    assert aware[0] < aware[1] < aware[2]
    assert common.numel() == 1


def test_minmax_gives_one_plain_scale() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 200, 6) * GROUPS
    found = initialize_layer(layer, x, 8, 8, **(PLAIN | {"method": "minmax"}))
    torch.testing.assert_close(found.group_scale, (x.abs().max() / 127).reshape(1))
    assert found.row is None


def outlier_channel() -> torch.Tensor:
    return torch.randn(3, 200, 6) * torch.tensor([1.0, 1.0, 50.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_channel_of_outliers_gets_a_row(bits: int) -> None:
    assert initialize_layer(nn.Linear(6, 5), outlier_channel(), 8, bits, **PLAIN).row is not None


def test_a_given_exponent_makes_the_row_of_that_exponent() -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 200, 6)
    row = initialize_layer(layer, x, 8, 4, **PLAIN, migration_exponent=0.3).row
    expected = affine.migration_row(x, layer.weight.detach(), 0.3)
    assert row is not None and torch.equal(row, expected)


@pytest.mark.parametrize(
    ("changes", "layer"),
    [({"channel_wise": False}, nn.Linear(6, 5)), ({}, nn.Conv2d(6, 6, 3, groups=2))],
    ids=["switched off", "grouped"],
)
def test_no_row_is_made_where_none_belongs(changes: dict, layer: nn.Module) -> None:
    assert initialize_layer(layer, outlier_channel(), 8, 4, **(PLAIN | changes)).row is None


def test_eight_bits_cover_every_value_of_every_group() -> None:
    x = torch.randn(3, 200, 6) * GROUPS
    x[1, 7, 2] = 90.0
    found = initialize_layer(nn.Linear(6, 5), x, 8, 8, **(PLAIN | {"channel_wise": False}))
    torch.testing.assert_close(found.group_scale, x.flatten(1).abs().amax(dim=1) / 127, rtol=0.01, atol=0)


def test_four_bits_are_not_spent_on_the_extremes() -> None:
    x = torch.randn(3, 200, 6)
    with_extremes = torch.cat([x, torch.full((3, EXTREME_ROWS, 6), 1e3)], dim=1)
    found = initialize_layer(nn.Linear(6, 5), with_extremes, 8, 4, **(PLAIN | {"channel_wise": False}))
    assert (found.group_scale * 15 < 10).all()


def test_channels_that_are_alike_need_no_row() -> None:
    # Random signs: every row would make some of these equal channels worse.
    x = torch.randn(3, 200, 6).sign()
    assert choose_row(torch.randn(5, 6).sign(), x, 8, 4) is None


def test_a_layer_without_inputs_is_refused(float_model: LoadedModel, inputs: dict) -> None:
    rest = {name: value for name, value in inputs.items() if name != "conv_out"}
    with pytest.raises(CalibrationError, match="layer 'conv_out' was not run during calibration"):
        initialize(float_model.denoiser, rest, dict.fromkeys(inputs, (4, 8)), method="minmax")

"""Gates: what a measured change counts for."""

from __future__ import annotations

import pytest

from quest_deploy.parity.gates import PsnrChange


@pytest.mark.parametrize(
    ("change", "certain"),
    [
        ({"median": 0.4, "low": -0.1, "high": 0.9}, 0.0),
        ({"median": 0.9, "low": 0.5, "high": 1.2}, 0.5),
        ({"median": -0.9, "low": -1.2, "high": -0.4}, 0.4),
        ({"median": 0.4, "low": float("-inf"), "high": float("inf")}, None),
    ],
    ids=["by luck", "better", "worse", "one prompt"],
)
def test_a_change_of_image_quality_counts_as_far_as_it_is_certain(
    change: dict[str, float], certain: float | None
) -> None:
    assert PsnrChange(mean=0.0, **change).certain == certain

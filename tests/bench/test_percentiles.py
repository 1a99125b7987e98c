"""Percentiles of what was timed, and where there are too few values for them."""

from __future__ import annotations

import pytest

from quest_deploy.bench.figures import percentile, summarize
from quest_deploy.commands.bench import tables

TURN = {"images": 2, "memory_bytes": {"imports": 50, "peak": 100, "device_peak": None}, "device": "cpu"}


@pytest.mark.parametrize(("share", "expected"), [(0.95, 95), (0.5, 50), (0.01, 1), (1.0, 100), (0.001, 1)])
def test_percentiles_are_values_that_occurred(share: float, expected: int) -> None:
    assert percentile([*range(100, 0, -1)], share) == expected


def test_a_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no values"):
        percentile([], 0.5)


@pytest.mark.parametrize(("runs", "p95", "heading"), [(19, None, "slowest"), (20, 19.0, "p95")])
def test_a_percentile_that_would_be_the_largest_value_is_left_out(
    runs: int, p95: float | None, heading: str
) -> None:
    row = summarize(
        [TURN | {"loops": [float(n + 1) for n in range(runs)], "calls": {"unet": [[1.0]] * runs}}]
    )
    assert (row["loop"]["p95_s"], row["loop"]["slowest_s"]) == (p95, runs)
    heads, values = tables({"rows": {"onnx": row}, "order": ["onnx"], "baseline": "onnx"})[0].splitlines()
    assert (heads.split()[2], values.split()[2]) == (heading, "19")

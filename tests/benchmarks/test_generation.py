"""What the benchmark of the whole loop takes from `quest-deploy bench`."""

from __future__ import annotations

import pytest

from benchmarks.generation import measured


def test_rows_get_this_benchmarks_names() -> None:
    assert measured({"b:torch": {"loop": 1}, "a": {"loop": 2}}, {"x": "a", "y": "b:torch"}) == {
        "x": {"loop": 2},
        "y": {"loop": 1},
    }


def test_a_row_that_failed_is_no_result() -> None:
    with pytest.raises(SystemExit, match="y could not be measured: killed"):
        measured({"a": {"loop": 1}, "b": {"error": "killed"}}, {"x": "a", "y": "b"})

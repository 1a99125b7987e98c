"""What the benchmark of the whole loop takes from `quest-deploy bench`."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.generation import measured
from quest_deploy.artifacts import write_json


def test_rows_get_this_benchmarks_names(tmp_path: Path) -> None:
    write_json(tmp_path / "bench.json", {"rows": {"b:torch": {"loop": 1}, "a": {"loop": 2}}})
    assert measured(tmp_path, {"x": "a", "y": "b:torch"}) == {"x": {"loop": 2}, "y": {"loop": 1}}


def test_a_row_that_failed_is_no_result(tmp_path: Path) -> None:
    write_json(tmp_path / "bench.json", {"rows": {"a": {"loop": 1}, "b": {"error": "killed"}}})
    with pytest.raises(SystemExit, match="y could not be measured: killed"):
        measured(tmp_path, {"x": "a", "y": "b"})

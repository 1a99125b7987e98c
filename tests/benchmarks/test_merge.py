"""A run of some recipes leaves what a result file has of the others, with when it was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import kid
from benchmarks.merge import elsewhere, merged
from benchmarks.report import provenance


def result(date: str, *names: str, prompts: int = 64) -> dict[str, Any]:
    return {
        "date": date,
        "machine": {"cpu": "some", "cores": 2, "memory_bytes": 2**30},
        "versions": {"python": "3.11"},
        "commit": "a" * 40,
        "uncommitted_changes": False,
        "settings": {"recipes": list(names), "prompts": prompts},
        "recipes": {name: {"measured on": date} for name in names},
    }


def write(file: Path, content: dict[str, Any]) -> Path:
    file.write_text(json.dumps(content))
    return file


def test_other_recipes_stay_with_their_date(tmp_path: Path) -> None:
    file = write(tmp_path / "quality.json", result("Monday", "w8a8", "w4a4"))
    found = merged(file, result("Tuesday", "w4a4"))
    assert {name: row["measured on"] for name, row in found["recipes"].items()} == {
        "w8a8": "Monday",
        "w4a4": "Tuesday",
    }
    assert {name: one["date"] for name, one in found["measured"].items()} == {
        "w8a8": "Monday",
        "w4a4": "Tuesday",
    }
    assert found["settings"]["recipes"] == ["w4a4", "w8a8"]
    again = merged(write(file, found), result("Wednesday", "w4a8"))
    assert {name: one["date"] for name, one in again["measured"].items()} == {
        "w8a8": "Monday",
        "w4a4": "Tuesday",
        "w4a8": "Wednesday",
    }
    text = provenance(again)
    assert text.index("W4A4: Tuesday") < text.index("W4A8: Wednesday") < text.index("W8A8: Monday")


def test_a_run_of_all_recipes_replaces_the_file(tmp_path: Path) -> None:
    new = result("Tuesday", "w8a8", "w4a4")
    assert merged(write(tmp_path / "quality.json", result("Monday", "w4a4")), new) == new
    assert merged(tmp_path / "missing.json", new) == new


def test_what_a_stage_took_stays_as_well(tmp_path: Path) -> None:
    old, new = (
        {**result("Monday", *names), "stages": {name: {} for name in names}}
        for names in (("w8a8", "w4a4"), ("w4a4",))
    )
    assert merged(write(tmp_path / "cost.json", old), new)["stages"].keys() == {"w8a8", "w4a4"}


@pytest.mark.parametrize(
    "changes",
    [{"fp32": {"kid": 2}}, {"iterations": 1000}, {"models": {}}],
    ids=["another full precision", "more updates", "by model"],
)
def test_what_would_lose_or_mix_results_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    old = {
        **result("Monday", "w8a8", "w4a4"),
        "fp32": {"kid": 1},
        "iterations": 500,
        **{key: {} for key in changes if key == "models"},
    }
    file = write(tmp_path / "some.json", old)
    with pytest.raises(SystemExit, match="measure all recipes"):
        merged(file, {**result("Tuesday", "w4a4"), "fp32": {"kid": 1}, "iterations": 500, **changes})


def test_settings_that_a_benchmark_does_not_go_by_may_have_changed(tmp_path: Path) -> None:
    file = write(tmp_path / "kid.json", result("Monday", "w8a8", "w4a4", prompts=2))
    found = merged(file, result("Tuesday", "w4a4"), kid.UNUSED_SETTINGS)
    assert {name: row["measured on"] for name, row in found["recipes"].items()} == {
        "w8a8": "Monday",
        "w4a4": "Tuesday",
    }


def test_other_settings_are_not_mixed(tmp_path: Path) -> None:
    file = write(tmp_path / "quality.json", result("Monday", "w8a8", prompts=16))
    with pytest.raises(SystemExit, match="other settings"):
        merged(file, result("Tuesday", "w4a4"))


def test_times_of_other_threads_than_the_results_are_told(tmp_path: Path) -> None:
    old, new = result("Monday", "w8a8"), result("Tuesday", "w4a4")
    old["machine"]["omp_num_threads"] = "1"
    found = merged(write(tmp_path / "cost.json", old), new)
    one = {"finetune": {"cores": 2, "threads": "1"}, "parity": {}}
    assert elsewhere(found, {"w8a8": one}) == ""
    assert "told above: finetune of W4A4, build of fp32." in elsewhere(
        found, {"w8a8": one, "w4a4": one, "fp32": {"build": {"cores": 3, "threads": None}}}
    )

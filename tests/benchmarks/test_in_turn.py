"""Ratios of neighbours."""

from __future__ import annotations

import pytest

from benchmarks.in_turn import in_turn, times_as_fast


def test_each_runs_once_a_round_and_another_one_is_first() -> None:
    ran: list[str] = []
    seconds = in_turn({name: lambda name=name: ran.append(name) for name in "abc"}, 4)
    assert ["".join(ran[start : start + 3]) for start in range(0, len(ran), 3)] == [
        "abc",
        "abc",
        "bca",
        "cab",
        "abc",
    ]
    assert {name: len(times) for name, times in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_machine_that_slows_down_changes_no_ratio() -> None:
    drift = [1.0, 1.5, 2.0, 4.0]
    seconds = {"base": [3 * speed for speed in drift], "ours": [2 * speed for speed in drift]}
    (found,) = times_as_fast(seconds, "base").values()
    assert all(value == pytest.approx(1.5) for value in found.values())


def test_the_interval_holds_what_rounds_disagree_on() -> None:
    found = times_as_fast({"base": [1.0] * 40, "ours": [0.9, 1.1] * 20}, "base")["ours"]
    assert found["low"] < 1 < found["high"]

from __future__ import annotations

import pytest

from benchmarks.tables import MISSING, Table, interval, markdown, number


def test_markdown_aligns_labels_left_and_figures_right() -> None:
    table = Table(title="T", columns=("a", "b", "c"), rows=(("x", "y|z", "1"),), note="n", labels=2)
    assert markdown(table) == ("### T\n\n| a | b | c |\n| --- | --- | --: |\n| x | y\\|z | 1 |\n\nn\n")


def test_a_row_of_wrong_length_is_refused() -> None:
    with pytest.raises(ValueError, match="expected 2 cells"):
        Table(title="T", columns=("a", "b"), rows=(("x",),))


@pytest.mark.parametrize(
    ("value", "text"), [(1.234, "1.23"), ("identical", "identical"), (None, MISSING), (-0.5, "-0.50")]
)
def test_number(value: float | str | None, text: str) -> None:
    assert number(value) == text


def test_interval_shows_signs_and_what_is_unknown() -> None:
    assert interval({"low": 0.5, "mean": 1.0, "high": 1.5}) == "+1.00 (+0.50 to +1.50)"
    # One prompt tells nothing about spread: its infinite ends are null in JSON.
    assert interval({"low": None, "mean": -1.0, "high": None}) == f"-1.00 ({MISSING} to {MISSING})"
    assert interval(None) == MISSING

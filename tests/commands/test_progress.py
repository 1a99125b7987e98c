"""Progress where there is no terminal: few lines, with ETA and figures."""

from __future__ import annotations

import logging

import pytest

from quest_deploy.commands.progress import LineProgress, time_left
from quest_deploy.config import ProgressEvent


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def lines(caplog: pytest.LogCaptureFixture, events: list[tuple[float, ProgressEvent]]) -> list[str]:
    caplog.set_level(logging.INFO, logger="quest_deploy")
    clock = Clock()
    progress = LineProgress(clock)
    for clock.now, event in events:
        progress(event)
    return caplog.messages


def event(completed: int, total: int = 100, **values: object) -> ProgressEvent:
    return ProgressEvent(stage="phase 1", completed=completed, total=total, **values)  # type: ignore[arg-type]


def test_lines_are_at_least_seconds_apart(caplog: pytest.LogCaptureFixture) -> None:
    shown = lines(caplog, [(0.1 * i, event(i, 1000)) for i in range(120)])
    assert [line.split(",")[0] for line in shown] == ["phase 1 0/1000", "phase 1 50/1000", "phase 1 100/1000"]


def test_first_and_last_are_always_shown(caplog: pytest.LogCaptureFixture) -> None:
    assert lines(caplog, [(0.0, event(0)), (0.1, event(50)), (0.2, event(100))]) == [
        "phase 1 0/100",
        "phase 1 100/100",
    ]


def test_eta_counts_from_where_a_resumed_run_began(caplog: pytest.LogCaptureFixture) -> None:
    """60 done before, 10 in 20 s: 30 left take 60 s."""
    assert lines(caplog, [(0.0, event(60)), (20.0, event(70))])[-1] == "phase 1 70/100, ETA 0:01:00"


@pytest.mark.parametrize(
    ("seconds", "completed", "left", "shown"),
    [(20.0, 10, 30, "0:01:00"), (20.0, 0, 40, "None"), (20.0, 40, 0, "None")],
    ids=["pace", "no-pace-yet", "nothing-left"],
)
def test_time_left_follows_from_the_pace_of_the_whole_stage(
    seconds: float, completed: int, left: int, shown: str
) -> None:
    assert str(time_left(seconds, completed, left)) == shown


def test_metrics_and_message_are_shown(caplog: pytest.LogCaptureFixture) -> None:
    shown = lines(caplog, [(0.0, event(100, metrics={"loss": 0.012345}, message="saved"))])
    assert shown == ["phase 1 100/100, loss 0.01235, saved"]


def test_a_new_stage_begins_a_new_line(caplog: pytest.LogCaptureFixture) -> None:
    other = ProgressEvent(stage="phase 2", completed=0, total=10)
    assert lines(caplog, [(0.0, event(0)), (0.1, other)])[-1] == "phase 2 0/10"


def test_unknown_total_gives_no_eta(caplog: pytest.LogCaptureFixture) -> None:
    shown = lines(caplog, [(0.0, event(0, 0)), (9.0, event(7, 0))])
    assert shown[-1] == "phase 1 7/0"

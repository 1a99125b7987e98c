"""Progress on standard error: a bar with ETA and loss on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta

from quest_deploy.config import ProgressEvent

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 5.0

Progress = Callable[[ProgressEvent], None]


def format_metrics(metrics: Mapping[str, float]) -> str:
    """`loss 0.0123, snr_db 24.1`."""
    return ", ".join(f"{name} {value:.4g}" for name, value in metrics.items())


def time_left(seconds: float, completed: float, left: float) -> timedelta | None:
    """How long `left` units take at the pace of the `completed` ones; None without a pace, or with nothing left.

    The pace is that of the whole stage: builds and exports go by leaps, whose own pace says nothing.
    """
    return timedelta(seconds=round(seconds / completed * left)) if completed > 0 and left > 0 else None


class LineProgress:
    """Log lines: the first and last of each stage, and between them one every few seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.stage = ""
        self.started = 0.0
        self.started_at = 0
        self.last_line = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        now = self.clock()
        new_stage = event.stage != self.stage
        if new_stage:
            self.stage, self.started, self.started_at = event.stage, now, event.completed
        if not new_stage and event.completed < event.total and now - self.last_line < SECONDS_BETWEEN_LINES:
            return
        self.last_line = now
        parts = [f"{event.stage} {event.completed}/{event.total}"]
        left = time_left(now - self.started, event.completed - self.started_at, event.total - event.completed)
        if left is not None:
            parts.append(f"ETA {left}")
        parts += [text for text in (format_metrics(event.metrics), event.message) if text]
        logger.info("%s", ", ".join(parts))


@contextlib.contextmanager
def show_progress() -> Iterator[Progress]:
    """A progress callback for the stages, shown while the body runs."""
    if sys.stderr is None or not sys.stderr.isatty():  # None where it was closed before Python started
        yield LineProgress()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        ProgressColumn,
        Task,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Eta(ProgressColumn):
        """Counts down to when the stage would end at the pace it had when it was last heard of."""

        def render(self, task: Task) -> Text:
            ends_at = task.fields["ends_at"]
            if ends_at is None:
                return Text("-:--:--")
            return Text(str(timedelta(seconds=round(max(0.0, ends_at - time.monotonic())))))

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        Eta(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Bars(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}
        began: dict[str, tuple[float, int]] = {}

        def update(event: ProgressEvent) -> None:
            if event.stage not in tasks:
                tasks[event.stage] = bars.add_task(event.stage, total=event.total, note="", ends_at=None)
                began[event.stage] = (time.monotonic(), event.completed)
            note = ", ".join(text for text in (format_metrics(event.metrics), event.message) if text)
            now, (at, done) = time.monotonic(), began[event.stage]
            left = time_left(now - at, event.completed - done, event.total - event.completed)
            bars.update(
                tasks[event.stage],
                completed=event.completed,
                total=event.total,
                note=note,
                ends_at=None if left is None else now + left.total_seconds(),
            )

        yield update

"""Comparing what is a few per cent apart on a machine whose speed changes by more than that."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any


def in_turn(runners: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each runner, after one run that warms up: one after the other, another one first in every round."""
    for runner in runners.values():
        runner()
    names = [*runners]
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        first = turn % len(names)
        for name in (*names[first:], *names[:first]):
            started = time.perf_counter()
            runners[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def times_as_fast(seconds: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """How many times as fast as `base` the others are: the median over rounds, and its 95 % bootstrap interval."""
    from quest_deploy.metrics import paired_interval

    found = {}
    for name, own in seconds.items():
        if name != base:
            logs = [math.log(theirs / mine) for theirs, mine in zip(seconds[base], own, strict=True)]
            low, median, high = paired_interval(logs, statistic="median")
            found[name] = {"low": math.exp(low), "median": math.exp(median), "high": math.exp(high)}
    return found


def as_text(ratio: Mapping[str, float]) -> str:
    """A ratio of :func:`times_as_fast` and its interval."""
    return f"{ratio['median']:.3f} ({ratio['low']:.3f} to {ratio['high']:.3f})"

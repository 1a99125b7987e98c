"""Figures from the seconds of single calls."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

P95_VALUES = 20
"""Of fewer values, the 95th percentile is the largest."""


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least `share` of them do not exceed.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("got no values, expected at least one")
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def p95(values: Sequence[float]) -> float | None:
    """The 95th percentile; None of so few values that it would be the largest by another name."""
    return percentile(values, 0.95) if len(values) >= P95_VALUES else None


def summarize(turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures of one subject.

    Args:
        turns: What :func:`quest_deploy.bench.worker.measure` gave in each of its processes.

    Returns:
        `loop`: seconds of the whole loop (median, p95, slowest), images a second, and `overhead`, the share of a run's
        time that no engine was called in (median over runs); `components`: calls a run, seconds of a call (median,
        p95) and of all calls of a run (median); p95 is None of fewer than `P95_VALUES` runs or calls;
        `memory_bytes`: the highest of all processes, of each kind that `measure` tells of.
    """
    loops = [seconds for turn in turns for seconds in turn["loops"]]
    components, inside = {}, [0.0] * len(loops)
    for name in turns[0]["calls"]:
        runs = [run for turn in turns for run in turn["calls"][name]]
        inside = [sum_ + sum(run) for sum_, run in zip(inside, runs, strict=True)]
        calls = [seconds for run in runs for seconds in run]
        if calls:
            components[name] = {
                "calls": len(runs[0]),
                "median_s": statistics.median(calls),
                "p95_s": p95(calls),
                # Not calls times their median: a run's last batch may be smaller.
                "run_median_s": statistics.median(map(sum, runs)),
            }
    overheads = [(loop - engines) / loop for loop, engines in zip(loops, inside, strict=True)]
    median = statistics.median(loops)
    memory = [turn["memory_bytes"] for turn in turns]
    return {
        "loop": {
            "runs": len(loops),
            "median_s": median,
            "p95_s": p95(loops),
            "slowest_s": max(loops),
            "images_per_s": turns[0]["images"] / median,
            "overhead": statistics.median(overheads),
        },
        "components": components,
        "memory_bytes": {
            key: max((one[key] for one in memory if one[key] is not None), default=None) for key in memory[0]
        },
        "device": turns[0]["device"],
    }

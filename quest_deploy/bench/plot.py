"""A picture of the rows: seconds of one run, by component and outside of all engines."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH, ROW_HEIGHT = 9.0, 0.55
OUTSIDE = "outside of engines"


def parts(row: Mapping[str, Any]) -> dict[str, float]:
    """Seconds of a run by component, the median over runs each, and the rest."""
    found = {name: one["run_median_s"] for name, one in row["components"].items()}
    return {**found, OUTSIDE: row["loop"]["overhead"] * row["loop"]["median_s"]}


def plot(rows: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> str:
    """Stacked bars as SVG, the labels in `order` from the top; rows that could not be measured are left out."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    measured = {label: parts(rows[label]) for label in order if "loop" in rows[label]}
    names = list(dict.fromkeys(name for one in measured.values() for name in one))
    # Labels are paths, in which a dollar begins no formula.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "quest-deploy", "text.parse_math": False}):
        figure = Figure(figsize=(WIDTH, ROW_HEIGHT * len(measured) + 1.2), layout="constrained")
        axes = figure.add_subplot()
        left = [0.0] * len(measured)
        for name in names:
            widths = [one.get(name, 0.0) for one in measured.values()]
            axes.barh(range(len(measured)), widths, left=left, label=name, height=0.6)
            left = [before + width for before, width in zip(left, widths, strict=True)]
        axes.set_yticks(range(len(measured)), list(measured))
        axes.invert_yaxis()
        axes.set_xlabel("seconds of one run, median")
        axes.legend(loc="best", fontsize=8)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()

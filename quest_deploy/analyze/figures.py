"""The plots of an analysis, each a function from the content of ``analysis.json`` to inline SVG.

Colours are written as the page's CSS variables, so that plots follow its light or dark theme.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# Stand-ins that matplotlib takes for colours, and what they become.
TEXT, SOFT, LINE = "#010203", "#010204", "#010205"
PALETTE = ("#010210", "#010211", "#010212", "#010213", "#010214", "#010215")
VARIABLES = {
    TEXT: "var(--text)",
    SOFT: "var(--soft)",
    LINE: "var(--line)",
    **{color: f"var(--c{index})" for index, color in enumerate(PALETTE)},
}
ROLE_COLORS = {"temporal": PALETTE[2], "other": PALETTE[1], "boundary": PALETTE[3]}
COLORMAP = "viridis"
WIDTH = 11.0
TOP_LAYERS = 20
# Of a plot with a row for each layer: room for the label of its colour bar, however few there are.
LEAST_HEIGHT = 2.6
# Any: matplotlib lists the names of its settings in the type.
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "quest-deploy",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": TEXT,
    "axes.labelcolor": SOFT,
    "axes.edgecolor": LINE,
    "axes.titlecolor": TEXT,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element for a page."""
    stream = io.StringIO()
    with rc_context(STYLE):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    tag, _, content = text[text.index("<svg") :].partition(">")
    # As wide as the page.
    text = re.sub(r' (?:width|height)="[^"]*"', "", tag) + ">" + content
    for stand_in, variable in VARIABLES.items():
        text = text.replace(stand_in, variable)
    # Names like axes_1 would stand in the page once for each figure; nothing refers to them.
    return re.sub(r' id="[A-Za-z0-9]+_\d+"', "", text)


def sensitivity_bars(sensitivity: Mapping[str, Any], bits: str) -> Figure:
    """The layers that quantizing to `bits` alone harms most."""
    ranked = rank(sensitivity["layers"], bits)[:TOP_LAYERS]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 0.26 * len(ranked) + 1.2))
        axes = figure.add_subplot()
        values = [typical_error(layer, bits) for layer in ranked]
        axes.barh(
            range(len(ranked)), values, color=[ROLE_COLORS[layer["role"]] for layer in ranked], height=0.7
        )
        axes.set_yticks(range(len(ranked)), [layer["name"] for layer in ranked], fontsize=8)
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(f"relative error of the noise prediction, {bits.upper()}")
        _role_legend(figure, [layer["role"] for layer in ranked])
    return figure


def sensitivity_by_depth(sensitivity: Mapping[str, Any], run_order: Sequence[str]) -> Figure:
    """Every layer's damage along the network, for each of the bits measured alone."""
    by_name = {layer["name"]: layer for layer in sensitivity["layers"]}
    ordered = [by_name[name] for name in run_order]
    alone = [bits for bits in sensitivity["bits"] if bits in ("w4", "a4", "w8", "a8")] or sensitivity["bits"]
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.6))
        axes = figure.add_subplot()
        for color, bits in zip(PALETTE[1:], alone, strict=False):
            values = [typical_error(layer, bits) for layer in ordered]
            axes.plot(values, color=color, linewidth=1.4, marker="o", markersize=2.5, label=bits.upper())
        axes.set_yscale("log")
        axes.set_xlabel("layer, in the order in which they run")
        axes.set_ylabel("relative error")
        figure.legend(loc="outside upper right", ncols=len(alone))
    return figure


def sensitivity_by_timestep(sensitivity: Mapping[str, Any], bits: str) -> Figure:
    """When the most harmed layers harm."""
    ranked = rank(sensitivity["layers"], bits)[:TOP_LAYERS]
    rows = [
        [max(value, 1e-12) for value in layer["damage"][bits]["relative_error_by_step"]] for layer in ranked
    ]
    names = [layer["name"] for layer in ranked]
    return _heatmap(rows, names, sensitivity["timesteps"], f"relative error, {bits.upper()}", log=True)


def temporal_distance(temporal: Mapping[str, Any], timesteps: Sequence[float]) -> Figure:
    """Relative error and cosine of every temporal layer's output, the time embedding in bold."""
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.8))
        panels = figure.subplots(1, 2)
        for (when, label), color in zip(
            (("start", "before finetuning"), ("checkpoint", "after")), (PALETTE[2], PALETTE[1]), strict=True
        ):
            if temporal[when] is None:
                continue
            for name, figures in temporal[when]["layers"].items():
                bold = name == temporal["embedding"]
                for axes, key in zip(panels, ("relative_error", "cosine"), strict=True):
                    axes.plot(
                        timesteps,
                        figures[key],
                        color=color,
                        linewidth=2.6 if bold else 0.7,
                        alpha=1.0 if bold else 0.45,
                        zorder=3 if bold else 2,
                        label=f"time embedding, {label}" if bold and axes is panels[0] else None,
                    )
        for axes, title in zip(panels, ("norm of the error, relative", "cosine"), strict=True):
            axes.set_title(title)
            axes.set_xlabel("timestep")
            axes.invert_xaxis()
        panels[0].set_ylim(bottom=0)
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def confusion_maps(temporal: Mapping[str, Any], timesteps: Sequence[float]) -> Figure:
    """Distance of each quantized time embedding to every true one."""
    shown = [
        (label, temporal[when]["confusion"])
        for when, label in (("start", "before finetuning"), ("checkpoint", "after finetuning"))
        if temporal[when] is not None and temporal[when]["confusion"] is not None
    ]
    with rc_context(STYLE):
        figure = Figure(figsize=(5.2 * len(shown), 4.2))
        panels = figure.subplots(1, len(shown), squeeze=False)[0]
        distances = [value for _, part in shown for line in part["distance"] for value in line]
        norm = LogNorm(max(min(distances), max(distances) * 1e-4), max(distances))
        for axes, (label, part) in zip(panels, shown, strict=True):
            drawn = axes.imshow(part["distance"], cmap=COLORMAP, norm=norm, aspect="equal")
            axes.plot(part["nearest"], range(len(timesteps)), "o", color="#ffffff", markersize=3)
            axes.set_title(f"{label}: {part['mistaken']:.0%} mistaken")
            _timestep_ticks(axes, timesteps, "x")
            _timestep_ticks(axes, timesteps, "y")
            axes.set_xlabel("true time embedding, timestep")
            axes.grid(visible=False)
        panels[0].set_ylabel("quantized time embedding, timestep")
        figure.colorbar(drawn, ax=list(panels), label="distance, relative")
    return figure


def range_by_timestep(
    activations: Mapping[str, Any], timesteps: Sequence[float], names: Sequence[str]
) -> Figure:
    """Each layer's range at every timestep, relative to its widest."""
    rows = []
    for name in names:
        series = activations[name]["by_timestep"]
        ranges = [high - low for low, high in zip(series["min"], series["max"], strict=True)]
        rows.append([value / max(*ranges, 1e-12) for value in ranges])
    return _heatmap(rows, list(names), timesteps, "range, relative to the widest", log=False)


def imbalance_scatter(before: Mapping[str, Any], after: Mapping[str, Any] | None) -> Figure:
    """Channel imbalance, timestep imbalance and kurtosis of all layers, sorted; after finetuning beside it."""
    quantities = (
        ("channel_imbalance", "channels: largest / median"),
        ("timestep_imbalance", "timesteps: widest / narrowest range"),
        ("kurtosis", "kurtosis (a Gaussian's is 3)"),
    )
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 3.4))
        for axes, (key, title) in zip(figure.subplots(1, 3), quantities, strict=True):
            order = sorted(before, key=lambda name: -before[name][key])
            # A line needs two points.
            marker = "o" if len(order) == 1 else None
            values = [before[name][key] for name in order]
            axes.plot(values, color=PALETTE[2], label="before", linewidth=2, marker=marker)
            if after is not None:
                # Time-embedding tables leave some layers without a counterpart.
                values = [after[name][key] if name in after else math.nan for name in order]
                axes.plot(values, ".", color=PALETTE[1], label="after", markersize=4)
                if key == "channel_imbalance":
                    rows = [after.get(name, {}).get("quantized_channel_imbalance") for name in order]
                    if any(value is not None for value in rows):
                        axes.plot(
                            [index for index, value in enumerate(rows) if value is not None],
                            [value for value in rows if value is not None],
                            "x",
                            color=PALETTE[3],
                            label="behind the channel row",
                            markersize=4,
                        )
            axes.set_yscale("log")
            axes.set_title(title)
            axes.set_xlabel("layers, sorted")
            if after is not None:
                axes.legend()
    return figure


def histogram_grid(histograms: Mapping[str, Any], timesteps: Sequence[float]) -> Figure:
    """Distribution of the worst layers' inputs at a few timesteps; dashed after finetuning."""
    before, after = histograms["before"], histograms["after"]
    names = list(before)
    columns = 2
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, 2.6 * -(-len(names) // columns)))
        grid = figure.subplots(-(-len(names) // columns), columns, squeeze=False).ravel()
        for axes, name in zip(grid, names, strict=False):
            for style, part in (("-", before), ("--", after)):
                if part is None or name not in part:
                    continue
                edges = part[name]["edges"]
                middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
                for color, (step, share) in zip(
                    PALETTE[1:], part[name]["share_by_step"].items(), strict=False
                ):
                    axes.plot(
                        middles,
                        share,
                        style,
                        color=color,
                        linewidth=1.3,
                        label=f"t = {_timestep(timesteps[int(step)])}" if style == "-" else None,
                    )
            axes.set_yscale("symlog", linthresh=1e-3)
            axes.set_ylim(bottom=0)
            axes.set_title(name, fontsize=8)
            axes.set_xlabel("value", fontsize=8)
            axes.set_ylabel("share of values")
        for axes in grid[len(names) :]:
            axes.set_visible(False)
        grid[0].legend(fontsize=8)
    return figure


def rank(layers: Sequence[Mapping[str, Any]], bits: str) -> list[Mapping[str, Any]]:
    """The layers from most to least harmed at `bits`."""
    return sorted(layers, key=lambda layer: layer["damage"][bits]["snr_db"])


def typical_error(layer: Mapping[str, Any], bits: str) -> float:
    """The geometric mean of the relative error, so that no timestep decides alone."""
    return 10 ** (-layer["damage"][bits]["snr_db"] / 10)


def _heatmap(
    rows: list[list[float]], names: list[str], timesteps: Sequence[float], label: str, *, log: bool
) -> Figure:
    values = [value for row in rows for value in row]
    high = max(values)
    norm = (
        LogNorm(max(min(values), high * 1e-4), high) if log and high > 0 else Normalize(0, max(high, 1e-12))
    )
    with rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, max(0.24 * len(rows) + 1.0, LEAST_HEIGHT)))
        axes = figure.add_subplot()
        drawn = axes.imshow(rows, aspect="auto", cmap=COLORMAP, norm=norm, interpolation="nearest")
        axes.set_yticks(range(len(names)), names, fontsize=8)
        _timestep_ticks(axes, timesteps, "x")
        axes.set_xlabel("timestep")
        axes.grid(visible=False)
        figure.colorbar(drawn, ax=axes, label=label)
    return figure


def _timestep_ticks(axes: Axes, timesteps: Sequence[float], which: str) -> None:
    stride = max(1, -(-len(timesteps) // 9))
    places = range(0, len(timesteps), stride)
    labels = [_timestep(timesteps[place]) for place in places]
    (axes.set_xticks if which == "x" else axes.set_yticks)(places, labels)


def _timestep(value: float) -> str:
    """In at most three digits or four: continuous schedules have timesteps such as 877.909."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _role_legend(figure: Figure, roles: Sequence[str]) -> None:
    shown = [Patch(color=color, label=role) for role, color in ROLE_COLORS.items() if role in roles]
    figure.legend(handles=shown, loc="outside upper right", ncols=len(shown))

"""``report.html``: one self-contained page from the content of a parity report and the images that were drawn.

Knows the report's JSON, not how it was measured. Everything is inlined: pictures as PNG data, plots as SVG.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import torch
from PIL import Image
from torch import Tensor

TEMPLATE = "parity.html.j2"
MAX_ROWS = 8
MAX_SIDE = 256
MAX_LAYERS = 10
DIFFERENCE_GAIN = 4

PLOT_WIDTH, PLOT_HEIGHT = 880, 340
PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM = 64, 16, 16, 52


@dataclass(frozen=True, kw_only=True)
class RungImages:
    """What one rung drew.

    Attributes:
        name: The rung's.
        images: float32 [n, 3, H, W] in [0, 1].
    """

    name: str
    images: Tensor


@dataclass(frozen=True, kw_only=True)
class Line:
    """One curve of a plot.

    Attributes:
        name: For the legend.
        color: Index into the page's palette.
        median: SVG path.
        band: SVG path of the interquartile range, closed.
        identical: Whether every point is an exact match (then there is nothing to draw).
    """

    name: str
    color: int
    median: str
    band: str
    identical: bool


@dataclass(frozen=True, kw_only=True)
class Plot:
    """A plot in SVG coordinates; ticks are pairs of a position and a label."""

    lines: tuple[Line, ...]
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    limit: float | None


def write_report(path: Path, document: Mapping[str, Any], rungs: Sequence[RungImages]) -> None:
    """Write the page for `document`, the content of ``report.json``."""
    path.write_text(render(document, rungs), encoding="utf-8")


def render(document: Mapping[str, Any], rungs: Sequence[RungImages]) -> str:
    """The page as HTML. Every string of the document is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quest_deploy", "data/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(figure=figure, size=size_text)
    template = environment.get_template(TEMPLATE)
    colors = {rung["name"]: index for index, rung in enumerate(document["rungs"])}
    free = [
        (rung["name"], rung["against_reference"]["noise_snr_db"])
        for rung in document["rungs"]
        if rung["against_reference"]
    ]
    deployed = [
        (edge["lower"], edge["noise_snr_db"])
        for edge in document["edges"]
        if edge["kind"] == "deployment" and edge["noise_snr_db"]
    ]
    floors = [gate["limit"] for gate in document["gates"] if gate["quantity"] == "noise SNR, worst step"]
    explanation = "The same weights in another runtime, on identical latents. "
    alone = "Left alone, so one flipped code shows as quantization noise: the limit holds for the same codes, above."
    if floors and len(floors) < len(deployed):
        explanation += (
            f"The dashed line is the limit of full precision. Quantized: {alone[0].lower()}{alone[1:]}"
        )
    else:
        explanation += "The dashed line is the limit." if floors else alone
    return template.render(
        report=document,
        groups=gate_groups(document["gates"]),
        plots=[
            (title, text, make_plot(series, document["timesteps"], colors, limit))
            for title, text, series, limit in (
                (
                    "Noise SNR on the reference’s trajectory",
                    "Each rung predicts the noise for the latents that the reference visited.",
                    free,
                    None,
                ),
                (
                    "Noise SNR on the upper rung’s trajectory (deployment)",
                    explanation,
                    deployed,
                    max(floors, default=None),
                ),
            )
            if series
        ],
        plot_size=(PLOT_WIDTH, PLOT_HEIGHT, PLOT_LEFT, PLOT_RIGHT, PLOT_TOP, PLOT_BOTTOM),
        grid=image_grid(document, rungs),
        gain=DIFFERENCE_GAIN,
        layers=worst_layers(document["edges"]),
        summary=summary(document),
    )


def figure(value: float | str | None, unit: str = "") -> str:
    """A figure as people read it."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if value != 0 and abs(value) < 0.01:
        text = f"{value:.1e}"
    elif unit == "dB":
        text = f"{value:.2f}"
    else:
        text = f"{value:.4g}"
    return f"{text} {unit}".strip()


def size_text(size_bytes: int) -> str:
    """Bytes in decimal units."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{size_bytes / scale:.1f} {unit}"
    return f"{size_bytes} B"


def gate_groups(gates: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, list[Mapping[str, Any]]]]:
    """The gates by whose cost they limit: title, explanation, rows."""
    titles = (
        (
            "quantization",
            "What quantization costs",
            "Against the full-precision reference; floors from the budget.",
        ),
        (
            "deployment",
            "What deployment costs",
            "The same weights in another runtime, against the rung above.",
        ),
        ("finite", "Sanity", "Every tensor of every step."),
    )
    groups = [(title, text, [gate for gate in gates if gate["kind"] == kind]) for kind, title, text in titles]
    return [group for group in groups if group[2]]


def summary(document: Mapping[str, Any]) -> str:
    """One sentence below the verdict."""
    failed = [gate for gate in document["gates"] if gate["passed"] is False]
    idle = [rung["name"] for rung in document["rungs"] if rung["status"] == "not run"]
    if failed:
        first = failed[0]
        return f"{len(failed)} of {len(document['gates'])} gates failed, first: {first['rung']}, {first['quantity']}."
    if idle:
        return f"No gate failed, but {', '.join(idle)} could not be run on this machine."
    if not document["gates"]:
        return "Every rung was run; no gate applied."
    return f"All {sum(gate['passed'] is True for gate in document['gates'])} measured gates passed."


def make_plot(
    series: Sequence[tuple[str, Mapping[str, Any]]],
    timesteps: Sequence[float],
    colors: Mapping[str, int],
    limit: float | None,
) -> Plot:
    """Place curves over denoising steps.

    Args:
        series: A name and the lists "median", "q25" and "q75", in dB, for each curve.
        timesteps: Of the schedule, for the labels.
        colors: Palette index of each name.
        limit: A floor to draw.
    """
    drawn = [
        value
        for _, snr in series
        for key in ("q25", "median", "q75")
        for value in snr[key]
        if isinstance(value, (int, float))
    ]
    drawn += [] if limit is None else [limit]
    ticks = _ticks(min(drawn, default=0.0), max(drawn, default=1.0))
    low, high = ticks[0], ticks[-1]
    last = max(len(timesteps) - 1, 1)

    def x(index: int) -> float:
        return round(PLOT_LEFT + (PLOT_WIDTH - PLOT_LEFT - PLOT_RIGHT) * index / last, 1)

    def y(value: float) -> float:
        height = PLOT_HEIGHT - PLOT_TOP - PLOT_BOTTOM
        return round(PLOT_TOP + height * (1 - (value - low) / (high - low)), 1)

    lines = []
    for name, snr in series:
        # An exact match has no place on a decibel axis, and a NaN none at all: the curve has a gap there.
        pieces: list[list[tuple[float, float, float, float]]] = [[]]
        for index, values in enumerate(zip(snr["median"], snr["q25"], snr["q75"], strict=True)):
            if all(isinstance(value, (int, float)) for value in values):
                middle, bottom, top = map(y, values)
                pieces[-1].append((x(index), middle, bottom, top))
            elif pieces[-1]:
                pieces.append([])
        pieces = [piece for piece in pieces if piece]
        lines.append(
            Line(
                name=name,
                color=colors[name],
                median="".join(_path([f"{px},{middle}" for px, middle, _, _ in piece]) for piece in pieces),
                band="".join(_band(piece) for piece in pieces),
                identical=all(value == "identical" for value in snr["median"]),
            )
        )
    stride = max(1, -(-len(timesteps) // 12))
    return Plot(
        lines=tuple(lines),
        x_ticks=tuple((x(index), f"{index + 1}") for index in range(0, len(timesteps), stride)),
        y_ticks=tuple((y(value), f"{value:g}") for value in ticks),
        limit=None if limit is None else y(limit),
    )


def image_grid(document: Mapping[str, Any], rungs: Sequence[RungImages]) -> dict[str, Any]:
    """Rows of pictures, from the prompt that the last rung changed most to the one it changed least.

    Returns:
        ``columns`` (names), ``rows`` (prompt, seed and cells with picture, difference, PSNR and SSIM), ``total``,
        ``side`` (display size in CSS pixels) and ``pixelated`` (whether pictures are shown enlarged).
    """
    compared = {rung["name"]: rung["against_reference"] for rung in document["rungs"]}
    order = _spread(compared[rungs[-1].name], len(document["prompts"]))
    rows = []
    for number in order:
        cells = []
        for rung in rungs:
            against = compared[rung.name]
            cells.append(
                {
                    "rung": rung.name,
                    "picture": png_uri(rung.images[number]),
                    "difference": None if against is None else png_uri(_difference(rungs[0], rung, number)),
                    "psnr": None if against is None else against["image_psnr_db"]["per_prompt"][number],
                    "ssim": None if against is None else against["image_ssim"]["per_prompt"][number],
                }
            )
        rows.append(
            {"prompt": document["prompts"][number], "seed": document["seeds"][number], "cells": cells}
        )
    side = min(max(rungs[0].images.shape[-2:]), MAX_SIDE)
    return {
        "columns": [rung.name for rung in rungs],
        "rows": rows,
        "total": len(document["prompts"]),
        "side": max(side, 128),
        "pixelated": side < 128,
    }


def worst_layers(edges: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """The layers with the most code flips, for each edge on which any code flipped."""
    tables = []
    for edge in edges:
        layers = [layer for layer in (edge["codes"] or {}).get("layers", ()) if layer["differing"]]
        layers.sort(key=lambda layer: layer["differing"] / layer["places"], reverse=True)
        if layers:
            tables.append((f"{edge['upper']} → {edge['lower']}", layers[:MAX_LAYERS]))
    return tables


def png_uri(image: Tensor) -> str:
    """A picture [1 or 3, H, W] in [0, 1] as a data URI, at most :data:`MAX_SIDE` pixels high and wide."""
    image = image.expand(3, -1, -1)
    pixels = (torch.nan_to_num(image).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    picture = Image.fromarray(pixels.contiguous().numpy())
    picture.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _difference(reference: RungImages, rung: RungImages, number: int) -> Tensor:
    return (rung.images[number] - reference.images[number]).abs() * DIFFERENCE_GAIN


def _spread(against: Mapping[str, Any] | None, count: int) -> list[int]:
    """At most :data:`MAX_ROWS` prompts evenly over the ranking by PSNR, worst and best among them."""
    ranked = list(range(count))
    if against is not None:
        psnr = against["image_psnr_db"]["per_prompt"]
        # null (a NaN) is worse than any figure, "identical" better.
        rank = {None: float("-inf"), "identical": float("inf")}
        ranked.sort(key=lambda number: rank.get(psnr[number], psnr[number]))
    if count <= MAX_ROWS:
        return ranked
    return [ranked[round(row * (count - 1) / (MAX_ROWS - 1))] for row in range(MAX_ROWS)]


def _path(points: Sequence[str]) -> str:
    """A line through points; one alone is a line to itself, which round ends make a dot."""
    return "M" + "L".join(points if len(points) > 1 else [*points, *points])


def _band(piece: Sequence[tuple[float, float, float, float]]) -> str:
    upper_edge = [f"{px},{top}" for px, _, _, top in piece]
    return _path(upper_edge + [f"{px},{bottom}" for px, _, bottom, _ in reversed(piece)]) + "Z"


def _ticks(low: float, high: float) -> list[float]:
    """Round values from below `low` to above `high`, about five of them."""
    span = max(high - low, 1.0)
    step = next(
        step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if span / step <= 6 or step == 1000
    )
    first, final = int(low // step), int(-(-high // step))
    return [float(step * index) for index in range(first, max(final, first + 1) + 1)]

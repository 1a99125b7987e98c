"""``analysis.html``: one self-contained page from the content of ``analysis.json``."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from matplotlib.figure import Figure

from quest_deploy.analyze import figures
from quest_deploy.analyze.config import ACTIVATION_BITS
from quest_deploy.manifest import tool_versions
from quest_deploy.quantize.allocate import Bits

TEMPLATE = "analysis.html.j2"
TABLE_ROWS = 12
SUMMARY_BITS = ("a4", "w4", "a8", "w8")


def write_page(path: Path, document: Mapping[str, Any]) -> None:
    """Write the page for `document`."""
    path.write_text(render(document), encoding="utf-8")


def render(document: Mapping[str, Any]) -> str:
    """The page as HTML. Every string of the document is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("quest_deploy", "data/templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, typical_error=figures.typical_error)
    before = document["activations"]["before"]
    return environment.get_template(TEMPLATE).render(
        document=document,
        recipe=document["config"]["recipe"],
        sections=[section for section in sections(document) if section["plots"]],
        columns=(columns := [bits for bits in SUMMARY_BITS if bits in document["sensitivity"]["bits"]]),
        most_sensitive=most_sensitive(document["sensitivity"], columns),
        imbalanced=sorted(before, key=lambda name: -before[name]["timestep_imbalance"])[:TABLE_ROWS],
        tools=tool_versions(),
        machine=f"{platform.system()} {platform.machine()}",
    )


def most_sensitive(sensitivity: Mapping[str, Any], columns: Sequence[str]) -> list[Mapping[str, Any]]:
    """Rows of the table: the most harmed layers at the first of `columns`, or of whatever was measured."""
    return figures.rank(sensitivity["layers"], (*columns, *sensitivity["bits"])[0])[:TABLE_ROWS]


def sections(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Titles, explanations and plots, in the order of the page."""
    sensitivity, temporal = document["sensitivity"], document["temporal"]
    timesteps, observed = document["timesteps"], document["activations"]
    before = observed["before"]
    by_time = sorted(before, key=lambda name: -before[name]["timestep_imbalance"])[: figures.TOP_LAYERS]
    lowest = [bits for bits in ("a4", "w4") if bits in sensitivity["bits"]] or sensitivity["bits"][:1]
    plots = [
        plot(
            "Along the network",
            "Every layer quantized alone, all others in full precision.",
            figures.sensitivity_by_depth(sensitivity, document["run_order"]),
        )
    ]
    for bits in lowest:
        plots.append(
            plot(
                f"Most sensitive at {bits.upper()}",
                f"Layers whose {_what(bits)}.",
                figures.sensitivity_bars(sensitivity, bits),
            )
        )
        plots.append(
            plot(
                f"When it harms, {bits.upper()}",
                "The same layers, timestep by timestep.",
                figures.sensitivity_by_timestep(sensitivity, bits),
            )
        )
    result = [
        {
            "title": "Sensitivity",
            "text": "Squared error of the guided noise prediction over its square; geometric mean over "
            f"{len(sensitivity['timesteps'])} timesteps, {sensitivity['prompts_per_timestep']} trajectories at each.",
            "plots": plots,
        }
    ]
    plots = []
    if temporal["embedding"] is not None:
        plots = [
            plot(
                "Distance to the true outputs",
                "Outputs of the layers that carry time; bold: the time embedding. The error is a norm over a norm, not "
                "squared as the errors above.",
                figures.temporal_distance(temporal, timesteps),
            ),
            plot(
                "Which time is it?",
                "Each row is a quantized time embedding, each column a true one; the dot marks the nearest.",
                figures.confusion_maps(temporal, timesteps),
            ),
        ]
    result.append({"title": "Time embeddings", "text": "", "plots": plots})
    result.append(
        {
            "title": "Activations",
            "text": "Inputs of the layers on full-precision trajectories.",
            "plots": [
                plot(
                    "Imbalances",
                    "What one scale for all channels and timesteps would have to cover.",
                    figures.imbalance_scatter(before, observed["after"]),
                ),
                plot(
                    "Ranges over time",
                    "The layers whose ranges change most with the timestep.",
                    figures.range_by_timestep(before, timesteps, by_time),
                ),
                plot(
                    "Distributions",
                    f"Inputs of the layers {_why_these(sensitivity)}."
                    + (" Dashed: after finetuning." if document["histograms"]["after"] else ""),
                    figures.histogram_grid(document["histograms"], timesteps),
                ),
            ],
        }
    )
    return result


def _what(text: str) -> str:
    """What of a layer is quantized at bits such as "w4a8"."""
    bits = Bits.parse(text)
    parts = {"weight": bits.weight, "input": bits.activation}
    told = [f"{what} is quantized to {width} bits" for what, width in parts.items() if width is not None]
    return told[0].replace(" is", " alone is") if len(told) == 1 else " and whose ".join(told)


def _why_these(sensitivity: Mapping[str, Any]) -> str:
    """Why the layers of the distributions were chosen, as `quest_deploy.analyze.measure.worst_layers` does."""
    lowest = next((bits for bits in ACTIVATION_BITS if bits in sensitivity["bits"]), None)
    if lowest is None:
        return "whose ranges change most with the timestep"
    return f"that suffer most where their input alone is quantized to {lowest[1:]} bits"


def plot(title: str, text: str, figure: Figure) -> dict[str, Any]:
    """One figure of a section."""
    return {"title": title, "text": text, "svg": Markup(figures.to_svg(figure))}


def number(value: float | None) -> str:
    """A figure as people read it."""
    if value is None:
        return "–"
    return f"{value:.1e}" if value != 0 and abs(value) < 0.01 else f"{value:.4g}"

"""Render benchmarks/results/*.json as docs/results.md: `python -m benchmarks.report`."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from benchmarks.goals import goals
from benchmarks.merge import MEASURED
from benchmarks.settings import DOCUMENT, RESULTS, ROOT
from benchmarks.tables import markdown
from quest_deploy.artifacts import read_json

HEADINGS = {
    "quality": "Quality",
    "baselines": "Baselines",
    "ablation": "Ablation",
    "initializers": "Rounding at the start",
    "kid": "Kernel distance",
    "order": "Cost of finetuning against the published order",
    "cost": "Time, memory and size",
    "engines": "Engines",
    "runtimes": "Deployment",
    "families": "Models without text",
    "modes": "Architectures and export modes",
    "large": "Large models",
    "cpu_speed": "Speed on the CPU",
    "generation": "Generation on the CPU",
    "gpu": "On a GPU",
    "analysis": "Sensitivity to low bits",
    "halves": "Weights and activations alone",
    "differences": "Differences from the published quantizers",
}
INTRODUCTION = """\
# Results

<!-- Rendered from benchmarks/results/*.json by `python -m benchmarks.report`. Do not edit. -->

What was measured on the bundled reference model. `make bench` measures it again; one benchmark alone:
`python -m benchmarks quality` (or `baselines`, `ablation`, `initializers`, `kid`, `order`, `cost`, `engines`,
`runtimes`, `families`, `modes`, `large`, `cpu_speed`, `generation`, `analysis`, `halves`, `differences`). What is told
of a GPU, `python -m benchmarks.gpu` puts together from files that a machine with one left.

W4A4 that was measured before 2026-11-28 is the recipe before its feed-forwards were rotated.
"""


def benchmark(name: str) -> Any:
    """The module of a benchmark. Only the one that is run is imported: one that holds torch cannot measure others."""
    return importlib.import_module(f"benchmarks.{name}")


def load(folder: Path) -> dict[str, Any]:
    """The results that are there, by benchmark."""
    files = {name: folder / f"{name}.json" for name in HEADINGS}
    return {name: read_json(file) for name, file in files.items() if file.is_file()}


def render(results: dict[str, Any], images: list[str]) -> str:
    """The document.

    Args:
        results: By benchmark.
        images: Names of the image grids, relative to the document.
    """
    parts = [INTRODUCTION]
    asked = goals(results)
    if asked is not None:
        parts.append(markdown(asked))
    for name, heading in HEADINGS.items():
        parts.append(f"## {heading}\n")
        if name not in results:
            parts.append("Not measured yet.\n")
            continue
        parts.append(provenance(results[name]))
        parts += [markdown(table) for table in benchmark(name).tables(results[name])]
        own = (image for image in images if Path(image).stem.startswith(f"{name}-"))
        parts += [f"![Rows of images by {Path(image).stem}]({image})\n" for image in own]
    return "\n".join(parts)


def provenance(result: dict[str, Any]) -> str:
    """When, where and with what something was measured, by recipe where that differs."""
    measured = result.get(MEASURED, {})
    if not measured:
        return f"{_provenance(result)}.\n"
    lines = [f"{name.upper()}: {_provenance(one)}." for name, one in sorted(measured.items())]
    return "\n\n".join(lines) + "\n"


def _provenance(result: dict[str, Any]) -> str:
    machine, versions = result["machine"], result["versions"]
    changed = " with uncommitted changes" if result["uncommitted_changes"] else ""
    commit = (result["commit"] or "unknown")[:12]
    tools = ", ".join(
        f"{name} {versions[name]}" for name in ("python", "torch", "onnxruntime") if name in versions
    )
    return (
        f"{result['date']}, commit `{commit}`{changed}; {machine['cpu']}, {machine['cores']} cores, "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB; {tools}"
    )


def current(root: Path = ROOT) -> str:
    """The document that the committed results render to."""
    folder = root / RESULTS
    images = sorted(f"../{RESULTS.as_posix()}/{file.name}" for file in folder.glob("*.png"))
    return render(load(folder), images)


def write() -> None:
    """Write the document."""
    document = ROOT / DOCUMENT
    document.parent.mkdir(exist_ok=True)
    document.write_text(current(), encoding="utf-8")
    print(f"wrote {DOCUMENT}")


if __name__ == "__main__":
    write()

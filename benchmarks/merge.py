"""Results of some recipes, put into a file that holds others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quest_deploy.artifacts import read_json

# What a result file has for each recipe.
BY_RECIPE = ("recipes", "checkpoints_made_by", "engines")
PROVENANCE = ("date", "machine", "versions", "commit", "uncommitted_changes")
MEASURED = "measured"


def merged(file: Path, result: dict[str, Any]) -> dict[str, Any]:
    """`result`, and what `file` has of recipes that were not measured now, each with when and where it was.

    Raises:
        SystemExit: those were measured otherwise (other prompts, other steps).
    """
    if not file.is_file():
        return result
    old = read_json(file)
    keys = [key for key in BY_RECIPE if key in result and key in old]
    kept = {name for key in keys for name in old[key]} - {name for key in keys for name in result[key]}
    if not kept:
        return result
    if _conditions(old) != _conditions(result):
        raise SystemExit(
            f"benchmarks: {file} was measured with other settings than these; measure all recipes, or remove it"
        )
    found = {
        key: {**{name: old[key][name] for name in kept if name in old[key]}, **result[key]} for key in keys
    }
    measured = {name: old.get(MEASURED, {}).get(name, _provenance(old)) for name in kept}
    measured |= {name: _provenance(result) for key in keys for name in result[key]}
    settings = {
        **result["settings"],
        "recipes": sorted({*old["settings"]["recipes"], *result["settings"]["recipes"]}),
    }
    return {**result, **found, "settings": settings, MEASURED: measured}


def _conditions(result: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in result["settings"].items() if key != "recipes"}


def _provenance(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in PROVENANCE}

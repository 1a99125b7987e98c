"""Results of some recipes, put into a file that holds others."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from quest_deploy.artifacts import read_json

# What a result file has for each recipe.
BY_RECIPE = (
    "recipes",
    "checkpoints_made_by",
    "engines",
    "stages",
    "denoiser_bytes",
    "denoiser_onnx_ratio",
    "recipe_digests",
)
# What others are compared with, which must not have changed between.
SHARED = ("fp32", "openvino", "modelopt", "prompts", "iterations", "images", "groups")
# Of every result that has full precision beside the recipes, what does not depend on how busy the machine is.
SHARED_SIZES = "denoiser_bytes"
FLOATS = ("fp32", "fp16")
PROVENANCE = ("date", "machine", "versions", "commit", "uncommitted_changes")
MEASURED = "measured"


def merged(file: Path, result: dict[str, Any], unused: Collection[str] = ()) -> dict[str, Any]:
    """`result`, and what `file` has of recipes that were not measured now, each with when and where it was.

    Args:
        file: Of results.
        result: Of now.
        unused: Settings that a benchmark does not go by, which may have changed.

    Raises:
        SystemExit: those were measured otherwise (other prompts, other steps, another full precision), or they cannot
            be kept.
    """
    if not file.is_file():
        return result
    old = read_json(file)
    missing = {*old["settings"]["recipes"]} - {*result["settings"]["recipes"]}
    if missing and "models" in old:
        raise SystemExit(f"benchmarks: {file} also holds {', '.join(sorted(missing))}; measure all recipes")
    keys = [key for key in BY_RECIPE if key in result and key in old]
    kept = {name for key in keys for name in old[key]} - {name for key in keys for name in result[key]}
    if not kept:
        return result
    changed = any(old.get(key) != result.get(key) for key in SHARED) or any(
        old.get(SHARED_SIZES, {}).get(name) != result.get(SHARED_SIZES, {}).get(name) for name in FLOATS
    )
    if changed or _conditions(old, unused) != _conditions(result, unused):
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


def elsewhere(result: dict[str, Any], stages: Mapping[str, Mapping[str, Any]]) -> str:
    """A sentence on times that were taken with other cores or threads than `result` tells of; empty without any.

    Args:
        result: Says by its header, and by recipe, where it was measured.
        stages: By recipe or type, what :func:`benchmarks.stages.make` gave for stages; earlier versions gave no cores.
    """
    found = []
    for name, outcomes in stages.items():
        machine = result.get(MEASURED, {}).get(name, result)["machine"]
        told = {"cores": machine["cores"], "threads": machine.get("omp_num_threads")}
        label = name if name in FLOATS else name.upper()
        found += [
            f"{stage} of {label}"
            for stage, outcome in outcomes.items()
            if any(outcome.get(key, value) != value for key, value in told.items())
        ]
    return f" **With other cores or threads than told above: {', '.join(found)}.**" if found else ""


def _conditions(result: dict[str, Any], unused: Collection[str]) -> dict[str, Any]:
    return {key: value for key, value in result["settings"].items() if key not in ("recipes", *unused)}


def _provenance(result: dict[str, Any]) -> dict[str, Any]:
    return {key: result[key] for key in PROVENANCE}

"""Time, memory and bytes of every stage and artifact, and how long `--help` takes."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import stages
from benchmarks.environment import header
from benchmarks.merge import elsewhere
from benchmarks.settings import MODEL, ROOT, Settings
from benchmarks.tables import MISSING, Table, megabytes, number, seconds
from quest_deploy.config import PhaseConfig, Recipe, to_dict
from quest_deploy.files import hash_mapping
from quest_deploy.manifest import MANIFEST_NAME
from quest_deploy.quantize.recipe import load_recipe
from scripts import demo

NAME = "cost"
TARGETS = ("onnxruntime", "tensorrt-rtx")
STAGES = ("finetune", *(f"export {target}" for target in TARGETS), "build-engine", "generate", "parity")
HELP_RUNS = 10
FLOAT32_BYTES, FLOAT16_BYTES = 4, 2
KINDS = {
    "checkpoint": "U-Net weights",
    "onnx-onnxruntime": "denoiser ONNX, onnxruntime",
    "onnx-tensorrt-rtx": "denoiser ONNX, tensorrt-rtx",
    "engine-tensorrt-rtx": "denoiser engine, tensorrt-rtx",
}


def run(settings: Settings) -> dict[str, Any]:
    """Run every stage of every recipe once."""
    outcomes: dict[str, dict[str, Any]] = {"fp32": {}}
    weights = unet_weights(MODEL / "unet")
    values = tensor_values(weights)
    sizes: dict[str, dict[str, int | None]] = {
        "fp32": {"checkpoint": values * FLOAT32_BYTES},
        "fp16": {"checkpoint": values * FLOAT16_BYTES},
    }
    _deploy(settings, "fp32", MODEL, outcomes["fp32"], sizes["fp32"])
    for name in settings.recipes:
        checkpoint, outcome = stages.finetuned(settings, name)
        outcomes[name], sizes[name] = {"finetune": outcome}, {}
        sizes[name]["checkpoint"] = unet_weights(checkpoint / "unet").stat().st_size
        onnx = _deploy(settings, name, checkpoint, outcomes[name], sizes[name])
        outcomes[name]["generate"] = stages.generate(settings, name, onnx)[1]
        outcomes[name]["parity"] = stages.parity(settings, name, checkpoint, onnx)[1]
    return {
        **header(settings),
        "stages": outcomes,
        "denoiser_bytes": sizes,
        "denoiser_onnx_ratio": {name: ratio(sizes, name, "onnx-onnxruntime") for name in settings.recipes},
        "help": time_help(),
        "recipe_digests": recipe_digests(settings.recipes),
    }


def _deploy(
    settings: Settings, name: str, source: Path, outcomes: dict[str, Any], sizes: dict[str, int | None]
) -> Path:
    """Export for every target and build; returns the ONNX for ONNX Runtime."""
    exported = {}
    for target in TARGETS:
        exported[target], outcomes[f"export {target}"] = stages.export(settings, name, source, target)
        sizes[f"onnx-{target}"] = demo.sizes(exported[target])["unet"]
    engines, outcomes["build-engine"] = stages.build(settings, name, exported["tensorrt-rtx"])
    built = (engines / MANIFEST_NAME).is_file() and outcomes["build-engine"]["exit_code"] == 0
    sizes["engine-tensorrt-rtx"] = demo.sizes(engines)["unet"] if built else None
    return exported["onnxruntime"]


def unet_weights(folder: Path) -> Path:
    """The one safetensors file of a denoiser."""
    (file,) = folder.glob("*.safetensors")
    return file


def tensor_values(file: Path) -> int:
    """How many numbers the tensors of a safetensors file hold, from its header."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        tensors = json.loads(stream.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in tensors.items() if name != "__metadata__")


def ratio(sizes: dict[str, dict[str, int | None]], name: str, kind: str) -> float | None:
    """Bytes of a recipe's denoiser over those of full precision."""
    part, whole = sizes[name].get(kind), sizes["fp32"].get(kind)
    return None if part is None or not whole else round(part / whole, 4)


def time_help() -> dict[str, Any]:
    """Wall time of `quest-deploy --help`, and of an interpreter that does nothing."""
    command = [str(Path(sys.executable).with_name("quest-deploy")), "--help"]
    # Alternating, so that whatever else the machine does hits both.
    pairs = [(_wall(command), _wall([sys.executable, "-c", "pass"])) for _ in range(HELP_RUNS)]
    help_seconds, python_seconds = (statistics.median(values) for values in zip(*pairs, strict=True))
    return {
        "seconds": round(help_seconds, 4),
        "python_seconds": round(python_seconds, 4),
        "ratio": round(help_seconds / python_seconds, 2),
        "runs": HELP_RUNS,
    }


def _wall(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - started


def tables(result: dict[str, Any]) -> list[Table]:
    """Time and memory by stage, bytes by artifact, and `--help`."""
    models = ["fp32", *result["settings"]["recipes"]]
    timing = tuple(
        (stage, *(_outcome(result["stages"][model].get(stage)) for model in models)) for stage in STAGES
    )
    sizes = {
        name: result["denoiser_bytes"][name] for name in ("fp32", "fp16", *result["settings"]["recipes"])
    }
    bytes_rows = tuple(
        (label, *(megabytes(model.get(kind)) for model in sizes.values())) for kind, label in KINDS.items()
    )
    fractions = (number(ratio(sizes, model, "onnx-onnxruntime"), 3) for model in sizes)
    helped = result["help"]
    return [
        Table(
            title="Time and peak memory of each stage",
            columns=("stage", *map(_model, models)),
            rows=timing,
            note="Each stage is a process of its own, Python and its libraries included. A time in brackets is that of "
            "the last part of an interrupted run; a dash at finetuning is a checkpoint that was made elsewhere. "
            f"Generation draws {len(demo.PROMPTS)} images, parity {result['settings']['prompts']} in every rung."
            + _doubts(result),
        ),
        Table(
            title="Size of the denoiser",
            columns=("artifact", *map(_model, sizes)),
            rows=(*bytes_rows, ("ONNX, onnxruntime, of fp32's", *fractions)),
            note="U-Net weights of fp32 and fp16 are the bytes of their values; the others are files.",
        ),
        Table(
            title="Command line",
            columns=("", "wall time", f"of `{'python -c pass'}`"),
            rows=(("`quest-deploy --help`", f"{helped['seconds']:.3f} s", f"{helped['ratio']:.1f} ×"),),
            note=f"Median of {helped['runs']}.",
        ),
    ]


def recipe_digests(names: Iterable[str]) -> dict[str, str]:
    """What the packaged recipes hold today, by name; a field that came later, at its default, changes none of them."""
    return {name: hash_mapping(_set_fields(load_recipe(name))) for name in names}


def _set_fields(config: Recipe | PhaseConfig) -> dict[str, Any]:
    """What a recipe or a phase of it has that is not a default."""
    found = to_dict(config)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if value == field.default:
            del found[field.name]
        elif isinstance(value, PhaseConfig):
            found[field.name] = _set_fields(value)
    return found


def _doubts(result: dict[str, Any]) -> str:
    """Sentences on recipes that have changed since, comparisons over their budget, and times of another machine."""
    known, today = result.get("recipe_digests", {}), recipe_digests(result["settings"]["recipes"])
    changed = [name.upper() for name, digest in today.items() if known.get(name) != digest]
    over = [
        f"{stage} of {_model(name)}"
        for name, outcomes in result["stages"].items()
        for stage, outcome in outcomes.items()
        if outcome["exit_code"] == demo.OVER_BUDGET
    ]
    found = (
        [f"**{', '.join(changed)}: of other settings than the packaged recipes have now.**"]
        if changed
        else []
    )
    found += [f"Over a limit, with its time: {', '.join(over)}."] if over else []
    return "".join(f" {sentence}" for sentence in found) + elsewhere(result, result["stages"])


def _model(name: str) -> str:
    return name if name.startswith("fp") else name.upper()


def _outcome(outcome: dict[str, Any] | None) -> str:
    if outcome is None or outcome["seconds"] is None:
        return MISSING
    took = seconds(outcome["seconds"])
    took = f"[{took}]" if outcome["resumed"] else took
    failed = "" if outcome["exit_code"] in stages.FINISHED else " **failed**"
    return f"{took}, {outcome['peak_memory_bytes'] / 1e6:,.0f} MB{failed}"

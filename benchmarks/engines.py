"""Whether each recipe builds TensorRT for RTX engines without a GPU, in what time, and how large they are."""

from __future__ import annotations

from typing import Any

from benchmarks import stages
from benchmarks.environment import header
from benchmarks.settings import MODEL, Settings
from benchmarks.tables import Table, megabytes, seconds, yes
from quest_deploy.manifest import MANIFEST_NAME
from scripts import demo

NAME = "engines"
TARGET = "tensorrt-rtx"
FULL_PRECISION = "fp32"
COMPONENTS = ("text_encoder", "unet", "vae_decoder")


def run(settings: Settings) -> dict[str, Any]:
    """Export and build each recipe, and full precision to compare with."""
    sources = {FULL_PRECISION: MODEL}
    sources |= {name: stages.finetuned(settings, name)[0] for name in settings.recipes}
    built = {}
    for name, source in sources.items():
        onnx, _ = stages.export(settings, name, source, TARGET)
        engines, outcome = stages.build(settings, name, onnx)
        builds = outcome["exit_code"] == 0 and (engines / MANIFEST_NAME).is_file()
        built[name] = {**outcome, "builds": builds, "size_bytes": demo.sizes(engines) if builds else None}
    return {**header(settings), "engines": built}


def tables(result: dict[str, Any]) -> list[Table]:
    """One row for each recipe."""
    rows = []
    for name in (FULL_PRECISION, *result["settings"]["recipes"]):
        engine = result["engines"][name]
        sizes = engine["size_bytes"] or {}
        rows.append(
            (
                name.upper() if name != FULL_PRECISION else name,
                yes(engine["builds"]),
                seconds(engine["seconds"]),
                megabytes(engine["peak_memory_bytes"]),
                *(megabytes(sizes.get(component)) for component in COMPONENTS),
            )
        )
    return [
        Table(
            title="TensorRT for RTX engines, built without a GPU",
            columns=("model", "builds", "time", "peak memory", "text encoder", "denoiser", "VAE decoder"),
            rows=tuple(rows),
            note="Built, not run: a machine without a driver cannot load them. 4-bit weights are kept as int8, since "
            "the builder takes no int4 weights beside int8 activations.",
        )
    ]

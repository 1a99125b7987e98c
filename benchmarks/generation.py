"""What `generate` costs on the CPU beside its engines: its loop's overhead, and peak memory (`quest-deploy bench`).

The model is that of :mod:`benchmarks.cpu_speed`, drawn with guidance at 64 x 64 latents; weights are random, so there
is nothing to see.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import cpu_speed, stages
from benchmarks.environment import header
from benchmarks.settings import Settings, one_update
from benchmarks.tables import Table, number, yes
from quest_deploy.artifacts import read_json

NAME = "generation"
STEPS, THREADS, RUNS, ROUNDS = 4, 2, 2, 2
LIMIT_OVERHEAD, LIMIT_MEMORY = 0.03, 0.6
FLOAT, QUANTIZED = "fp32", "w4a8"
# A row's label; the directory below the work folder, and what runs it.
ROWS = {
    "torch-fp32": ("torch, fp32 (the modules of diffusers)", "model", "torch"),
    "ort-fp32": ("ONNX Runtime, fp32", FLOAT, "onnxruntime"),
    "ort-w4a8": ("ONNX Runtime, W4A8", QUANTIZED, "onnxruntime"),
    "openvino-w4a8": ("OpenVINO, W4A8", QUANTIZED, "openvino"),
}


def run(settings: Settings) -> dict[str, Any]:
    """Make the files, then let `quest-deploy bench` measure all rows in turn."""
    folder = settings.work / NAME
    model, checkpoint = folder / "model", folder / "checkpoint"
    if not (model / "model_index.json").is_file():
        subprocess.run([sys.executable, "-m", "benchmarks.cpu_speed", "model", str(folder)], check=True)
    recipe = dataclasses.replace(
        one_update(weight_bits=4, batch_size=1), name=NAME, memory_limit_gb=cpu_speed.MEMORY_LIMIT_GB
    )
    stages.finetune(settings, recipe, checkpoint, model=model)
    for name, source in ((FLOAT, model), (QUANTIZED, checkpoint)):
        export = ("export", str(source))
        stages.required(
            stages.make(settings, f"export {NAME}-{name}", export, folder / name, inputs=(source,))
        )
    subjects = {row: f"{folder / name}:{backend}" for row, (_, name, backend) in ROWS.items()}
    options = {"steps": STEPS, "threads": THREADS, "runs": RUNS, "rounds": ROUNDS}
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    output, paths = folder / "bench", (model, folder / FLOAT, folder / QUANTIZED)
    stages.required(
        stages.make(
            settings, f"bench {NAME}", ("bench", *subjects.values(), *arguments), output, inputs=paths
        )
    )
    return {**header(settings), "options": options, "rows": measured(output, subjects)}


def measured(output: Path, subjects: Mapping[str, str]) -> dict[str, Any]:
    """The rows that `quest-deploy bench` left at `output`, by this benchmark's names for its `subjects`.

    Raises:
        SystemExit: one could not be measured.
    """
    found = read_json(output / "bench.json")["rows"]
    rows = {row: found[subject] for row, subject in subjects.items()}
    for row, one in rows.items():
        if "error" in one:
            raise SystemExit(
                f"benchmarks: {row} could not be measured: {one['error']}; remove {output} to try again"
            )
    return rows


def ratios(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By row: times as fast as the first, its share of the first's peak memory, and the loop's overhead."""
    rows = result["rows"]
    base = rows["torch-fp32"]
    return {
        name: {
            "speed": base["loop"]["median_s"] / row["loop"]["median_s"],
            "memory": row["memory_bytes"]["peak"] / base["memory_bytes"]["peak"],
            "overhead": row["loop"]["overhead"],
        }
        for name, row in rows.items()
    }


def tables(result: dict[str, Any]) -> list[Table]:
    """One row for each runtime."""
    options = result["options"]
    return [
        Table(
            title="Generation on the CPU: the whole loop",
            columns=(
                "what",
                "times as fast",
                "outside engines",
                "at most 3 %",
                "peak memory, share of torch fp32's",
            ),
            rows=tuple(
                (
                    ROWS[name][0],
                    number(row["speed"]),
                    f"{100 * row['overhead']:.2f} %",
                    yes(row["overhead"] <= LIMIT_OVERHEAD),
                    number(row["memory"]),
                )
                for name, row in ratios(result).items()
            ),
            labels=1,
            note="`quest-deploy bench` on BK-SDM-Tiny's U-Net with 323 million random weights: one image of "
            f"{cpu_speed.LATENTS} x {cpu_speed.LATENTS} latents with guidance, {options['steps']} steps, "
            f"{options['threads']} threads; medians of {options['runs'] * options['rounds']} runs in "
            f"{options['rounds']} processes each. Memory counts from the moment all libraries are imported. Goals: at "
            f"most {100 * LIMIT_OVERHEAD:.0f} % outside engines; W4A8 at most {LIMIT_MEMORY} of the memory.",
        )
    ]

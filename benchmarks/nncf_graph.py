"""The U-Net of :mod:`benchmarks.cpu_speed` as NNCF quantizes it; run by that benchmark in a process of its own."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.stages import identity
from quest_deploy.artifacts import read_json, write_json

FILE, RECORD = "nncf.xml", "nncf.json"
CALIBRATION_STEPS = 4


def check_installed() -> None:
    """End the benchmark before it does anything where NNCF is missing."""
    if importlib.util.find_spec("nncf") is None:
        raise SystemExit("benchmarks: nncf is missing; pip install -e '.[baselines]'")


def versions() -> dict[str, str]:
    """Of what makes the graph."""
    from importlib import metadata

    return {name: metadata.version(name) for name in ("nncf", "openvino")}


def make(folder: Path, onnx: Path) -> None:
    """Write the graph of an ONNX directory to `folder`, unless that one is there."""
    record, made_from = folder / RECORD, {"onnx": identity(onnx), **versions()}
    if not record.is_file() or read_json(record) != made_from:
        subprocess.run([sys.executable, "-m", "benchmarks.cpu_speed", "nncf", str(folder)], check=True)
        write_json(record, made_from)


def write(folder: Path, onnx: Path, samples: Sequence[Mapping[str, Any]]) -> None:
    """The float graph at `onnx`, by NNCF's defaults for transformers, from `samples` of its inputs, arrays by name."""
    import nncf
    import openvino

    quantized = nncf.quantize(
        openvino.Core().read_model(onnx),
        nncf.Dataset(samples),
        subset_size=len(samples),
        model_type=nncf.ModelType.TRANSFORMER,
    )
    openvino.save_model(quantized, folder / FILE, compress_to_fp16=False)

"""What `export --dry-run` tells, against what an export takes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx import numpy_helper

from quest_deploy.commands import main
from quest_deploy.config import ExportConfig
from quest_deploy.errors import ExportError
from quest_deploy.export.estimate import estimate
from quest_deploy.export.to_onnx import export


@pytest.mark.thorough
def test_disk_is_what_the_weights_take(tiny_checkpoint: Path, tmp_path: Path) -> None:
    config = ExportConfig(target="onnxruntime")
    found = {one.component: one for one in estimate(tiny_checkpoint, config)}
    export(tiny_checkpoint, tmp_path / "onnx", config)
    for name, one in found.items():
        model = onnx.load(tmp_path / "onnx" / name / "model.onnx")
        weights = sum(len(numpy_helper.to_array(tensor).tobytes()) for tensor in model.graph.initializer)
        packed = sum(
            math.prod(tensor.dims) - len(tensor.raw_data)
            for tensor in model.graph.initializer
            if tensor.data_type == onnx.TensorProto.INT4
        )
        # So small a model is mostly scales and tables, of which a graph stores fewer than a checkpoint.
        assert weights - packed == pytest.approx(one.disk_bytes, rel=0.12)


def test_half_precision_takes_half() -> None:
    model = Path("reference-model") / "pipeline"
    whole, half = (
        {one.component: one.disk_bytes for one in estimate(model, ExportConfig(mode="none", dtype=dtype))}
        for dtype in ("fp32", "fp16")
    )
    assert half["unet"] == pytest.approx(whole["unet"] / 2, rel=0.01)


def test_a_mode_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ExportError, match="without quantizers"):
        estimate(Path("reference-model") / "pipeline", ExportConfig(mode="int8"))


def test_the_command_tells_and_writes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "onnx"
    arguments = [
        "export",
        str(Path("reference-model") / "pipeline"),
        "-o",
        str(output),
        "--dry-run",
        "--json",
    ]
    done = CliRunner().invoke(main, arguments)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["disk_bytes"] == sum(one["disk_bytes"] for one in data["components"])
    assert not output.exists()

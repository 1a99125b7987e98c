"""What `quest-deploy export` tells to do next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quest_deploy.artifacts import Artifact, read_artifact, write_artifact
from quest_deploy.commands import main
from quest_deploy.config import ExportConfig
from quest_deploy.export import to_onnx

GENERATE = "generate {output} PROMPT -o DIR"


def empty(source: Path, output: Path, config: ExportConfig, **_: Any) -> Artifact:
    """In place of an export."""
    with write_artifact(output, stage="onnx", config={}) as writer:
        writer.details["opset"] = 21 if config.dtype == "fp32" else 23
    return read_artifact(output)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "fp32"], GENERATE),
        (["--dtype", "fp16"], GENERATE),
        (
            ["--dtype", "bf16"],
            "generate {output} PROMPT -o DIR --backend openvino (ONNX Runtime runs no bf16 on the CPU, nor OpenVINO "
            "quantized attention in it)",
        ),
        (["--dtype", "bf16", "--target", "tensorrt"], "build-engine {output} -o DIR --backend tensorrt"),
    ],
    ids=["fp32", "fp16", "bf16", "engines"],
)
def test_the_next_step_is_one_that_works(
    options: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_model: Path
) -> None:
    monkeypatch.setattr(to_onnx, "export", empty)
    output = tmp_path / "onnx"
    command = ["export", str(reference_model), "-o", str(output), "--target", "onnxruntime", *options]
    done = CliRunner().invoke(main, command)
    assert done.stdout.splitlines()[-1] == f"Next: quest-deploy {words.format(output=output)}", done.stderr


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--opset", "21"], True),
        (["--opset", "23"], False),
        ([], False),
        (["--dtype", "fp32", "--opset", "21"], False),
    ],
)
def test_another_operator_set_than_the_one_asked_for_is_told(
    options: list[str], told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference_model: Path
) -> None:
    monkeypatch.setattr(to_onnx, "export", empty)
    command = ["export", str(reference_model), "-o", str(tmp_path / "onnx"), "--dtype", "fp16", *options]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0
    assert ("graphs in fp16 have operator set 23, which they need, not 21" in done.stderr) == told

"""Exports for another runtime are told before anything is built from them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.artifacts import write_artifact
from quest_deploy.config import BuildConfig
from quest_deploy.engines import trt_build
from quest_deploy.errors import EngineBuildError
from quest_deploy.files import copy_tree


def exported_for(target: str, graphs: Path, output: Path) -> Path:
    """The graphs of an `onnx` artifact in one for `target`."""
    with write_artifact(output, stage="onnx", config={"target": target, "mode": "int8"}) as writer:
        for entry in graphs.iterdir():
            if entry.is_dir():
                copy_tree(entry, writer.path / entry.name)
            elif entry.name != "manifest.json":
                (writer.path / entry.name).write_bytes(entry.read_bytes())
    return output


@pytest.mark.parametrize(
    ("target", "told"), [("onnxruntime", True), ("tensorrt", False), ("tensorrt-rtx", False)]
)
def test_an_export_for_another_runtime_is_told_before_the_build(
    tiny_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    target: str,
    told: bool,
) -> None:
    said: list[str] = []

    def begin(*args: Any) -> None:
        said.extend(record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
        raise EngineBuildError("far enough")

    monkeypatch.setattr(trt_build, "run_job", begin)
    source = exported_for(target, tiny_onnx, tmp_path / "onnx")
    with pytest.raises(EngineBuildError, match="far enough"):
        trt_build.build_engine(source, tmp_path / "engines", BuildConfig())
    words = "was exported for onnxruntime, and engines keep that form"
    assert [words in one and "export --target tensorrt-rtx" in one for one in said] == [True] * told

"""Small artifacts, and a digest cache of each test's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quest_deploy.artifacts import MANIFEST_NAME, write_artifact

CONFIG = {"target": "onnxruntime", "opset": 21}


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A digest cache of the test's own."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


def make(output: Path, *, stage: str = "onnx", text: str = "weights", overwrite: bool = False) -> Path:
    with write_artifact(output, stage=stage, config=CONFIG, overwrite=overwrite) as writer:
        (writer.path / "unet").mkdir()
        (writer.path / "unet" / "model.onnx").write_text(text)
        (writer.path / "model_index.json").write_text("{}")
    return output


def fail_inside(output: Path, error: BaseException) -> None:
    """Leave the body of write_artifact, half done, with `error`."""
    with write_artifact(output, stage="onnx", config=CONFIG, overwrite=True) as writer:
        (writer.path / "half").write_text("x")
        raise error


def link_inside(output: Path, target: Path) -> None:
    """Write an artifact with a symbolic link in it."""
    with write_artifact(output, stage="onnx", config=CONFIG) as writer:
        (writer.path / "x").symlink_to(target)


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    manifest.update(changes)
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))


def names(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())

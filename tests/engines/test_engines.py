from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quest_deploy.artifacts import write_artifact
from quest_deploy.engines import load_engines, resolve_backend
from quest_deploy.errors import ArtifactError, ConfigError


@pytest.fixture
def engines_dir(tmp_path: Path) -> Path:
    """An `engines` artifact without engines."""
    with write_artifact(tmp_path / "engines", stage="engines", config={"backend": "tensorrt"}) as writer:
        (writer.path / "model_index.json").write_text("{}")
    return tmp_path / "engines"


def test_what_lies_on_disk_chooses_the_backend(model_dir: Path, tiny_onnx: Path, engines_dir: Path) -> None:
    chosen = [resolve_backend(path, None) for path in (model_dir, tiny_onnx, engines_dir)]
    assert chosen == ["torch", "onnxruntime", "tensorrt"]


def test_backend_that_cannot_run_it_is_refused_with_the_next_step(tiny_onnx: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"backend tensorrt-rtx cannot run .*stage 'onnx'.*`quest-deploy build-engine"
    ):
        resolve_backend(tiny_onnx, "tensorrt-rtx")


def test_unknown_backend_is_refused_with_the_known(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="'cuda', expected one of torch, onnxruntime"):
        resolve_backend(model_dir, "cuda")


def test_images_cannot_be_run(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "images", stage="images", config={}):
        pass
    with pytest.raises(ArtifactError, match="holds images, expected a model"):
        resolve_backend(tmp_path / "images", None)


def test_onnx_is_loaded_with_onnx_runtime(tiny_onnx: Path) -> None:
    engines = load_engines(tiny_onnx, threads=1)
    assert sorted(engines) == ["text_encoder", "unet", "vae_decoder"]


def test_building_imports_neither_torch_nor_tensorrt_here() -> None:
    heavy = "{'torch', 'tensorrt_rtx', 'polygraphy'}"
    code = f"import sys, quest_deploy.engines.trt_build; print({heavy} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_name_that_is_no_text_is_told(tiny_onnx: Path, tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    path = shutil.copytree(tiny_onnx, tmp_path / "caf\udce9")
    with pytest.raises(ArtifactError, match="the name is not UTF-8 text, which .* needs to open it; rename"):
        load_engines(path, backend=backend)

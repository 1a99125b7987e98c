"""The main job on the tiny model at W4A8: checkpoint -> ONNX -> engine, and the rungs against each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from PIL import Image

from quest_deploy.config import BuildConfig, ExportConfig, GenerateConfig, ParityConfig, ShapeRange
from quest_deploy.engines.trt_build import build_engine
from quest_deploy.export.to_onnx import export
from quest_deploy.parity import ParityResult, compare
from quest_deploy.pipeline import generate


@pytest.fixture(scope="module")
def onnx_for_runtime(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The W4A8 checkpoint as ONNX for ONNX Runtime."""
    path = tmp_path_factory.mktemp("path") / "onnx"
    export(tiny_checkpoint, path, ExportConfig(target="onnxruntime"))
    return path


@pytest.fixture(scope="module")
def onnx_for_tensorrt(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The W4A8 checkpoint as ONNX for TensorRT for RTX."""
    path = tmp_path_factory.mktemp("path") / "onnx-tensorrt-rtx"
    export(tiny_checkpoint, path, ExportConfig(target="tensorrt-rtx"))
    return path


@pytest.fixture(scope="module")
def ladder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_checkpoint: Path, onnx_for_runtime: Path
) -> ParityResult:
    """Model, checkpoint and ONNX compared."""
    config = ParityConfig(prompts=("rocket", "pizza"), num_prompts=2, steps=3)
    output = tmp_path_factory.mktemp("path") / "parity"
    return compare(tiny_model, onnx_for_runtime, output, config, via=(tiny_checkpoint,))


@pytest.mark.thorough
def test_a_w4a8_checkpoint_builds_a_tensorrt_for_rtx_engine(onnx_for_tensorrt: Path, tmp_path: Path) -> None:
    config = BuildConfig(backend="tensorrt-rtx", batch=ShapeRange(min=1, opt=1, max=1))
    artifact = build_engine(onnx_for_tensorrt, tmp_path / "engines", config)
    assert (artifact.path / "unet" / "model.plan").stat().st_size > 10_000


@pytest.mark.thorough
def test_four_bit_weights_are_packed_for_onnx_runtime_and_int8_for_tensorrt(
    onnx_for_runtime: Path, onnx_for_tensorrt: Path
) -> None:
    def count(path: Path, kind: int) -> int:
        graph = onnx.load(path / "unet" / "model.onnx").graph
        return sum(tensor.data_type == kind and len(tensor.dims) > 1 for tensor in graph.initializer)

    assert count(onnx_for_runtime, onnx.TensorProto.INT4) > 50
    assert count(onnx_for_tensorrt, onnx.TensorProto.INT4) == 0


def test_deployment_changes_no_more_than_its_gates_allow(ladder: ParityResult) -> None:
    gates = {gate.quantity: gate for gate in ladder.gates if gate.rung == "onnx"}
    assert gates["int8 codes that differ"].passed
    assert gates["largest code difference"].passed
    assert gates["noise SNR, same codes"].passed


def test_onnx_runtime_draws_what_torch_draws_from_the_same_checkpoint(
    tiny_checkpoint: Path, onnx_for_runtime: Path, tmp_path: Path
) -> None:
    config = GenerateConfig(prompts=("rocket",), steps=2, guidance_scale=3.0)
    images = []
    for name, source in (("torch", tiny_checkpoint), ("onnxruntime", onnx_for_runtime)):
        generate(source, tmp_path / name, config)
        images.append(np.asarray(Image.open(tmp_path / name / "image-00000.png"), dtype=int))
    # A code may flip (see the gates); pictures of two steps then differ by a few grey levels in places, not as a whole.
    assert np.abs(images[0] - images[1]).mean() < 2

"""OpenVINO runs what was exported for ONNX Runtime."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from quest_deploy.engines import load_engines, resolve_backend
from quest_deploy.engines.base import Engine
from quest_deploy.engines.ort_runtime import load_ort_engines
from quest_deploy.errors import ArtifactError, ConfigError, EngineInputError, MissingDependencyError


@pytest.fixture(scope="module")
def engines(tiny_onnx: Path) -> Iterator[dict[str, Engine]]:
    pytest.importorskip("openvino")
    loaded = load_engines(tiny_onnx, backend="openvino", threads=1)
    yield loaded
    for engine in loaded.values():
        engine.close()


def denoiser_inputs(batch: int, steps: int) -> dict[str, torch.Tensor]:
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "timestep": torch.linspace(0, 0.9, steps),
        "encoder_hidden_states": torch.randn(batch, 8, 16),
    }


@pytest.mark.parametrize(("batch", "steps"), [(1, 1), (2, 1), (2, 2)])
def test_quantized_denoiser_equals_onnx_runtime(
    engines: dict[str, Engine], tiny_onnx: Path, batch: int, steps: int
) -> None:
    inputs = denoiser_inputs(batch, steps)
    with load_ort_engines(tiny_onnx, threads=1)["unet"] as reference:
        expected = reference(**inputs)["out_sample"]
    torch.testing.assert_close(engines["unet"](**inputs)["out_sample"], expected, rtol=1e-5, atol=1e-5)


def test_the_quantized_convolution_is_an_int8_primitive(engines: dict[str, Engine]) -> None:
    engines["unet"](**denoiser_inputs(2, 1))
    (compiled, *_) = engines["unet"].compiled.values()  # type: ignore[attr-defined]
    nodes = compiled.get_runtime_model().get_ordered_ops()
    info = [
        {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
        for node in nodes
    ]
    (convolution,) = [one["primitiveType"] for one in info if one["layerType"] == "Convolution"]
    assert convolution.lower().endswith("_i8")


def test_an_output_outlives_the_next_run(engines: dict[str, Engine]) -> None:
    first = engines["unet"](**denoiser_inputs(2, 1))["out_sample"]
    kept = first.clone()
    engines["unet"](**denoiser_inputs(2, 1))
    assert torch.equal(first, kept)


def test_two_sets_of_shapes_have_graphs_of_their_own_and_the_others_share_one(tiny_onnx: Path) -> None:
    pytest.importorskip("openvino")
    engine = load_engines(tiny_onnx, backend="openvino", threads=1)["unet"]
    sizes = [(1, 1), (2, 1), (1, 1), (3, 1), (4, 1), (2, 1)]
    for batch, steps in sizes:
        inputs = denoiser_inputs(batch, steps)
        with load_ort_engines(tiny_onnx, threads=1)["unet"] as reference:
            expected = reference(**inputs)["out_sample"]
        torch.testing.assert_close(engine(**inputs)["out_sample"], expected, rtol=1e-5, atol=1e-5)
    batches = [None if shapes is None else dict(shapes)["sample"][0] for shapes in engine.compiled]  # type: ignore[attr-defined]
    assert batches == [1, 2, None]


def test_a_wrong_shape_is_named(engines: dict[str, Engine]) -> None:
    with pytest.raises(EngineInputError, match="unet input 'sample'"):
        engines["unet"](**{**denoiser_inputs(2, 1), "sample": torch.randn(2, 5, 8, 8)})


def test_a_closed_engine_does_not_run(tiny_onnx: Path) -> None:
    pytest.importorskip("openvino")
    engine = load_engines(tiny_onnx, backend="openvino", threads=1)["unet"]
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine(**denoiser_inputs(1, 1))


def test_a_graph_that_is_no_graph_is_an_artifact_error(make_onnx: Callable[..., Path]) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(ArtifactError, match="OpenVINO cannot load it"):
        load_engines(make_onnx(unet=b"not onnx"), backend="openvino")


def test_missing_openvino_names_the_extra(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'quest-deploy\[openvino\]'"):
        load_engines(tiny_onnx, backend="openvino")


def test_onnx_runtime_stays_the_default(tiny_onnx: Path) -> None:
    assert resolve_backend(tiny_onnx, None) == "onnxruntime"


def test_openvino_does_not_run_a_model(reference_model: Path) -> None:
    with pytest.raises(ConfigError, match="openvino cannot run"):
        resolve_backend(reference_model, "openvino")

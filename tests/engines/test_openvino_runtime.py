"""OpenVINO runs what was exported for ONNX Runtime."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quest_deploy.artifacts import read_artifact, write_artifact
from quest_deploy.config import RunConfig
from quest_deploy.engines import check_run, load_engines, resolve_backend
from quest_deploy.engines.base import Engine
from quest_deploy.engines.openvino_runtime import (
    MOST_KERNELS,
    Graph,
    bound_kernels,
    check_attention,
    load_openvino_engines,
)
from quest_deploy.engines.ort_runtime import load_ort_engines
from quest_deploy.errors import (
    ArtifactError,
    ConfigError,
    EngineInputError,
    MissingDependencyError,
    StaleArtifactError,
)


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


def test_kernels_of_many_sizes_are_kept_up_to_a_bound(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    openvino = pytest.importorskip("openvino")
    told: list[dict[str, int]] = []

    def note(core: object, device: str, settings: dict[str, int]) -> None:
        told.append(settings)
        known(core, device, settings)

    known = openvino.Core.set_property
    monkeypatch.setattr(openvino.Core, "set_property", note)
    with caplog.at_level(logging.DEBUG, logger="quest_deploy"):
        load_openvino_engines(tiny_onnx)
    assert told == [{"CPU_RUNTIME_CACHE_CAPACITY": MOST_KERNELS}]
    assert "keeps as many kernels" not in caplog.text


def test_kernels_of_a_version_that_does_not_bound_them_are_no_error() -> None:
    def refuse(device: str, settings: dict[str, int]) -> None:
        raise RuntimeError("Unsupported property")

    bound_kernels(SimpleNamespace(set_property=refuse))


@pytest.mark.parametrize("again", ["another", "nothing"])
def test_a_graph_that_was_replaced_is_not_mixed_with_the_one_that_was_loaded(
    make_onnx: Callable[..., Path], again: str
) -> None:
    """Other shapes compile the graph again: from the files that were verified, or not at all."""
    pytest.importorskip("openvino")
    path = make_onnx()
    engine = load_engines(path, backend="openvino", threads=1)["unet"]
    before = engine(**denoiser_inputs(1, 1))
    shutil.rmtree(path)
    if again == "another":
        make_onnx()
    with pytest.raises(StaleArtifactError, match="changed or deleted after it was loaded"):
        engine(**denoiser_inputs(2, 1))
    assert engine(**denoiser_inputs(1, 1)).keys() == before.keys()


def test_other_shapes_work_from_another_working_directory(
    make_onnx: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    (tmp_path / "current").symlink_to(make_onnx())
    monkeypatch.chdir(tmp_path)
    engine = load_engines(Path("current"), backend="openvino", threads=1)["unet"]
    engine(**denoiser_inputs(1, 1))
    monkeypatch.chdir("/")
    (tmp_path / "current").unlink()
    assert engine(**denoiser_inputs(2, 1))["out_sample"].shape == (2, 4, 8, 8)


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


PLACES = "Exception from src/core.cpp:117:\nException from src/plugin.cpp:54:\n"
CHECK = "Check 'convert->constant_fold(values)' failed at src/core/src/pass/constant_folding.cpp:71"


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (f"{PLACES}{CHECK}\n\n", CHECK),
        (f"{PLACES}{CHECK}:\nno kernel for it\n\n", "no kernel for it"),
        (PLACES, "Exception from src/core.cpp:117"),
    ],
    ids=["check", "reason", "places alone"],
)
def test_what_openvino_does_not_compile_is_told_with_its_cause_and_what_runs_it(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch, text: str, cause: str
) -> None:
    pytest.importorskip("openvino")
    engine = load_engines(tiny_onnx, backend="openvino", threads=1)["unet"]

    def refuse(self: Graph, shapes: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(Graph, "compile", refuse)
    with pytest.raises(EngineInputError) as caught:
        engine(**denoiser_inputs(1, 1))
    assert "unet: OpenVINO cannot compile it for sample [1, 4, 8, 8], timestep [1], encoder" in str(
        caught.value
    )
    assert f": {cause}; run the same directory with --backend onnxruntime" in str(caught.value)


@pytest.mark.parametrize(
    ("config", "attention", "refused"),
    [
        ({"dtype": "bf16", "mode": "int8"}, True, True),
        ({"dtype": "bf16", "mode": "int8"}, False, False),
        ({"dtype": "bf16", "mode": "int4-weight-only"}, True, False),
        ({"dtype": "fp16", "mode": "int8"}, True, False),
    ],
)
def test_quantized_attention_in_bfloat16_is_refused(
    tmp_path: Path, config: dict[str, str], attention: bool, refused: bool
) -> None:
    pytest.importorskip("openvino")
    path = tmp_path / "onnx"
    with write_artifact(path, stage="onnx", config=config) as writer:
        (writer.path / "quest.json").write_text('{"attention": {"mid.query": {}}}' if attention else "{}")
    if not refused:
        check_attention(read_artifact(path))
        return
    with pytest.raises(ConfigError, match="OpenVINO computes wrongly; export it with --dtype fp32 or fp16"):
        load_openvino_engines(path)


@pytest.mark.parametrize("backend", ["torch", "onnxruntime", "openvino"])
def test_cuda_graphs_cannot_be_switched_off_where_there_are_none(backend: str) -> None:
    with pytest.raises(ConfigError, match="only TensorRT engines have them"):
        check_run(backend, RunConfig(cuda_graphs=False))
    check_run("tensorrt-rtx", RunConfig(cuda_graphs=False))

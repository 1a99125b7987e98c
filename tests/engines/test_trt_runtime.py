from __future__ import annotations

import json
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quest_deploy.artifacts import Artifact, check_output, read_artifact
from quest_deploy.commands.inspect import describe, render
from quest_deploy.config import BuildConfig, ShapeRange, to_dict
from quest_deploy.engines import trt_api, trt_runtime
from quest_deploy.engines.libraries import Gpu, gpus
from quest_deploy.engines.ort_runtime import load_ort_engines
from quest_deploy.engines.run_record import read_runs, record_run
from quest_deploy.engines.trt_build import build_engine
from quest_deploy.engines.trt_log import make_log
from quest_deploy.engines.trt_runtime import (
    TensorRTEngine,
    check_devices,
    check_flavour,
    check_gpu,
    load_tensorrt_engines,
    read_profiles,
    stale,
)
from quest_deploy.errors import (
    ConfigError,
    EngineInputError,
    EngineRunError,
    MissingDependencyError,
    StaleArtifactError,
)
from quest_deploy.manifest import Manifest
from tests.engines.simulated_trt import (
    SPEC,
    SimulatedContext,
    SimulatedEngine,
    SimulatedStream,
    make_engine,
    make_memory,
    simulated_library,
)


@pytest.fixture
def doubler(cuda: SimulatedEngine, stream: SimulatedStream) -> TensorRTEngine:
    """The engine in a simulated runtime."""
    return make_engine(cuda)


@pytest.fixture
def rtx_5090(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_runtime, "gpus", lambda: [Gpu(name="NVIDIA RTX 5090", compute_capability="12.0")])


def test_results_are_written_where_torch_reads_them(doubler: TensorRTEngine) -> None:
    x = torch.randn(2, 4)
    torch.testing.assert_close(doubler(x=x)["y"], 2 * x, rtol=0, atol=0)


def test_views_are_read_in_their_own_order(doubler: TensorRTEngine) -> None:
    x = torch.randn(4, 2).t()
    torch.testing.assert_close(doubler(x=x)["y"], 2 * x, rtol=0, atol=0)


def test_profile_follows_the_batch(doubler: TensorRTEngine, cuda: SimulatedEngine) -> None:
    doubler(x=torch.randn(5, 4))
    assert cuda.contexts[0].active_optimization_profile == 1
    doubler(x=torch.randn(1, 4))
    assert cuda.contexts[0].active_optimization_profile == 0


def test_batch_beyond_all_profiles_is_refused(doubler: TensorRTEngine) -> None:
    with pytest.raises(
        EngineInputError, match=r"doubler input 'x': got \[9, 4\], engine allows batch 1\.\.8"
    ):
        doubler(x=torch.randn(9, 4))


def test_run_that_tensorrt_refuses_is_an_error(doubler: TensorRTEngine, cuda: SimulatedEngine) -> None:
    doubler(x=torch.randn(2, 4))
    cuda.contexts[0].runs = False
    match = "doubler: TensorRT refused to run; run the same command again, and if .* build the engine again"
    with pytest.raises(EngineRunError, match=match):
        doubler(x=torch.randn(1, 4))


def test_closed_engine_holds_nothing_and_does_not_run(
    doubler: TensorRTEngine, cuda: SimulatedEngine, stream: SimulatedStream
) -> None:
    for _ in range(3):
        doubler(x=torch.randn(1, 4))
    contexts = [weakref.ref(context) for context in cuda.contexts]
    cuda.contexts.clear()
    engine = doubler.plan
    with doubler:
        pass
    assert stream.synchronized and engine.engine is None
    assert [context() for context in contexts] == [None, None]
    doubler.close()
    with pytest.raises(RuntimeError, match="closed"):
        doubler(x=torch.randn(1, 4))


def test_profiles_are_read_from_the_engine() -> None:
    profiles = read_profiles(SPEC, SimulatedEngine())
    assert [(profile["x"].min, profile["x"].max) for profile in profiles] == [
        ((1, 4), (2, 4)),
        ((3, 4), (8, 4)),
    ]


def test_batches_are_told_by_profile_and_none_for_other_sizes(doubler: TensorRTEngine) -> None:
    assert doubler.batch_ranges({"x": (9, 4)}) == [(1, 2), (3, 8)]
    assert doubler.batch_ranges({"x": (1, 5)}) == doubler.batch_ranges({"x": (1,)}) == []


def test_tensor_that_is_not_on_the_engines_gpu_is_refused() -> None:
    with pytest.raises(
        EngineInputError, match=r"unet input 'x': got a tensor on cpu, expected one on cuda:1"
    ):
        check_devices("unet", {"x": torch.zeros(1)}, torch.device("cuda", 1))


def test_other_flavour_is_refused_with_both_ways_out() -> None:
    with pytest.raises(ConfigError, match=r"use --backend tensorrt-rtx, or build .* --backend tensorrt"):
        check_flavour(Path("engines"), "tensorrt-rtx", "tensorrt")


def test_without_a_driver_engines_need_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_runtime, "gpus", list)
    with pytest.raises(MissingDependencyError, match="built ahead of time and need an NVIDIA GPU to run"):
        check_gpu(Path("engines"))


@pytest.mark.usefixtures("rtx_5090")
def test_gpu_that_torch_cannot_use_asks_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependencyError, match="install a CUDA build of torch"):
        check_gpu(Path("engines"))


def built(config: BuildConfig, **details: str) -> Artifact:
    """What a manifest says about engines."""
    content = json.loads(json.dumps(to_dict(config)))
    manifest = Manifest(
        schema_version=1, stage="engines", config=content, details=details, inputs={}, tools={}, files={}
    )
    return Artifact(path=Path("engines"), manifest=manifest, digest="")


A10 = {"library": "TensorRT", "target_gpu": "NVIDIA A10", "compute_capability": "8.6"}


@pytest.mark.usefixtures("rtx_5090")
def test_plan_that_does_not_load_names_what_differs_and_the_command_that_builds_the_same_here(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trt_runtime, "driver_version", lambda: "580.2")
    source = built(
        BuildConfig(backend="tensorrt", batch=ShapeRange(min=1, opt=1, max=2), static=True),
        **A10,
        library_version="10.1",
        driver="535.1",
    )
    assert str(stale("unet", source, "11.0")) == (
        "unet: TensorRT 11.0 on NVIDIA RTX 5090 cannot load the engine in 'engines'; "
        "it was built with TensorRT 10.1 (this is TensorRT 11.0), for NVIDIA A10 (this is NVIDIA RTX 5090), "
        "for compute capability 8.6 (this is 12.0), under driver 535.1 (this is 580.2); build engines "
        "here with `quest-deploy build-engine ONNX_DIR -o DIR --backend tensorrt --max-batch 2 --static`"
    )


def test_only_what_differs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_runtime, "gpus", lambda: [Gpu(name="NVIDIA A10", compute_capability="8.6")])
    monkeypatch.setattr(trt_runtime, "driver_version", lambda: "580.2")
    source = built(BuildConfig(backend="tensorrt"), **A10, library_version="11.0", driver="535.1")
    message = str(stale("unet", source, "11.0"))
    assert "'engines'; it was built under driver 535.1 (this is 580.2); build engines here" in message


@pytest.mark.usefixtures("rtx_5090")
def test_a_gpu_that_the_library_never_runs_on_is_not_told_to_build_again() -> None:
    """The words are those of TensorRT for RTX 1.7 on an H200 (benchmarks/results/gpu.json)."""
    words = (
        "The engine cannot run on this GPU, which has compute capability 9.0. Supported compute capabilities: None. "
        "TensorRT-RTX does not support this compute capability, so the engine cannot be rebuilt for it."
    )
    message = str(stale("unet", built(BuildConfig()), "1.7", [words]))
    assert "no build of TensorRT for RTX runs on this GPU: build with --backend tensorrt" in message
    assert "build engines here" not in message


@pytest.fixture(scope="module")
def plans(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Real engines of the tiny pipeline."""
    pytest.importorskip("tensorrt_rtx")
    return build_engine(tiny_onnx, tmp_path_factory.mktemp("plans") / "engines", BuildConfig())


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_real_engines_on_a_machine_without_a_gpu_say_what_is_missing(plans: Artifact) -> None:
    with pytest.raises(MissingDependencyError, match="need an NVIDIA GPU"):
        load_tensorrt_engines(plans.path, backend="tensorrt-rtx")


@pytest.mark.usefixtures("rtx_5090", "stream")
def test_plan_that_tensorrt_does_not_deserialize_is_stale(
    plans: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(log: Any, plan: bytes) -> None:
        log.log(log.Severity.ERROR, "The engine plan file is\n not compatible")

    library = simulated_library(refuse)
    monkeypatch.setattr(trt_runtime, "import_tensorrt", lambda backend: library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        StaleArtifactError,
        match=r"text_encoder: .* RTX 9\.9 on .*\(The engine plan file is not compatible\); it was built with .* RTX 1",
    ):
        load_tensorrt_engines(plans.path, backend="tensorrt-rtx")


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        (trt_api.ExecutionContext, "IExecutionContext"),
        (trt_api.CudaEngine, "ICudaEngine"),
        (trt_api.RuntimeCache, "IRuntimeCache"),
        (trt_api.RuntimeConfig, "IRuntimeConfig"),
        (trt_api.EngineInspector, "EngineInspector"),
        (trt_api.Runtime, "Runtime"),
    ],
)
def test_the_library_has_what_the_protocols_name(protocol: type, name: str) -> None:
    library = pytest.importorskip("tensorrt_rtx")
    declared = {*vars(protocol), *getattr(protocol, "__annotations__", {})}
    wanted = {member for member in declared if not member.startswith("_")}
    assert wanted and wanted <= set(dir(getattr(library, name)))


def test_the_library_has_the_strategies_that_contexts_are_made_with() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    assert "USER_MANAGED" in library.ExecutionContextAllocationStrategy.__members__
    assert "EAGER" in library.DynamicShapesKernelSpecializationStrategy.__members__


def test_the_library_takes_the_logger_and_tells_it_why_a_plan_is_refused() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    log = make_log(library)
    log.errors.clear()
    assert library.Runtime(log).deserialize_cuda_engine(b"no plan" * 99) is None
    assert any("Serialization" in error for error in log.errors)


@pytest.fixture
def simulated_plans(
    plans: Artifact, stream: SimulatedStream, rtx_5090: None, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Path, list[SimulatedEngine]]]:
    """Copies of the engines that a simulated library deserializes to simulated ones."""

    def make(folder: Path, **changes: Any) -> tuple[Path, list[SimulatedEngine]]:
        copy, made = folder / "engines", []
        shutil.copytree(plans.path, copy)
        manifest = json.loads((copy / "manifest.json").read_text())
        manifest["config"] |= changes
        (copy / "manifest.json").write_text(json.dumps(manifest))

        def deserialize(log: Any, plan: bytes) -> SimulatedEngine:
            made.append(SimulatedEngine())
            return made[-1]

        library = simulated_library(deserialize)
        monkeypatch.setattr(trt_runtime, "import_tensorrt", lambda backend: library)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(trt_runtime, "driver_version", lambda: "580.2")
        monkeypatch.setattr(trt_runtime, "ActivationMemory", lambda size, device: make_memory(size))
        monkeypatch.setattr(trt_runtime, "component_specs", lambda path: {"unet": SPEC})
        return copy, made

    return make


# Nine tenths of 5,000 free bytes, without the 2,048 that activations take where weights pass through.
@pytest.mark.parametrize(("asked", "budget"), [(None, 2452), (1e-6, 1000), (1.0, 4096)])
def test_weights_are_streamed_before_contexts_and_their_memory_are_made(
    simulated_plans: Callable[..., tuple[Path, list[SimulatedEngine]]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: float | None,
    budget: int,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5000, 9000))
    path, made = simulated_plans(tmp_path, weight_streaming=True)
    engine = load_tensorrt_engines(path, backend="tensorrt-rtx", weights_gb=asked)["unet"]
    assert [one.weight_streaming_budget_v2 for one in made] == [budget]
    # TensorRT runs an engine that streams synchronously, which CUDA cannot capture.
    assert isinstance(engine, TensorRTEngine) and engine.graphs == (budget == 4096)
    torch.testing.assert_close(engine(x=torch.ones(1, 4))["y"], torch.full((1, 4), 2.0))
    (context,) = made[0].contexts
    assert context.memory is not None and context.memory[1] == made[0].device_memory_size_v2


def test_engines_that_hold_their_weights_are_left_alone_and_take_no_limit(
    simulated_plans: Callable[..., tuple[Path, list[SimulatedEngine]]], tmp_path: Path
) -> None:
    path, made = simulated_plans(tmp_path)
    load_tensorrt_engines(path, backend="tensorrt-rtx")
    assert made[0].weight_streaming_budget_v2 == made[0].streamable_weights_size
    with pytest.raises(ConfigError, match="hold all their weights on the GPU.*--weight-streaming"):
        load_tensorrt_engines(path, backend="tensorrt-rtx", weights_gb=1.0)


def test_where_an_engine_ran_is_kept_beside_it_and_shown(
    simulated_plans: Callable[..., tuple[Path, list[SimulatedEngine]]], tmp_path: Path
) -> None:
    path, _ = simulated_plans(tmp_path)
    digest = read_artifact(path).manifest.files["unet/model.plan"].sha256
    load_tensorrt_engines(path, backend="tensorrt-rtx")["unet"].close()
    assert read_runs(path / "unet", digest) == []  # it was loaded alone
    for _ in range(2):
        with load_tensorrt_engines(path, backend="tensorrt-rtx")["unet"] as engine:
            engine(x=torch.ones(1, 4))
    (run,) = read_runs(path / "unet", digest)
    assert run.pop("date").startswith("20")
    assert run == {
        "gpu": "NVIDIA RTX 5090",
        "compute_capability": "12.0",
        "driver": "580.2",
        "library_version": "9.9",
    }
    assert read_runs(path / "unet", "another plan's") == []
    (path / "unet" / ".runtime-runs").write_text("{")
    assert read_runs(path / "unet", digest) == []


def test_an_engine_that_never_ran_is_not_recorded(
    doubler: TensorRTEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert doubler.plan is not None
    recorded: list[bool] = []
    doubler.plan.ran = lambda: recorded.append(True)
    with doubler, pytest.raises(EngineRunError, match="refused to run"):
        monkeypatch.setattr(SimulatedContext, "execute_async_v3", lambda context, stream: False)
        doubler(x=torch.ones(1, 4))
    assert not recorded


def test_inspect_says_where_engines_ran(
    plans: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny pipeline has no layers that its quest.json could tell of.
    monkeypatch.setattr("quest_deploy.commands.inspect.summarize_layers", lambda path: {})
    copy = tmp_path / "engines"
    shutil.copytree(plans.path, copy)
    digest = plans.manifest.files["unet/model.plan"].sha256
    place = {"gpu": "A", "compute_capability": "8.6", "driver": "1", "library_version": "2"}
    for gpu in ("NVIDIA A10", "NVIDIA L4"):
        record_run(copy / "unet", digest, place | {"gpu": gpu})
    shown = render(describe(copy))
    assert "ran on NVIDIA A10 (compute capability 8.6, driver 1) with version 2" in shown
    assert shown.count("ran on") == 2
    check_output(copy, stage="engines", overwrite=True)  # the record is in nobody's way


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_engine_on_the_gpu_equals_onnx_runtime(plans: Artifact, tiny_onnx: Path, graphs: bool) -> None:
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(2, 8, 16),
    }
    expected = load_ort_engines(tiny_onnx)["unet"](**inputs)["out_sample"]
    engine = load_tensorrt_engines(plans.path, backend="tensorrt-rtx", graphs=graphs)["unet"]
    for _ in range(3):
        got = engine(**{name: tensor.cuda() for name, tensor in inputs.items()})["out_sample"]
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)

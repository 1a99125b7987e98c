from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from quest_deploy.artifacts import Artifact
from quest_deploy.config import BuildConfig
from quest_deploy.engines import trt_api, trt_runtime
from quest_deploy.engines.libraries import Gpu, gpus
from quest_deploy.engines.ort_runtime import load_ort_engines
from quest_deploy.engines.trt_build import build_engine
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
    EngineBuildError,
    EngineInputError,
    MissingDependencyError,
    StaleArtifactError,
)
from quest_deploy.model.spec import ComponentSpec, TensorSpec

SPEC = ComponentSpec(
    name="doubler",
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 4)),),
)


class Context:
    """An execution context that doubles x into y, at the addresses it was given."""

    def __init__(self) -> None:
        self.active_optimization_profile = 0
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.runs = True

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.active_optimization_profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return True

    def execute_async_v3(self, stream_handle: int) -> bool:
        values = ctypes.c_float * (self.shape[0] * self.shape[1])
        source, target = (values.from_address(self.addresses[name]) for name in ("x", "y"))
        target[:] = [2 * value for value in source]
        return self.runs


class CudaEngine:
    """A deserialized engine with two profiles: batch 1..2 and 3..8."""

    num_optimization_profiles = 2

    def __init__(self, context: Context | None) -> None:
        self.context = context

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, int]]:
        return [[(1, 4), (2, 4), (2, 4)], [(3, 4), (8, 4), (8, 4)]][profile_index]

    def create_execution_context(self) -> Context | None:
        return self.context


@pytest.fixture
def doubler(monkeypatch: pytest.MonkeyPatch) -> TensorRTEngine:
    """The engine around a context that runs on the CPU."""
    monkeypatch.setattr(trt_runtime, "check_devices", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    return TensorRTEngine(SPEC, CudaEngine(Context()))


@pytest.fixture
def rtx_5090(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_runtime, "gpus", lambda: [Gpu(name="NVIDIA RTX 5090", compute_capability="12.0")])


def test_results_are_written_where_torch_reads_them(doubler: TensorRTEngine) -> None:
    x = torch.randn(2, 4)
    torch.testing.assert_close(doubler(x=x)["y"], 2 * x, rtol=0, atol=0)


def test_views_are_read_in_their_own_order(doubler: TensorRTEngine) -> None:
    x = torch.randn(4, 2).t()
    torch.testing.assert_close(doubler(x=x)["y"], 2 * x, rtol=0, atol=0)


def test_profile_follows_the_batch(doubler: TensorRTEngine) -> None:
    doubler(x=torch.randn(5, 4))
    assert doubler.context.active_optimization_profile == 1
    doubler(x=torch.randn(1, 4))
    assert doubler.context.active_optimization_profile == 0


def test_batch_beyond_all_profiles_is_refused(doubler: TensorRTEngine) -> None:
    with pytest.raises(
        EngineInputError, match=r"doubler input 'x': got \[9, 4\], engine allows batch 1\.\.8"
    ):
        doubler(x=torch.randn(9, 4))


def test_run_that_tensorrt_refuses_is_an_error(doubler: TensorRTEngine) -> None:
    doubler.context.runs = False
    with pytest.raises(RuntimeError, match="doubler: TensorRT refused"):
        doubler(x=torch.randn(1, 4))


def test_closed_engine_holds_nothing_and_does_not_run(doubler: TensorRTEngine) -> None:
    doubler.close()
    assert doubler.engine is None and doubler.context is None
    with pytest.raises(RuntimeError, match="closed"):
        doubler(x=torch.randn(1, 4))


def test_context_that_does_not_fit_says_so() -> None:
    with pytest.raises(EngineBuildError, match="doubler: no execution context"):
        TensorRTEngine(SPEC, CudaEngine(None))


def test_profiles_are_read_from_the_engine() -> None:
    profiles = read_profiles(SPEC, CudaEngine(Context()))
    assert [(profile["x"].min, profile["x"].max) for profile in profiles] == [
        ((1, 4), (2, 4)),
        ((3, 4), (8, 4)),
    ]


def test_tensor_on_the_cpu_is_refused() -> None:
    with pytest.raises(EngineInputError, match=r"unet input 'x': got a tensor on cpu, expected one on cuda"):
        check_devices("unet", {"x": torch.zeros(1)})


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


@pytest.mark.usefixtures("rtx_5090")
def test_plan_that_does_not_load_names_versions_gpus_and_the_command() -> None:
    details = {
        "library": "TensorRT",
        "library_version": "10.1",
        "target_gpu": "NVIDIA A10",
        "compute_capability": "8.6",
    }
    message = str(stale("unet", Path("engines"), details, "tensorrt", "11.0"))
    for part in (
        "TensorRT 10.1 for NVIDIA A10",
        "TensorRT 11.0 on NVIDIA RTX 5090",
        "12.0",
        "quest-deploy build-engine",
    ):
        assert part in message


@pytest.fixture(scope="module")
def plans(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Real engines of the tiny pipeline."""
    pytest.importorskip("tensorrt_rtx")
    return build_engine(tiny_onnx, tmp_path_factory.mktemp("plans") / "engines", BuildConfig())


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_real_engines_on_a_machine_without_a_gpu_say_what_is_missing(plans: Artifact) -> None:
    with pytest.raises(MissingDependencyError, match="need an NVIDIA GPU"):
        load_tensorrt_engines(plans.path, backend="tensorrt-rtx")


@pytest.mark.usefixtures("rtx_5090")
def test_plan_that_tensorrt_does_not_deserialize_is_stale(
    plans: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = SimpleNamespace(
        __version__="9.9",
        Logger=type("Logger", (), {"ERROR": 1, "__init__": lambda self, level: None}),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda plan: None),
    )
    monkeypatch.setattr(trt_runtime, "import_tensorrt", lambda backend: library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(StaleArtifactError, match=r"text_encoder: .*for any \(ahead of time\).* RTX 9\.9"):
        load_tensorrt_engines(plans.path, backend="tensorrt-rtx")


@pytest.mark.parametrize(
    ("protocol", "name"),
    [
        (trt_api.ExecutionContext, "IExecutionContext"),
        (trt_api.CudaEngine, "ICudaEngine"),
        (trt_api.Runtime, "Runtime"),
    ],
)
def test_the_library_has_what_the_protocols_name(protocol: type, name: str) -> None:
    library = pytest.importorskip("tensorrt_rtx")
    wanted = {member for member in vars(protocol) if not member.startswith("_")}
    assert wanted and wanted <= set(dir(getattr(library, name)))


@pytest.mark.gpu
def test_engine_on_the_gpu_equals_onnx_runtime(plans: Artifact, tiny_onnx: Path) -> None:
    inputs = {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([0.5]),
        "encoder_hidden_states": torch.randn(2, 8, 16),
    }
    expected = load_ort_engines(tiny_onnx)["unet"](**inputs)["out_sample"]
    engine = load_tensorrt_engines(plans.path, backend="tensorrt-rtx")["unet"]
    got = engine(**{name: tensor.cuda() for name, tensor in inputs.items()})["out_sample"]
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)

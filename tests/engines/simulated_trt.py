"""A TensorRT that computes y = 2x on the CPU, with the rules of the real one that are easily broken.

It tests the logic around TensorRT and stands for no result.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import threading
from collections.abc import Callable, Collection, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

from quest_deploy.engines import trt_context, trt_runtime
from quest_deploy.engines.trt_memory import DEFAULT_STREAM, ActivationMemory
from quest_deploy.engines.trt_plan import LoadedPlan
from quest_deploy.engines.trt_runtime import TensorRTEngine
from quest_deploy.model.spec import ComponentSpec, TensorSpec

SPEC = ComponentSpec(
    name="doubler",
    inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
    outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 4)),),
)
ACTIVATION_BYTES = 1024


class SimulatedDevice:
    """torch.cuda.device, with CPU tensors: the GPU that the calling thread has chosen."""

    chosen = threading.local()

    def __init__(self, device: torch.device) -> None:
        self.index = device.index or 0

    @classmethod
    def current(cls) -> int:
        return getattr(cls.chosen, "index", 0)

    def __enter__(self) -> None:
        self.before, self.chosen.index = self.current(), self.index

    def __exit__(self, *error: object) -> None:
        self.chosen.index = self.before


class SimulatedStream:
    """A CUDA stream that notes what it waits for; CUDA's default stream has handle 0.

    As torch's, those of a priority come from a pool of 32, in turn.
    """

    pools: ClassVar[dict[int, Iterator[int]]] = {
        0: itertools.cycle(range(100, 132)),
        -1: itertools.cycle(range(200, 232)),
    }

    def __init__(self, handle: int | None = None, *, priority: int = 0) -> None:
        self.cuda_stream = next(self.pools[priority]) if handle is None else handle
        self.waited_for: list[SimulatedStream] = []
        self.synchronized = 0
        self.is_busy = False

    def query(self) -> bool:
        return not self.is_busy

    def wait_stream(self, other: SimulatedStream) -> None:
        self.waited_for.append(other)

    def synchronize(self) -> None:
        self.synchronized += 1


# Minimum, optimum and maximum of x, by profile.
PROFILES = (((1, 4), (2, 4), (2, 4)), ((3, 4), (8, 4), (8, 4)))


class SimulatedContext:
    """An execution context that doubles x into y, at the addresses it was given."""

    def __init__(self, tensors: Collection[str], *, capturable: bool = True) -> None:
        self.tensors = tensors
        self.active_optimization_profile = 0
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()
        self.memory: tuple[int, int] | None = None
        self.runs = True
        self.capturable = capturable
        self.enqueued = 0
        self.streams: list[int] = []
        self.captured_on: list[int] = []
        self.shapes_set = 0
        self.ran_with: tuple[int, ...] = ()
        self.recording: list[Callable[[], None]] | None = None
        self.profiler: Any = None
        self.nvtx_verbosity = "detailed"
        self.layer_ms: Callable[[int], dict[str, float]] = lambda run: {}

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        # As the binding, which has no other answer than True.
        if not 0 <= profile_index < len(PROFILES):
            raise RuntimeError("Error in set optimization profile async.")
        self.active_optimization_profile = profile_index
        self.shape = ()  # "invalidates all dynamic bindings"
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self.memory = (memory, size)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = PROFILES[self.active_optimization_profile]
        if not all(least <= size <= most for least, size, most in zip(low, shape, high, strict=True)):
            return False
        self.shape = shape
        self.shapes_set += 1
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shape or (-1, 4)

    def set_tensor_address(self, name: str, memory: int) -> bool:
        assert memory % trt_context.ALIGNMENT_BYTES == 0
        self.addresses[name] = memory
        return True

    def is_stream_capturable(self, stream: int) -> bool:
        return self.capturable and stream != DEFAULT_STREAM

    def execute_async_v3(self, stream_handle: int) -> bool:
        self.streams.append(stream_handle)
        assert self.memory is not None and self.memory[1] >= ACTIVATION_BYTES
        assert self.shape and self.addresses.keys() == set(self.tensors)
        state = (dict(self.addresses), self.shape)
        if self.recording is None:
            self.enqueued += 1
            self.ran_with = self.shape
            self._double(*state)
            if self.profiler is not None:
                for name, ms in self.layer_ms(self.enqueued).items():
                    self.profiler.report_layer_time(name, ms)
        else:
            # What TensorRT defers until shapes run for the first time must not be captured.
            assert self.ran_with == self.shape and self.profiler is None
            self.captured_on.append(stream_handle)
            self.recording.append(lambda: self._replay(state))
        return self.runs

    def _replay(self, state: tuple[dict[str, int], tuple[int, ...]]) -> None:
        # As the real one: other shapes or addresses in its context invalidate a graph.
        assert state == (self.addresses, self.shape)
        self._double(*state)

    @staticmethod
    def _double(addresses: dict[str, int], shape: tuple[int, ...]) -> None:
        values = ctypes.c_float * (shape[0] * shape[1])
        source, target = (values.from_address(addresses[name]) for name in ("x", "y"))
        target[:] = [2 * value for value in source]


class SimulatedEngine:
    """A deserialized engine with two profiles: batch 1..2 and 3..8."""

    num_optimization_profiles = 2
    types: ClassVar[dict[str, str]] = {"x": "FLOAT", "y": "FLOAT"}
    streamable_weights_size = 4096
    takes_budgets = True

    def __init__(self, *, out_of_memory: bool = False, capturable: bool = True) -> None:
        self.out_of_memory = out_of_memory
        self.capturable = capturable
        self.contexts: list[SimulatedContext] = []
        self.made_with: list[Any] = []
        self.config = SimulatedConfig()
        self._budget = self.streamable_weights_size
        self.gpu = SimulatedDevice.current()

    @property
    def weight_streaming_budget_v2(self) -> int:
        return self._budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value: int) -> None:
        # As the real one: contexts hold it, and what TensorRT answers is lost.
        assert not self.contexts and 0 <= value <= self.streamable_weights_size
        if self.takes_budgets:
            self._budget = value

    @property
    def device_memory_size_v2(self) -> int:
        """Weights that are streamed need room to pass through."""
        return ACTIVATION_BYTES * (1 if self._budget == self.streamable_weights_size else 2)

    @property
    def num_io_tensors(self) -> int:
        return len(self.types)

    def get_tensor_name(self, index: int) -> str:
        return list(self.types)[index]

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == "x" else "output"

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=self.types[name])

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[tuple[int, int]]:
        return list(PROFILES[profile_index])

    def create_engine_inspector(self) -> SimulatedInspector:
        return SimulatedInspector()

    def create_runtime_config(self) -> SimulatedConfig:
        return self.config

    def create_execution_context(self, how: Any) -> SimulatedContext | None:
        if self.out_of_memory:
            return None
        assert self.gpu == SimulatedDevice.current()
        self.made_with.append(how)
        self.contexts.append(SimulatedContext(self.types, capturable=self.capturable))
        return self.contexts[-1]


class SimulatedInspector:
    """An inspector that tells types of a tensor with sizes that are not fixed for a context with shapes alone."""

    execution_context: SimulatedContext | None = None

    def get_engine_information(self, how: str) -> str:
        context = self.execution_context
        kind = (
            "Int8" if how == "json" and context is not None and context.shape else "N/A due to dynamic shapes"
        )
        tensors = [{"Name": "x", "Dimensions": [-1, 4], "Format/Datatype": kind}]
        layers = [
            {"Name": name, "LayerType": "CaskConvolution", "Inputs": tensors, "Outputs": tensors}
            for name in ("conv", "add")
        ]
        return json.dumps({"Layers": layers, "Bindings": ["x", "y"]})


class SimulatedCache:
    """A runtime cache that takes only what itself wrote."""

    def __init__(self) -> None:
        self.content = b"kernels"
        self.taken: bytes | None = None

    def deserialize(self, blob: bytes) -> bool:
        self.taken = blob
        return blob.startswith(b"kernels")

    def serialize(self) -> memoryview:
        return memoryview(self.content)


class SimulatedConfig:
    """A runtime configuration that keeps what it is told."""

    dynamic_shapes_kernel_specialization_strategy = "LAZY"
    strategy: Any = "STATIC"

    def __init__(self) -> None:
        self.cache = SimulatedCache()
        self.used: SimulatedCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> SimulatedCache:
        return self.cache

    def set_runtime_cache(self, cache: SimulatedCache) -> bool:
        self.used = cache
        return True


class SimulatedGraph:
    """What was enqueued while it was captured."""

    def __init__(self, recorded: list[Callable[[], None]]) -> None:
        self.recorded = recorded
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for run in self.recorded:
            run()


def simulated_capture(run: Callable[[int], None], stream: SimulatedStream) -> SimulatedGraph:
    """Record what `run`, a bound method of a ShapedContext, enqueues."""
    context = run.__self__.context  # type: ignore[attr-defined]
    context.recording = recorded = []
    try:
        run(stream.cuda_stream)
    finally:
        context.recording = None
    return SimulatedGraph(recorded)


class SimulatedLogger:
    """ILogger."""

    Severity = SimpleNamespace(INTERNAL_ERROR=0, ERROR=1)

    def __init__(self) -> None:
        pass


class SimulatedProfiler:
    """IProfiler."""

    def __init__(self) -> None:
        pass


def simulated_library(deserialize: Callable[[Any, bytes], Any]) -> ModuleType:
    """A TensorRT whose runtime answers with `deserialize` (of its logger and the plan)."""
    library = ModuleType("simulated")
    library.__version__ = "9.9"  # type: ignore[attr-defined]
    library.ILogger = SimulatedLogger  # type: ignore[attr-defined]
    library.Runtime = lambda log: SimpleNamespace(  # type: ignore[attr-defined]
        deserialize_cuda_engine=lambda plan: deserialize(log, plan)
    )
    library.ProfilingVerbosity = SimpleNamespace(LAYER_NAMES_ONLY="names")  # type: ignore[attr-defined]
    library.TensorIOMode = SimpleNamespace(OUTPUT="output")  # type: ignore[attr-defined]
    library.LayerInformationFormat = SimpleNamespace(JSON="json")  # type: ignore[attr-defined]
    library.IProfiler = SimulatedProfiler  # type: ignore[attr-defined]
    library.ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user")  # type: ignore[attr-defined]
    library.DynamicShapesKernelSpecializationStrategy = SimpleNamespace(EAGER="eager")  # type: ignore[attr-defined]
    return library


def simulate_cuda(monkeypatch: pytest.MonkeyPatch) -> SimulatedStream:
    """Put simulated streams and captures in place of CUDA's, and take CPU tensors. Returns the current stream."""
    stream = SimulatedStream()
    monkeypatch.setattr(trt_runtime, "check_devices", lambda *args: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "Stream", SimulatedStream)
    monkeypatch.setattr(torch.cuda, "device", SimulatedDevice)
    monkeypatch.setattr(torch.cuda, "current_device", SimulatedDevice.current)
    monkeypatch.setattr(trt_context, "ALIGNMENT_BYTES", 64)  # what torch aligns to on a CPU
    monkeypatch.setattr(trt_context, "capture", simulated_capture)
    return stream


def make_engine(
    cuda: SimulatedEngine, memory: ActivationMemory | None = None, *, graphs: bool = True
) -> TensorRTEngine:
    """An engine around a simulated one."""
    plan = LoadedPlan(SPEC.name, simulated_library(lambda log, plan: None), cuda)
    return TensorRTEngine(SPEC, plan, memory or make_memory(), graphs=graphs)


def make_memory(size_bytes: int = ACTIVATION_BYTES) -> ActivationMemory:
    """Activation memory on the CPU."""
    return ActivationMemory(size_bytes, torch.device("cpu"))


def run(engine: TensorRTEngine, *batches: int) -> None:
    """Run with new values each time, and check them."""
    for batch in batches:
        x = torch.randn(batch, 4)
        torch.testing.assert_close(engine(x=x)["y"], 2 * x, rtol=0, atol=0)


def captured(engine: TensorRTEngine) -> list[int]:
    """The batches that there are graphs for, the one used longest ago first."""
    (lane,) = engine.lanes.values()
    return [shapes[0][2][0] for shapes in lane.captured]

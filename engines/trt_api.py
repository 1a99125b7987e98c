"""The part of TensorRT's Python API that running an engine needs, as types.

TensorRT and TensorRT for RTX share it but for the runtime cache, neither can be relied on while types are checked, and
the published stubs do not parse. The tests hold these names against the real library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class ExecutionContext(Protocol):
    """IExecutionContext: one engine, ready to run with one set of shapes at a time."""

    profiler: Any
    nvtx_verbosity: Any

    @property
    def active_optimization_profile(self) -> int: ...

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...

    def set_device_memory(self, memory: int, size: int) -> None: ...

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool: ...

    def get_tensor_shape(self, name: str) -> Sequence[int]: ...

    def set_tensor_address(self, name: str, memory: int) -> bool: ...

    def is_stream_capturable(self, stream: int) -> bool: ...  # TensorRT for RTX alone

    def execute_async_v3(self, stream_handle: int) -> bool: ...


class RuntimeCache(Protocol):
    """IRuntimeCache, of TensorRT for RTX alone: the kernels that it compiled for this GPU."""

    def deserialize(self, blob: bytes) -> bool: ...

    def serialize(self) -> Any: ...


class RuntimeConfig(Protocol):
    """IRuntimeConfig: how execution contexts are made."""

    dynamic_shapes_kernel_specialization_strategy: Any

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None: ...

    def create_runtime_cache(self) -> RuntimeCache: ...

    def set_runtime_cache(self, cache: RuntimeCache) -> bool: ...


class SerializationConfig(Protocol):
    """ISerializationConfig: what of an engine is written."""

    def clear_flag(self, flag: Any) -> bool: ...


class EngineInspector(Protocol):
    """IEngineInspector: what an engine is made of, for the shapes of a context."""

    execution_context: Any

    def get_engine_information(self, format: Any) -> str: ...


class CudaEngine(Protocol):
    """ICudaEngine: a deserialized plan."""

    weight_streaming_budget_v2: int  # bytes of streamable weights on the GPU, fixed before contexts are made

    @property
    def num_optimization_profiles(self) -> int: ...

    @property
    def device_memory_size_v2(self) -> int: ...

    @property
    def streamable_weights_size(self) -> int: ...

    @property
    def num_io_tensors(self) -> int: ...

    def get_tensor_name(self, index: int) -> str: ...

    def get_tensor_mode(self, name: str) -> Any: ...

    def get_tensor_dtype(self, name: str) -> Any: ...

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Sequence[int]]: ...

    def create_runtime_config(self) -> RuntimeConfig: ...

    def create_execution_context(self, how: Any) -> ExecutionContext | None: ...

    def create_engine_inspector(self) -> EngineInspector: ...

    def create_serialization_config(self) -> SerializationConfig: ...

    def serialize_with_config(self, config: SerializationConfig) -> Any: ...


class Runtime(Protocol):
    """IRuntime: loads plans; None where the plan is of another version or GPU."""

    engine_host_code_allowed: bool

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None: ...

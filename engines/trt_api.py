"""The part of TensorRT's Python API that running an engine needs, as types.

TensorRT and TensorRT for RTX share it, neither can be relied on while types are checked, and the published stubs
do not parse. The tests hold these names against the real library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class ExecutionContext(Protocol):
    """IExecutionContext: one engine, ready to run with one set of shapes at a time."""

    @property
    def active_optimization_profile(self) -> int: ...

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool: ...

    def get_tensor_shape(self, name: str) -> Sequence[int]: ...

    def set_tensor_address(self, name: str, memory: int) -> bool: ...

    def execute_async_v3(self, stream_handle: int) -> bool: ...


class CudaEngine(Protocol):
    """ICudaEngine: a deserialized plan."""

    @property
    def num_optimization_profiles(self) -> int: ...

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> Sequence[Sequence[int]]: ...

    def create_execution_context(self) -> ExecutionContext | None: ...


class Runtime(Protocol):
    """IRuntime: loads plans; None where the plan is of another version or GPU."""

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> CudaEngine | None: ...

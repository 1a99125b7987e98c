"""A deserialized TensorRT plan and how its execution contexts are made."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quest_deploy.engines.base import Closing
from quest_deploy.engines.runtime_cache import RuntimeCacheFile
from quest_deploy.engines.trt_api import CudaEngine, ExecutionContext, Runtime
from quest_deploy.errors import EngineBuildError


class LoadedPlan(Closing):
    """One component's engine.

    Args:
        name: Of the component.
        library: ``tensorrt`` or ``tensorrt_rtx``.
        engine: The deserialized plan.
        runtime: What deserialized it; it must outlive the engine.
    """

    def __init__(self, name: str, library: Any, engine: CudaEngine, runtime: Runtime | None = None) -> None:
        self.name = name
        self.engine: CudaEngine | None = engine
        self.runtime = runtime
        self.cache: RuntimeCacheFile | None = None
        self.ran: Callable[[], None] | None = None
        self.how: Any = library.ExecutionContextAllocationStrategy.USER_MANAGED
        self._lock = threading.Lock()

    def compile_at_run_time(self, library: Any, folder: Path, plan_sha256: str) -> None:
        """For TensorRT for RTX, which compiles kernels when they first run: keep them, and do not swap them later.

        By default it runs a fallback kernel until a better one has been compiled in the background; a captured CUDA
        graph would hold on to the fallback, so kernels for new shapes are compiled before the first run.
        """
        assert self.engine is not None
        config = self.engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.how)
        config.dynamic_shapes_kernel_specialization_strategy = (
            library.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self.cache = RuntimeCacheFile(config, folder, plan_sha256)
        self.how = config

    def stream_weights(self, limit_bytes: int | None) -> None:
        """Keep at most so many bytes of weights on the GPU; before contexts and their memory are made.

        Without this an engine built for it holds all its weights there. None lets TensorRT go by the free memory.
        """
        assert self.engine is not None
        if limit_bytes is None:
            budget = self.engine.get_weight_streaming_automatic_budget()
        else:
            budget = min(limit_bytes, self.engine.streamable_weights_size)
        self.engine.weight_streaming_budget_v2 = budget

    def create_context(self) -> ExecutionContext:
        """A new execution context without activation memory.

        Raises:
            EngineBuildError: there is not enough memory on the GPU.
        """
        if self.engine is None:
            raise RuntimeError(f"{self.name}: the engine is closed")
        with self._lock:
            context = self.engine.create_execution_context(self.how)
        if context is None:
            raise EngineBuildError(
                f"{self.name}: no execution context, most likely for want of GPU memory; "
                "close other programs on the GPU, or rebuild with a smaller --max-batch"
            )
        return context

    def close(self) -> None:
        """Keep the runtime cache and free the engine; its contexts must be gone."""
        if self.cache is not None:
            self.cache.save()
        # Each uses the next one's memory.
        self.cache = None
        self.how = None
        self.engine = None
        self.runtime = None

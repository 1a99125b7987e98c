"""A deserialized TensorRT plan and how its execution contexts are made."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from quest_deploy.engines.base import Closing
from quest_deploy.engines.runtime_cache import RuntimeCacheFile
from quest_deploy.engines.trt_api import CudaEngine, ExecutionContext, Runtime
from quest_deploy.engines.trt_log import errors_so_far, last_words
from quest_deploy.errors import EngineBuildError, EngineRunError

FREE_SHARE = 0.9
"""Of the free memory of a GPU, how much weights and activations may take: torch, contexts and graphs need some."""


class Refusal(RuntimeError):
    """TensorRT did not do what it was asked with a plan that it has loaded."""


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
        self.library = library
        self.streams = False
        """Whether some of its weights stay in host memory."""
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

    def stream_weights(self, budget_bytes: int) -> int:
        """Keep at most so many bytes of weights on the GPU; before contexts and their memory are made.

        Without this an engine built for it holds all its weights there. Returns what it may keep.

        Raises:
            EngineBuildError: TensorRT keeps another number.
        """
        assert self.engine is not None
        budget = max(0, min(budget_bytes, self.engine.streamable_weights_size))
        before = errors_so_far(self.library)
        self.engine.weight_streaming_budget_v2 = budget
        # The binding drops what TensorRT answers.
        if self.engine.weight_streaming_budget_v2 != budget:
            raise EngineBuildError(
                f"{self.name}: TensorRT refused to keep {budget} bytes of its weights on the GPU"
                f"{last_words(self.library, before)}; give another limit with --gpu-weights, or build without "
                "--weight-streaming"
            )
        self.streams = budget < self.engine.streamable_weights_size
        return budget

    def create_context(self) -> ExecutionContext:
        """A new execution context without activation memory.

        Raises:
            EngineBuildError: there is not enough memory on the GPU.
        """
        if self.engine is None:
            raise RuntimeError(f"{self.name}: the engine is closed")
        before = errors_so_far(self.library)
        with self._lock:
            context = self.engine.create_execution_context(self.how)
            if context is None:
                torch.cuda.empty_cache()  # what torch holds without using it, TensorRT lacks
                context = self.engine.create_execution_context(self.how)
        if context is None:
            raise too_little_memory(self.name, f"no execution context{last_words(self.library, before)}")
        return context

    def keep_kernels(self) -> None:
        """Write the runtime cache, after a run that may have compiled kernels: services are killed, not closed."""
        if self.cache is not None:
            with self._lock:
                self.cache.save()

    def close(self) -> None:
        """Keep the runtime cache and free the engine; its contexts must be gone."""
        if self.cache is not None:
            self.cache.save()
        # Each uses the next one's memory.
        self.cache = None
        self.how = None
        self.engine = None
        self.runtime = None


def stream_weights(plans: Mapping[str, LoadedPlan], *, first: str, weights_gb: float | None) -> None:
    """Decide how much of each component's weights lies on the GPU.

    Args:
        plans: Built with weight streaming; no contexts yet.
        first: The component that gets what it needs before the others do: the one that runs at every step.
        weights_gb: For each, in 10^9 bytes; None shares the free memory. TensorRT's own budget is not asked for: its
            Python binding cuts it to 32 bits, and it does not know of the other components.

    Raises:
        EngineBuildError: TensorRT refuses.
    """
    if weights_gb is not None:
        for plan in plans.values():
            plan.stream_weights(round(weights_gb * 1e9))
        return
    for plan in plans.values():
        plan.stream_weights(0)
    # With nothing kept on the GPU they need most activation memory, which they share.
    activations = max(plan.engine.device_memory_size_v2 for plan in plans.values() if plan.engine is not None)
    left = int(torch.cuda.mem_get_info()[0] * FREE_SHARE) - activations
    for name in sorted(plans, key=lambda name: name != first):
        left -= plans[name].stream_weights(left)


@contextlib.contextmanager
def run_errors(component: str) -> Iterator[None]:
    """Tell what TensorRT and torch refuse while an engine runs as errors that a user can act on.

    Raises:
        EngineBuildError: too little memory on the GPU.
        EngineRunError: TensorRT or the GPU refuses to go on.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise too_little_memory(component, str(error).partition("\n")[0]) from error
    except (Refusal, torch.AcceleratorError) as error:
        reason = str(error).partition("\n")[0]
        raise EngineRunError(
            f"{component}: {reason}; run the same command again, and if that does not help build the engine again on "
            "this machine with `quest-deploy build-engine`, or run its ONNX directory with --backend onnxruntime"
        ) from error


def too_little_memory(component: str, reason: str) -> EngineBuildError:
    """The error where the memory of the GPU does not suffice."""
    return EngineBuildError(
        f"{component}: {reason}; most likely the GPU's memory does not suffice: close other programs on it, draw fewer "
        "images at a time, or rebuild with a smaller --max-batch"
    )

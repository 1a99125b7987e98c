"""Runs TensorRT plans on an NVIDIA GPU: torch CUDA tensors in and out, by address, on torch's current stream."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import TensorRTBackend
from quest_deploy.engines.adapted import AdaptedEngine
from quest_deploy.engines.base import Closing, Engine, check_inputs
from quest_deploy.engines.foreign import from_json
from quest_deploy.engines.libraries import gpus, import_tensorrt, title_of
from quest_deploy.engines.profiles import InputRange, Profile, Shape, limits_of, select_profile
from quest_deploy.engines.trt_api import CudaEngine, ExecutionContext, Runtime
from quest_deploy.errors import (
    ConfigError,
    EngineBuildError,
    EngineInputError,
    MissingDependencyError,
    StaleArtifactError,
)
from quest_deploy.model.spec import ComponentSpec, component_specs

logger = logging.getLogger(__name__)

PLAN_NAME = "model.plan"


class TensorRTEngine(Closing):
    """One component in one execution context."""

    def __init__(self, spec: ComponentSpec, engine: CudaEngine, runtime: Runtime | None = None) -> None:
        self.spec = spec
        self.runtime = runtime  # must outlive the engine
        self.profiles = read_profiles(spec, engine)
        self.limits = limits_of(spec, self.profiles)
        self.engine: CudaEngine | None = engine
        self.context: ExecutionContext | None = engine.create_execution_context()
        if self.context is None:
            raise EngineBuildError(
                f"{spec.name}: no execution context, most likely for want of GPU memory; "
                "close other programs on the GPU, or rebuild with a smaller --max-batch"
            )

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Enqueue one run on torch's current stream: CUDA tensors in, CUDA tensors out.

        Raises:
            EngineInputError: a name, type, shape or device that the engine does not take.
        """
        check_inputs(self.spec, inputs, self.limits)
        check_devices(self.spec.name, inputs)
        if self.context is None:
            raise RuntimeError(f"{self.spec.name}: the engine is closed")
        stream = torch.cuda.current_stream().cuda_stream
        bound = {name: tensor.contiguous() for name, tensor in inputs.items()}
        profile = select_profile(
            self.spec.name, self.profiles, {name: tuple(tensor.shape) for name, tensor in bound.items()}
        )
        if profile != self.context.active_optimization_profile:
            self.context.set_optimization_profile_async(profile, stream)
        for name, tensor in bound.items():
            self.context.set_input_shape(name, tuple(tensor.shape))
            self.context.set_tensor_address(name, tensor.data_ptr())
        outputs = bind_outputs(self.context, self.spec, next(iter(bound.values())).device)
        if not self.context.execute_async_v3(stream):
            raise RuntimeError(f"{self.spec.name}: TensorRT refused to run; its log says why")
        return outputs

    def close(self) -> None:
        # Each uses the next one's memory.
        self.context = None
        self.engine = None
        self.runtime = None


def bind_outputs(context: ExecutionContext, spec: ComponentSpec, device: torch.device) -> dict[str, Tensor]:
    """Allocate the outputs for the input shapes that are set, and give their addresses to the context."""
    # torch's allocator gives memory back in stream order, so tensors may be freed before the run has ended.
    outputs = {}
    for tensor in spec.outputs:
        shape = tuple(context.get_tensor_shape(tensor.name))
        output = torch.empty(shape, dtype=getattr(torch, tensor.dtype), device=device)
        context.set_tensor_address(tensor.name, output.data_ptr())
        outputs[tensor.name] = output
    return outputs


def load_tensorrt_engines(engine_dir: Path, *, backend: TensorRTBackend) -> dict[str, Engine]:
    """Load every plan of an `engines` artifact onto the current GPU.

    Args:
        engine_dir: The artifact; its hashes are verified first.
        backend: The TensorRT flavour, which must be the one that built it.

    Raises:
        MissingDependencyError: no GPU, no CUDA build of torch, or no TensorRT.
        ConfigError: the artifact is of the other flavour.
        ArtifactError: not an `engines` artifact, or changed since it was written.
        StaleArtifactError: this TensorRT or GPU cannot load the plans.
    """
    source = read_artifact(Path(engine_dir), stage="engines")
    check_flavour(source.path, str(source.manifest.config.get("backend")), backend)
    check_gpu(source.path)
    library = import_tensorrt(backend)
    runtime: Runtime = library.Runtime(library.Logger(library.Logger.ERROR))
    engines: dict[str, Engine] = {}
    fitted = from_json(source.manifest.details.get("interfaces", {}))
    for name, spec in component_specs(source.path).items():
        plan = (source.path / name / PLAN_NAME).read_bytes()
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise stale(name, source.path, source.manifest.details, backend, str(library.__version__))
        if name in fitted:
            loaded = TensorRTEngine(fitted[name].graph, engine, runtime)
            engines[name] = AdaptedEngine(fitted[name], loaded)
            continue
        engines[name] = TensorRTEngine(spec, engine, runtime)
    return engines


def check_flavour(path: Path, built_for: str, backend: str) -> None:
    """Check that the engines are of the flavour asked for: their plans are not interchangeable.

    Raises:
        ConfigError: they are not.
    """
    if built_for != backend:
        raise ConfigError(
            f"backend is {backend}, but the engines in '{path}' were built for {built_for}; "
            f"use --backend {built_for}, or build others with `quest-deploy build-engine --backend {backend}`"
        )


def check_gpu(path: Path) -> None:
    """Check that there is a GPU and that torch can use it.

    Raises:
        MissingDependencyError: says which of the two is missing.
    """
    if not gpus():
        raise MissingDependencyError(
            f"the engines in '{path}' were built ahead of time and need an NVIDIA GPU to run, and this machine offers "
            "none (no NVIDIA driver); run them on one that has, or run the ONNX directory they were built from with "
            "--backend onnxruntime"
        )
    if not torch.cuda.is_available():
        raise MissingDependencyError(
            f"this machine has a GPU, but torch {torch.__version__} cannot use it; install a CUDA build of torch "
            "(https://pytorch.org/get-started)"
        )


def stale(
    component: str, path: Path, details: Mapping[str, Any], backend: str, version: str
) -> StaleArtifactError:
    """The error for a plan that TensorRT does not load: what it was built with and for, what is here, what to run."""
    gpu = gpus()[0]
    return StaleArtifactError(
        f"{component}: the engine in '{path}' was built with {details.get('library')} "
        f"{details.get('library_version')} for {details.get('target_gpu')} (compute capability "
        f"{details.get('compute_capability')}); {title_of(backend)} {version} on {gpu.name} (compute capability "
        f"{gpu.compute_capability}) cannot load it; build it again here with "
        f"`quest-deploy build-engine ONNX_DIR -o {path} --backend {backend} --overwrite`"
    )


def check_devices(component: str, inputs: Mapping[str, Tensor]) -> None:
    """Check that every input lies on the GPU.

    Raises:
        EngineInputError: names the tensor that does not.
    """
    for name, tensor in inputs.items():
        if not tensor.is_cuda:
            raise EngineInputError(
                f"{component} input {name!r}: got a tensor on {tensor.device}, expected one on cuda; "
                "move it with .cuda()"
            )


def read_profiles(spec: ComponentSpec, engine: CudaEngine) -> Sequence[Profile]:
    """The optimization profiles of a deserialized engine."""

    def ranges(name: str, index: int) -> InputRange:
        low, best, high = (_shape(dims) for dims in engine.get_tensor_profile_shape(name, index))
        return InputRange(min=low, opt=best, max=high)

    return [
        {tensor.name: ranges(tensor.name, index) for tensor in spec.inputs}
        for index in range(engine.num_optimization_profiles)
    ]


def _shape(dims: Sequence[int]) -> Shape:
    return tuple(int(size) for size in dims)

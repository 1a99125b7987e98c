"""Runs TensorRT plans on an NVIDIA GPU: torch CUDA tensors in and out, by address, on torch's current stream."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest_deploy.artifacts import Artifact, read_artifact
from quest_deploy.config import TensorRTBackend
from quest_deploy.engines.adapted import AdaptedEngine
from quest_deploy.engines.base import Closing, Engine, check_inputs
from quest_deploy.engines.foreign import from_json
from quest_deploy.engines.libraries import (
    Gpu,
    driver_version,
    gpus,
    import_tensorrt,
    title_of,
    without_cuda,
)
from quest_deploy.engines.origin import differing, options_here, read_config
from quest_deploy.engines.profiles import InputRange, Profile, Shape, batch_ranges, limits_of, select_profile
from quest_deploy.engines.run_record import record_run
from quest_deploy.engines.trt_api import CudaEngine, Runtime
from quest_deploy.engines.trt_build import PLAN_NAME
from quest_deploy.engines.trt_context import Lane, Shapes, shapes_of
from quest_deploy.engines.trt_log import make_log
from quest_deploy.engines.trt_memory import ActivationMemory, Block
from quest_deploy.engines.trt_plan import LoadedPlan, run_errors, stream_weights
from quest_deploy.errors import (
    ArtifactError,
    ConfigError,
    EngineInputError,
    MissingDependencyError,
    StaleArtifactError,
)
from quest_deploy.model.spec import ComponentSpec, TensorSpec, component_specs, family_of

logger = logging.getLogger(__name__)

# Of TensorRT for RTX 1.7 on an H200.
UNSUPPORTED = "does not support this compute capability"

# Torch's names of TensorRT's types.
_TYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "UINT8": "uint8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
}


class TensorRTEngine(Closing):
    """One component. Several threads may run it at the same time, each in a block of memory with its own contexts.

    Args:
        spec: The component; types are those of the engine.
        plan: Its engine, freed with this one.
        memory: What the components of the pipeline compute in.
        graphs: Whether shapes that come again run as captured CUDA graphs.
    """

    def __init__(
        self, spec: ComponentSpec, plan: LoadedPlan, memory: ActivationMemory, *, graphs: bool = True
    ) -> None:
        assert plan.engine is not None
        self.spec = as_built(spec, plan.library, plan.engine)
        self.plan: LoadedPlan | None = plan
        self.memory: ActivationMemory | None = memory
        self.device = memory.device
        # TensorRT: an engine that streams its weights runs synchronously, which cannot be captured.
        self.graphs = graphs and not plan.streams
        self.profiles = read_profiles(spec, plan.engine)
        self.limits = limits_of(spec, self.profiles)
        self.lanes: dict[Block, Lane] = {}
        self.has_run = False
        self._chosen: dict[Shapes, int] = {}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Enqueue one run on torch's current stream: CUDA tensors in, CUDA tensors out.

        Raises:
            EngineInputError: a name, type, shape or device that the engine does not take.
            EngineBuildError: too little memory on the GPU.
            EngineRunError: TensorRT or the GPU refuses.
        """
        if self.plan is None:
            raise RuntimeError(f"{self.spec.name}: the engine is closed")
        shapes = shapes_of(inputs)
        are_new = shapes not in self._chosen
        profile = self._profile(shapes, inputs)
        check_devices(self.spec.name, inputs, self.device)
        assert self.memory is not None
        # An engine is bound to the GPU that it was loaded onto; this thread may have chosen another.
        with (
            torch.cuda.device(self.device),
            run_errors(self.spec.name),
            self.memory.borrow(torch.cuda.current_stream()) as block,
        ):
            outputs = self._lane(block).run(inputs, shapes, profile)
        self.has_run = True
        if are_new:
            self.plan.keep_kernels()
        return outputs

    def batch_ranges(self, shapes: Mapping[str, Shape]) -> list[tuple[int, int]]:
        """Fewest and most samples at once by each profile that holds all sizes of `shapes` beside the batch."""
        return batch_ranges(self.spec, self.profiles, shapes)

    @property
    def captured(self) -> int:
        """How many CUDA graphs there are of this component."""
        return sum(len(lane.captured) for lane in self.lanes.values())

    def _profile(self, shapes: Shapes, inputs: Mapping[str, Tensor]) -> int:
        """The profile for these shapes, which are checked when they come for the first time."""
        if shapes not in self._chosen:
            check_inputs(self.spec, inputs, self.limits)
            self._chosen[shapes] = select_profile(
                self.spec.name, self.profiles, {name: shape for name, _, shape in shapes}
            )
        return self._chosen[shapes]

    def _lane(self, block: Block) -> Lane:
        """The contexts in a block, which the caller has borrowed."""
        if block not in self.lanes:
            assert self.plan is not None
            self.lanes[block] = Lane(self.spec, self.plan, block, graphs=self.graphs)
        return self.lanes[block]

    def close(self) -> None:
        """Free everything, when no thread runs the engine any more; calling it again does nothing."""
        for lane in self.lanes.values():
            lane.close()
        if self.has_run and self.plan is not None and self.plan.ran is not None:
            self.plan.ran()
        self.lanes.clear()
        if self.plan is not None:
            self.plan.close()
        self.plan = None
        self.memory = None


def load_tensorrt_engines(
    engine_dir: Path,
    *,
    backend: TensorRTBackend,
    graphs: bool = True,
    weights_gb: float | None = None,
) -> dict[str, Engine]:
    """Load every plan of an `engines` artifact onto the current GPU.

    Args:
        engine_dir: The artifact; its hashes are verified first.
        backend: The TensorRT flavour, which must be the one that built it.
        graphs: Whether shapes that come again run as captured CUDA graphs.
        weights_gb: Of each component's weights, how much lies on the GPU, in 10^9 bytes, where the engines were built
            with weight streaming; None goes by the free memory.

    Raises:
        MissingDependencyError: no GPU, no CUDA build of torch, or no TensorRT.
        ConfigError: the artifact is of the other flavour, or cannot stream weights.
        ArtifactError: not an `engines` artifact, changed since it was written, or without weights.
        StaleArtifactError: this TensorRT or GPU cannot load the plans.
    """
    source = read_artifact(Path(engine_dir), stage="engines")
    check_flavour(source.path, str(source.manifest.config.get("backend")), backend)
    check_weights(source)
    streaming = check_streaming(source, weights_gb)
    check_gpu(source.path)
    library = import_tensorrt(backend)
    plans = load_plans(source, library, backend)
    if streaming:
        stream_weights(plans, first=family_of(source.path).denoiser, weights_gb=weights_gb)
    largest = max(plan.engine.device_memory_size_v2 for plan in plans.values() if plan.engine is not None)
    memory = ActivationMemory(largest, torch.device("cuda", torch.cuda.current_device()))
    engines: dict[str, Engine] = {}
    fitted = from_json(source.manifest.details.get("interfaces", {}))
    for name, spec in component_specs(source.path).items():
        if name in fitted:
            loaded = TensorRTEngine(fitted[name].graph, plans[name], memory, graphs=graphs)
            engines[name] = AdaptedEngine(dataclasses.replace(fitted[name], graph=loaded.spec), loaded)
            continue
        engines[name] = TensorRTEngine(spec, plans[name], memory, graphs=graphs)
    return engines


def load_plans(source: Artifact, library: Any, backend: TensorRTBackend) -> dict[str, LoadedPlan]:
    """Deserialize every plan of a verified artifact.

    Raises:
        StaleArtifactError: this TensorRT or GPU cannot load one; holds what TensorRT says.
    """
    log = make_log(library)
    runtime = make_runtime(library, source.manifest.config)
    index = torch.cuda.current_device()
    gpu = gpus()[index]
    place = {
        "gpu": gpu.name,
        "compute_capability": gpu.compute_capability,
        "driver": driver_version(),
        "library_version": library.__version__,
    }
    plans = {}
    for name in component_specs(source.path):
        file = f"{name}/{PLAN_NAME}"
        engine = runtime.deserialize_cuda_engine((source.path / file).read_bytes())
        if engine is None:
            raise stale(name, source, str(library.__version__), log.errors, index)
        plans[name] = LoadedPlan(name, library, engine, runtime)
        digest = source.manifest.files[file].sha256
        plans[name].ran = functools.partial(record_run, source.path / name, digest, place)
        if backend == "tensorrt-rtx":
            plans[name].compile_at_run_time(library, source.path / name, digest)
    tell_other_gpu(source, gpu)
    return plans


def tell_other_gpu(source: Artifact, gpu: Gpu) -> None:
    """Warn where engines were built on a GPU of another model: TensorRT loads them, which may be slow or fail."""
    config, model = source.manifest.config, source.manifest.details.get("target_gpu")
    for_one = (config.get("backend"), config.get("hardware_compatible", "none")) == ("tensorrt", "none")
    if for_one and model != gpu.name:
        logger.warning(
            "the engines in '%s' were built on %s, by what is fastest there, and this is %s: they may be slow here, or "
            "fail; build engines here with `quest-deploy build-engine ONNX_DIR -o DIR %s`",
            source.path, model, gpu.name, options_here(read_config(config), gpu),
        )  # fmt: skip


def make_runtime(library: Any, config: Mapping[str, Any]) -> Runtime:
    """What deserializes the plans of a build with this configuration; its log holds no errors yet."""
    log = make_log(library)
    log.errors.clear()
    runtime: Runtime = library.Runtime(log)
    if config.get("version_compatible") and config.get("backend") == "tensorrt":
        # Such a plan brings the runtime of the version that built it.
        runtime.engine_host_code_allowed = True
    return runtime


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


def check_weights(source: Artifact) -> None:
    """Check that engines have their weights.

    Raises:
        ArtifactError: they were built without; says how to put them in.
    """
    if source.manifest.details.get("weights_stripped"):
        raise ArtifactError(
            f"the engines in '{source.path}' were built with --strip-weights and hold no weights; put them in, on the "
            f"machine that runs them, with `quest-deploy refit {source.path} ONNX_DIR -o DIR`"
        )


def check_streaming(source: Artifact, weights_gb: float | None) -> bool:
    """Whether engines were built so that their weights may stay in host memory.

    Raises:
        ConfigError: they were not, and `weights_gb` wants it.
    """
    streaming = bool(source.manifest.config.get("weight_streaming"))
    if weights_gb is not None and not streaming:
        raise ConfigError(
            f"the engines in '{source.path}' hold all their weights on the GPU; leave the limit of weights out, or "
            "build them with `quest-deploy build-engine --weight-streaming`"
        )
    return streaming


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
        raise MissingDependencyError(f"this machine has a GPU, but {without_cuda(torch.__version__)}")


def stale(
    component: str, source: Artifact, version: str, words: Sequence[str] = (), index: int = 0
) -> StaleArtifactError:
    """The error for a plan that TensorRT does not load: what was otherwise where it was built, and what to run.

    Args:
        component: The plan's.
        source: The `engines` artifact.
        version: Of TensorRT here.
        words: What TensorRT says.
        index: Of the GPU that it was loaded onto.
    """
    gpu, config = gpus()[index], read_config(source.manifest.config)
    title = title_of(config.backend)
    found = differing(source.manifest.details, config, f"{title} {version}", gpu, driver_version())
    # Into another directory: where nothing differs that a manifest tells, engines that are there count as up to date.
    remedy = (
        f"build engines here with `quest-deploy build-engine ONNX_DIR -o DIR {options_here(config, gpu)}`"
    )
    if any(UNSUPPORTED in word for word in words):
        remedy = (
            f"no build of {title} runs on this GPU: "
            "build with --backend tensorrt, or draw with --backend onnxruntime or torch"
        )
    said = f" ({'; '.join(words)})" if words else ""
    origin = f"it was built {', '.join(found)}; " if found else ""
    return StaleArtifactError(
        f"{component}: {title} {version} on {gpu.name} cannot load the engine in '{source.path}'{said}; "
        f"{origin}{remedy}"
    )


def check_devices(component: str, inputs: Mapping[str, Tensor], device: torch.device) -> None:
    """Check that every input lies on the engine's GPU.

    Raises:
        EngineInputError: names the tensor that does not.
    """
    for name, tensor in inputs.items():
        if tensor.device != device:
            raise EngineInputError(
                f"{component} input {name!r}: got a tensor on {tensor.device}, expected one on {device}; "
                f"move it with .to('{device}')"
            )


def as_built(spec: ComponentSpec, library: Any, engine: CudaEngine) -> ComponentSpec:
    """What an engine takes and gives: `spec` with the engine's own types, and outputs that `spec` leaves out.

    TensorRT makes float32 of a graph's float64, and runs only where every output has memory.
    """

    def typed(tensor: TensorSpec) -> TensorSpec:
        kind = engine.get_tensor_dtype(tensor.name).name
        return dataclasses.replace(tensor, dtype=_TYPES.get(kind, tensor.dtype))

    known = {tensor.name for tensor in spec.outputs}
    names = map(engine.get_tensor_name, range(engine.num_io_tensors))
    outputs = [name for name in names if engine.get_tensor_mode(name) == library.TensorIOMode.OUTPUT]
    more = [TensorSpec(name=name, dtype="float32", shape=()) for name in outputs if name not in known]
    return dataclasses.replace(
        spec, inputs=tuple(map(typed, spec.inputs)), outputs=tuple(map(typed, (*spec.outputs, *more)))
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

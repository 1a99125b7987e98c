"""ONNX Runtime: runs an exported model as it is, on the CPU or on CUDA. The accuracy engine of the parity ladder."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import Provider
from quest_deploy.engines.adapted import AdaptedEngine
from quest_deploy.engines.base import Closing, Engine, cannot_run, check_inputs
from quest_deploy.engines.foreign import fitted_components
from quest_deploy.engines.libraries import TENSOR_FLOAT, age_of, gpus
from quest_deploy.errors import ArtifactError, MissingDependencyError, StaleArtifactError
from quest_deploy.files import check_name
from quest_deploy.model.spec import ComponentSpec, TensorSpec, component_specs

logger = logging.getLogger(__name__)

ONNX_NAME = "model.onnx"
CPU_PROVIDER = "CPUExecutionProvider"
PROVIDERS_OF: dict[Provider, tuple[str, ...]] = {
    "cpu": (CPU_PROVIDER,),
    "cuda": ("CUDAExecutionProvider", CPU_PROVIDER),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", CPU_PROVIDER),
}
InputShapes = tuple[tuple[str, tuple[int, ...]], ...]
_ERRORS_ONLY = 3
_BFLOAT16 = 16  # ONNX's number of the type, which NumPy does not have
_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


class OrtEngine(Closing):
    """One component in one ONNX Runtime session, on the GPU where both the session and torch use it."""

    def __init__(self, spec: ComponentSpec, session: Any) -> None:
        self.spec = spec
        self.session = session
        first = session.get_providers()[0]
        on_gpu = first != CPU_PROVIDER and torch.cuda.is_available()
        index = int(session.get_provider_options()[first].get("device_id", 0))
        self.device = torch.device("cuda", index) if on_gpu else torch.device("cpu")
        self._output_shapes: dict[InputShapes, dict[str, tuple[int, ...]]] = {}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once: tensors in and out on `device`; nothing is copied where a tensor lies there and is contiguous.

        Outputs are written where torch allocated them, once a first run with the same input shapes has told theirs.

        Raises:
            EngineInputError: a name, type or shape that the component does not take.
        """
        check_inputs(self.spec, inputs)
        if self.session is None:
            raise RuntimeError(f"{self.spec.name}: the engine is closed")
        bound = {name: value.detach().to(self.device).contiguous() for name, value in inputs.items()}
        shapes = tuple((name, tuple(value.shape)) for name, value in sorted(bound.items()))
        binding = self.session.io_binding()
        for tensor in self.spec.inputs:
            bind(binding.bind_input, tensor, bound[tensor.name])
        outputs = self._bind_outputs(binding, self._output_shapes.get(shapes))
        try:
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()  # ONNX Runtime has a stream of its own
            self.session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except _runtime_errors() as error:
            raise cannot_run(self.spec, "ONNX Runtime", inputs, _cause(error)) from error
        if outputs:
            return outputs
        found = {
            tensor.name: torch.from_numpy(value.numpy()).to(self.device)
            for tensor, value in zip(self.spec.outputs, binding.get_outputs(), strict=True)
        }
        self._output_shapes[shapes] = {name: tuple(value.shape) for name, value in found.items()}
        return found

    def _bind_outputs(self, binding: Any, shapes: Mapping[str, tuple[int, ...]] | None) -> dict[str, Tensor]:
        """Tensors for the outputs; none, and ONNX Runtime allocates, where their shapes are not known."""
        outputs = {}
        for tensor in self.spec.outputs:
            if shapes is None:
                binding.bind_output(tensor.name, self.device.type, self.device.index or 0)
                continue
            outputs[tensor.name] = torch.empty(
                shapes[tensor.name], dtype=getattr(torch, tensor.dtype), device=self.device
            )
            bind(binding.bind_output, tensor, outputs[tensor.name])
        return outputs

    def close(self) -> None:
        self.session = None


def bind(how: Callable[..., None], tensor: TensorSpec, value: Tensor) -> None:
    """Bind a contiguous tensor's memory to an input or output."""
    kind = _BFLOAT16 if tensor.dtype == "bfloat16" else np.dtype(tensor.dtype).type
    how(tensor.name, value.device.type, value.device.index or 0, kind, tuple(value.shape), value.data_ptr())


def load_ort_engines(
    onnx_dir: Path, *, threads: int | None = None, provider: Provider | None = None
) -> dict[str, Engine]:
    """Open a session for every component of an `onnx` artifact.

    Args:
        onnx_dir: The artifact; its hashes are verified first.
        threads: Threads of one operator; None leaves the choice to ONNX Runtime.
        provider: What runs the operators; None takes CUDA where it can run, else the CPU. A GPU is the current one.

    Raises:
        MissingDependencyError: ONNX Runtime or the provider asked for is not there.
        ArtifactError: not an `onnx` artifact, changed since it was written, or not a graph that can be run.
        StaleArtifactError: the graphs' inputs or outputs are not this version's.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime cannot be imported ({error}); run `pip install onnxruntime`"
        ) from error
    providers = choose_providers(onnxruntime.get_available_providers(), has_gpu=bool(gpus()), wanted=provider)
    tell_tensor_float(providers[0])
    source = read_artifact(Path(onnx_dir), stage="onnx")
    options = onnxruntime.SessionOptions()
    # By default a product of float activations and integer weights quantizes its activations: 46 dB of 140 are left.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    # Its plan of a shape's memory is one block from the second run on, and the first run's blocks are kept beside it.
    options.enable_mem_pattern = False
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    engines: dict[str, Engine] = {}
    fitted = fitted_components(source)
    # Asking torch for its GPU initializes CUDA, which the CPU does not need.
    gpu = 0 if providers[0] == CPU_PROVIDER else current_gpu()
    told, on_cpu = with_options(providers, gpu), []
    for name, spec in component_specs(source.path).items():
        path, dtype = source.path / name / ONNX_NAME, source.manifest.details.get("dtype")
        session = open_session(path, options, told, dtype)
        if provider is not None:
            check_started(session, providers[0])
        elif providers[0] not in session.get_providers():
            on_cpu.append(name)
        if name in fitted:
            engines[name] = AdaptedEngine(fitted[name], OrtEngine(fitted[name].graph, session))
            continue
        check_names(spec, session)
        engines[name] = OrtEngine(spec, session)
    if on_cpu:
        logger.warning(
            "the CPU runs %s, since ONNX Runtime could not start %s (its log says why); --provider cpu asks for that, "
            "and --provider cuda makes it an error",
            ", ".join(on_cpu),
            providers[0],
        )
    logger.debug("opened %s with %s", source.path, ", ".join(providers))
    return engines


def choose_providers(available: list[str], *, has_gpu: bool, wanted: Provider | None = None) -> list[str]:
    """The providers in their order, always with the CPU behind the others.

    Without a wish, CUDA where it can run. The TensorRT provider is taken only when it is asked for: it builds engines,
    for minutes, each time a session opens; `build-engine` does that once. A CUDA build of ONNX Runtime offers its
    providers on machines without a GPU, too.

    Raises:
        MissingDependencyError: the provider asked for is not in this build of ONNX Runtime, or there is no GPU.
    """
    if wanted is None:
        wanted = "cuda" if has_gpu and PROVIDERS_OF["cuda"][0] in available else "cpu"
    chosen = PROVIDERS_OF[wanted]
    if chosen[0] not in available:
        raise MissingDependencyError(
            f"this ONNX Runtime has no {chosen[0]} (it has {', '.join(available)}); "
            "run `pip uninstall onnxruntime` and `pip install onnxruntime-gpu`, or ask for the CPU provider"
        )
    if wanted != "cpu" and not has_gpu:
        raise MissingDependencyError(
            f"{chosen[0]} needs an NVIDIA GPU, and this machine offers none (no NVIDIA driver); "
            "ask for the CPU provider"
        )
    return [name for name in chosen if name in available]


def current_gpu() -> int:
    """The GPU that this thread has chosen, as for TensorRT engines and torch; 0 where torch uses none."""
    return int(torch.cuda.current_device()) if torch.cuda.is_available() else 0


def with_options(providers: list[str], gpu: int) -> list[Any]:
    """The providers with what they must be told: which GPU, and to CUDA not to round float32 to TensorFloat-32.

    TensorRT is told no more: without leave for FP16 and INT8 its network is strongly typed, so Q/DQ nodes decide.
    """
    cuda, own = PROVIDERS_OF["cuda"][0], {"device_id": str(gpu)}
    options = {cuda: {**own, "use_tf32": "0"}, PROVIDERS_OF["tensorrt"][0]: own}
    return [(name, options[name]) if name in options else name for name in providers]


def tell_tensor_float(provider: str) -> None:
    """Warn where float32 is rounded to TensorFloat-32: the TensorRT provider has no option, only the environment."""
    if provider == PROVIDERS_OF["tensorrt"][0] and os.environ.get(TENSOR_FLOAT) != "0":
        logger.warning(
            "the TensorRT provider rounds float32 to TensorFloat-32 on Ampere and later GPUs, which flips codes and "
            "may miss parity's limits; start the process with %s=0, or use --provider cuda or build-engine",
            TENSOR_FLOAT,
        )


def check_started(session: Any, wanted: str) -> None:
    """Check that a session runs on the provider asked for: ONNX Runtime goes on without one that fails to start.

    Raises:
        MissingDependencyError: it does not.
    """
    if wanted not in session.get_providers():
        raise MissingDependencyError(
            f"ONNX Runtime could not start {wanted}, most likely because it does not find the CUDA, cuDNN or TensorRT "
            "libraries that it was built for (its log says which); install those, or ask for the CPU provider"
        )


def open_session(path: Path, options: Any, providers: list[Any], dtype: str | None) -> Any:
    """Load and optimise one graph, whose float operators have the type `dtype`, if that is known.

    Raises:
        ArtifactError: ONNX Runtime cannot load it.
    """
    import onnxruntime

    check_name(path, "ONNX Runtime")
    try:
        return onnxruntime.InferenceSession(str(path), sess_options=options, providers=providers)
    except _runtime_errors() as error:
        message = f"'{path}': ONNX Runtime {onnxruntime.__version__} cannot load it ({_cause(error)}); "
        if dtype == "bf16":
            raise ArtifactError(
                f"{message}its float operators are in bf16, which ONNX Runtime does not run on the CPU: "
                "`--backend openvino` does, and `quest-deploy export --dtype fp32` writes graphs for both"
            ) from error
        raise ArtifactError(
            f"{message}`quest-deploy lint {path} --target onnxruntime` may say why, and "
            "`quest-deploy export --target onnxruntime` writes graphs that it takes"
        ) from error


def check_names(spec: ComponentSpec, session: Any) -> None:
    """Check that a graph takes and gives what the component's specification says.

    Raises:
        StaleArtifactError: it does not.
    """
    pairs = (
        ("inputs", spec.inputs, session.get_inputs()),
        ("outputs", spec.outputs, session.get_outputs()),
    )
    for kind, expected, got in pairs:
        wanted, found = sorted(tensor.name for tensor in expected), sorted(tensor.name for tensor in got)
        if wanted != found:
            raise StaleArtifactError(
                f"{spec.name}: the graph has {kind} {found}, expected {wanted}; "
                "export the model again with `quest-deploy export`"
            )


def _runtime_errors() -> tuple[type[Exception], ...]:
    # ONNX Runtime's exceptions have no base class of their own.
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    names = ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented")
    return (*(getattr(state, name) for name in names), state.RuntimeException, RuntimeError)


def _cause(error: Exception) -> str:
    import onnxruntime

    lines = _CODE.sub("", str(error)).strip().splitlines()
    first = lines[0].strip().rstrip(":.") if lines else type(error).__name__
    return first + age_of("onnxruntime", onnxruntime.__version__)

"""ONNX Runtime: runs an exported model as it is, on the CPU or on CUDA. The accuracy engine of the parity ladder."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest_deploy.artifacts import read_artifact
from quest_deploy.engines.adapted import AdaptedEngine
from quest_deploy.engines.base import Closing, Engine, as_arrays, cannot_run, check_inputs
from quest_deploy.engines.foreign import fitted_components
from quest_deploy.engines.libraries import gpus
from quest_deploy.errors import ArtifactError, MissingDependencyError, StaleArtifactError
from quest_deploy.model.spec import ComponentSpec, component_specs

logger = logging.getLogger(__name__)

ONNX_NAME = "model.onnx"
_ERRORS_ONLY = 3
_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")


class OrtEngine(Closing):
    """One component in one ONNX Runtime session."""

    def __init__(self, spec: ComponentSpec, session: Any) -> None:
        self.spec = spec
        self.session = session
        self.output_names = [tensor.name for tensor in spec.outputs]

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once: CPU tensors in, CPU tensors out; nothing is copied where a tensor is contiguous.

        Raises:
            EngineInputError: a name, type or shape that the component does not take.
        """
        check_inputs(self.spec, inputs)
        if self.session is None:
            raise RuntimeError(f"{self.spec.name}: the engine is closed")
        try:
            outputs = self.session.run(self.output_names, as_arrays(inputs))
        except _runtime_errors() as error:
            raise cannot_run(self.spec, "ONNX Runtime", inputs, _first_line(error)) from error
        return {name: torch.from_numpy(array) for name, array in zip(self.output_names, outputs, strict=True)}

    def close(self) -> None:
        self.session = None


def load_ort_engines(onnx_dir: Path, *, threads: int | None = None) -> dict[str, Engine]:
    """Open a session for every component of an `onnx` artifact.

    Args:
        onnx_dir: The artifact; its hashes are verified first.
        threads: Threads of one operator; None leaves the choice to ONNX Runtime.

    Raises:
        MissingDependencyError: ONNX Runtime is not installed.
        ArtifactError: not an `onnx` artifact, changed since it was written, or not a graph that can be run.
        StaleArtifactError: the graphs' inputs or outputs are not this version's.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"ONNX Runtime cannot be imported ({error}); run `pip install onnxruntime`"
        ) from error
    source = read_artifact(Path(onnx_dir), stage="onnx")
    options = onnxruntime.SessionOptions()
    # By default a product of float activations and integer weights quantizes its activations: 46 dB of 140 are left.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    options.log_severity_level = _ERRORS_ONLY
    if threads is not None:
        options.intra_op_num_threads = threads
    providers = choose_providers(onnxruntime.get_available_providers(), has_gpu=bool(gpus()))
    engines: dict[str, Engine] = {}
    fitted = fitted_components(source)
    for name, spec in component_specs(source.path).items():
        session = open_session(source.path / name / ONNX_NAME, options, providers)
        if name in fitted:
            engines[name] = AdaptedEngine(fitted[name], OrtEngine(fitted[name].graph, session))
            continue
        check_names(spec, session)
        engines[name] = OrtEngine(spec, session)
    logger.debug("opened %s with %s", source.path, ", ".join(providers))
    return engines


def choose_providers(available: list[str], *, has_gpu: bool) -> list[str]:
    """CUDA where it can run, always the CPU behind it.

    Not the TensorRT provider: it builds engines, for minutes, when a session opens; `build-engine` does that once.
    A CUDA build of ONNX Runtime offers its provider on machines without a GPU, too.
    """
    wanted = ["CUDAExecutionProvider"] if has_gpu else []
    return [name for name in wanted if name in available] + ["CPUExecutionProvider"]


def open_session(path: Path, options: Any, providers: list[str]) -> Any:
    """Load and optimise one graph.

    Raises:
        ArtifactError: ONNX Runtime cannot load it.
    """
    import onnxruntime

    try:
        return onnxruntime.InferenceSession(str(path), sess_options=options, providers=providers)
    except _runtime_errors() as error:
        raise ArtifactError(
            f"'{path}': ONNX Runtime {onnxruntime.__version__} cannot load it ({_first_line(error)}); "
            f"`quest-deploy lint {path} --target onnxruntime` may say why, and "
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


def _first_line(error: Exception) -> str:
    lines = _CODE.sub("", str(error)).strip().splitlines()
    return lines[0].strip().rstrip(":.") if lines else type(error).__name__

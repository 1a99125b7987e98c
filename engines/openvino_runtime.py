"""OpenVINO: runs the graphs exported for ONNX Runtime, on the CPU; its convolutions and products are INT8 kernels."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest_deploy.artifacts import Artifact, read_artifact, read_json
from quest_deploy.engines.adapted import AdaptedEngine
from quest_deploy.engines.base import (
    Closing,
    Engine,
    as_arrays,
    cannot_run,
    check_inputs,
)
from quest_deploy.engines.foreign import fitted_components
from quest_deploy.engines.libraries import age_of
from quest_deploy.errors import ArtifactError, ConfigError, MissingDependencyError, StaleArtifactError
from quest_deploy.files import check_name
from quest_deploy.manifest import QUANTIZATION_NAME
from quest_deploy.model.spec import ComponentSpec, component_specs

logger = logging.getLogger(__name__)

ONNX_NAME = "model.onnx"
DEVICE = "CPU"
# OpenVINO computes floats in bf16 where the CPU has it, which flips int8 codes and misses the parity gate.
PRECISION = "f32"
# It would round activations to 8 bits before products with packed weights, where the graph has them in float.
DYNAMIC_QUANTIZATION = 0
# Its own place in the source comes before the cause, which may be a failed check alone.
_PLACE, _CHECK = "Exception from ", "Check '"


# Graphs of fixed shapes are faster; each is a copy of the weights.
MAX_STATIC = 2

# Kernels that the graph for any shape keeps, the last used ones: OpenVINO's own bound, 5000, is more memory than the
# model takes where sizes keep changing.
MOST_KERNELS = 512

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


class Graph:
    """An ONNX file that is compiled for one set of input shapes after another.

    Raises:
        ArtifactError: OpenVINO does not take it.
    """

    def __init__(self, core: Any, path: Path, options: Mapping[str, Any]) -> None:
        check_name(path, "OpenVINO")
        self.core, self.options = core, options
        # Wherever the working directory, or a link to this one, leads by the time that it is read again.
        self.path = path.parent.resolve() / path.name
        self.files = _identities(self.path.parent)
        try:
            self.model: Any = core.read_model(path)
        except RuntimeError as error:
            raise ArtifactError(
                f"'{path}': OpenVINO cannot load it ({_cause(error)}); `quest-deploy lint {path} --target openvino` "
                "says more, and `quest-deploy export --target onnxruntime` writes graphs that it takes"
            ) from error

    def compile(self, shapes: Shapes | None) -> Any:
        """The graph for `shapes` alone, or (None) for any.

        Raises:
            StaleArtifactError: its files are others by now, or gone.
            RuntimeError: OpenVINO does not compile it.
        """
        # Not kept: it holds the weights as they lie on disk.
        model, self.model = self.model or self._read_again(), None
        if shapes is not None:
            model.reshape({name: list(shape) for name, shape in shapes})
        return self.core.compile_model(model, DEVICE, self.options)

    def _read_again(self) -> Any:
        try:
            model = self.core.read_model(self.path)
        except RuntimeError:
            if self._is_unchanged():
                raise
        else:
            if self._is_unchanged():
                return model
        raise StaleArtifactError(
            f"'{self.path}' was changed or deleted after it was loaded, and OpenVINO reads it again for other sizes "
            "and batches; load the directory again"
        )

    def _is_unchanged(self) -> bool:
        return self.files.items() <= _identities(self.path.parent).items()


class Requests(threading.local):
    """The calling thread's, which go when it ends: each holds the inputs and outputs of its last run."""

    def __init__(self) -> None:
        self.by_shapes: dict[Shapes | None, Any] = {}


class OpenVinoEngine(Closing):
    """One component, compiled for the input shapes that it is first called with.

    Two sets of shapes have graphs of their own, compiled at their first call; all others share one for any shape.
    Several threads may run it at the same time: each has requests of its own.
    """

    def __init__(self, spec: ComponentSpec, graph: Graph) -> None:
        self.spec = spec
        self.graph: Graph | None = graph
        self.compiled: dict[Shapes | None, Any] = {}
        self.requests = Requests()
        self._lock = threading.Lock()

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once: CPU tensors in, CPU tensors out; outputs are copies, which the next run leaves alone.

        Raises:
            EngineInputError: a name, type or shape that the component does not take.
        """
        check_inputs(self.spec, inputs)
        graph = self.graph
        if graph is None:
            raise RuntimeError(f"{self.spec.name}: the engine is closed")
        request = self._request(graph, inputs)
        try:
            request.infer(as_arrays(inputs))
        except RuntimeError as error:
            raise cannot_run(self.spec, "OpenVINO", inputs, _cause(error)) from error
        outputs = (tensor.name for tensor in self.spec.outputs)
        return {name: torch.from_numpy(request.get_tensor(name).data.copy()) for name in outputs}

    def _request(self, graph: Graph, inputs: Mapping[str, Tensor]) -> Any:
        """What runs inputs of these shapes in this thread.

        Raises:
            EngineInputError: OpenVINO compiles no graph for them.
        """
        shapes: Shapes | None = tuple((name, tuple(tensor.shape)) for name, tensor in sorted(inputs.items()))
        compiled = self.compiled.get(shapes)
        if compiled is None:
            # Compiling takes seconds, which threads with shapes that are compiled do not wait for.
            with self._lock:
                shapes, compiled = self._compile(graph, shapes, inputs)
        mine = self.requests.by_shapes
        if shapes not in mine:
            mine[shapes] = compiled.create_infer_request()
        return mine[shapes]

    def _compile(
        self, graph: Graph, shapes: Shapes | None, inputs: Mapping[str, Tensor]
    ) -> tuple[Shapes | None, Any]:
        """The graph for these shapes, or for any, and which of the two it is; one thread at a time."""
        if shapes not in self.compiled and len(self.compiled) >= MAX_STATIC:
            shapes = None
        if shapes not in self.compiled:
            try:
                self.compiled[shapes] = graph.compile(shapes)
            except RuntimeError as error:
                raise cannot_run(self.spec, "OpenVINO", inputs, _cause(error), compiling=True) from error
        return shapes, self.compiled[shapes]

    def close(self) -> None:
        self.graph = None
        self.compiled.clear()
        self.requests = Requests()


def load_openvino_engines(onnx_dir: Path, *, threads: int | None = None) -> dict[str, Engine]:
    """Read every component of an `onnx` artifact; each is compiled when it is first called.

    Args:
        onnx_dir: The artifact; its hashes are verified first.
        threads: CPU threads; None leaves the choice to OpenVINO.

    Raises:
        MissingDependencyError: OpenVINO is not installed.
        ArtifactError: not an `onnx` artifact, changed since it was written, or not a graph that can be run.
        ConfigError: OpenVINO computes something else.
        StaleArtifactError: the graphs' inputs or outputs are not this version's.
    """
    try:
        import openvino
    except ImportError as error:
        raise MissingDependencyError(
            f"OpenVINO cannot be imported ({error}); run `pip install 'quest-deploy[openvino]'`"
        ) from error
    source = read_artifact(Path(onnx_dir), stage="onnx")
    check_attention(source)
    core = openvino.Core()
    bound_kernels(core)
    options = compile_options(threads)
    engines: dict[str, Engine] = {}
    fitted = fitted_components(source)
    for name, spec in component_specs(source.path).items():
        graph = Graph(core, source.path / name / ONNX_NAME, options)
        if name in fitted:
            engines[name] = AdaptedEngine(fitted[name], OpenVinoEngine(fitted[name].graph, graph))
            continue
        check_names(spec, graph.model)
        engines[name] = OpenVinoEngine(spec, graph)
    logger.debug("read %s with OpenVINO at %s", source.path, PRECISION)
    return engines


def bound_kernels(core: Any) -> None:
    """Let `core` keep :data:`MOST_KERNELS` kernels; versions without that setting keep their own bound."""
    try:
        core.set_property(DEVICE, {"CPU_RUNTIME_CACHE_CAPACITY": MOST_KERNELS})
    except RuntimeError as error:
        logger.debug("OpenVINO keeps as many kernels as it likes: %s", _cause(error))


def compile_options(threads: int | None) -> dict[str, Any]:
    """What every graph is compiled with, so that it computes what it says, soon."""
    options: dict[str, Any] = {
        "INFERENCE_PRECISION_HINT": PRECISION,
        "PERFORMANCE_HINT": "LATENCY",
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": DYNAMIC_QUANTIZATION,
    }
    return options if threads is None else {**options, "INFERENCE_NUM_THREADS": threads}


def check_attention(source: Artifact) -> None:
    """Refuse quantized attention in bfloat16: OpenVINO 2026.4 does not compile it, or draws something else.

    Raises:
        ConfigError: the graphs have it.
    """
    config, summary = source.manifest.config, source.path / QUANTIZATION_NAME
    if config.get("dtype") != "bf16" or config.get("mode") != "int8" or not summary.is_file():
        return
    if read_json(summary).get("attention"):
        raise ConfigError(
            f"'{source.path}' has quantized attention in bf16, which OpenVINO computes wrongly; export it with "
            "--dtype fp32 or fp16, or finetune it without attention_bits"
        )


def check_names(spec: ComponentSpec, model: Any) -> None:
    """Check that a graph takes and gives what the component's specification says.

    Raises:
        StaleArtifactError: it does not.
    """
    for kind, expected, got in (
        ("inputs", spec.inputs, model.inputs),
        ("outputs", spec.outputs, model.outputs),
    ):
        wanted = {tensor.name for tensor in expected}
        # A port has every name that its value had before the graph was optimised.
        found = [port.get_names() for port in got]
        if len(found) != len(wanted) or not all(names & wanted for names in found):
            listed = sorted(min(names) if names else "?" for names in found)
            raise StaleArtifactError(
                f"{spec.name}: the graph has {kind} {listed}, expected {sorted(wanted)}; "
                "export the model again with `quest-deploy export`"
            )


def _identities(folder: Path) -> dict[str, tuple[int, ...]]:
    """What tells each file of a folder from one that takes its place; none where the folder is gone."""
    try:
        stats = {entry.name: entry.stat() for entry in os.scandir(folder)}
    except OSError:
        return {}
    return {name: (stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def _cause(error: Exception) -> str:
    import openvino

    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    causes = [line for line in lines if not line.startswith(_PLACE)]
    telling = [line for line in causes if not line.startswith(_CHECK)]
    first = (telling or causes or lines or [type(error).__name__])[0].rstrip(":.")[:300]
    return first + age_of("openvino", openvino.__version__)

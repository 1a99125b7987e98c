"""An engine built to look inside a graph: run on a few inputs, then thrown away.

What a graph returns cannot be fused away, and what it takes cannot either. So the kernels around the tensors that a
debug graph marks are not all those of the deployed engine, and its speed says nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quest_deploy.config import BuildConfig, TensorRTBackend, to_dict
from quest_deploy.engines.libraries import check_tensorrt, import_tensorrt, title_of
from quest_deploy.engines.trt_build import PLAN_NAME, build_one
from quest_deploy.engines.trt_log import make_log
from quest_deploy.engines.trt_memory import ActivationMemory
from quest_deploy.engines.trt_plan import LoadedPlan
from quest_deploy.engines.trt_runtime import TensorRTEngine, check_gpu, make_runtime
from quest_deploy.errors import StaleArtifactError
from quest_deploy.model.spec import ComponentSpec, TensorSpec

if TYPE_CHECKING:
    import onnx

ONNX_NAME = "model.onnx"


def run_graph(
    graph: onnx.ModelProto,
    weights: Path,
    calls: Sequence[Mapping[str, Tensor]],
    *,
    backend: TensorRTBackend,
) -> list[dict[str, Tensor]]:
    """Build an engine of `graph`, run it on each of `calls` and throw it away.

    Args:
        graph: Large weights may still be in files of the folder that it was read from.
        weights: That folder.
        calls: Inputs on the CPU by name, the same shapes each time.
        backend: The TensorRT flavour.

    Returns:
        The outputs on the CPU by name, one mapping for each call.

    Raises:
        MissingDependencyError: no GPU, no CUDA build of torch, or no TensorRT.
        EngineBuildError: TensorRT does not take the graph.
        StaleArtifactError: this GPU cannot load what was built.
    """
    check_gpu(weights)
    with TemporaryDirectory(prefix="quest-deploy-debug-") as place:
        folder = Path(place)
        plan = build_graph(graph, weights, calls[0], folder, backend=backend)
        with load_plan(plan, component_of(graph, calls[0]), BuildConfig(backend=backend)) as engine:
            found = [{name: value.cpu() for name, value in engine(**_on_gpu(call)).items()} for call in calls]
            torch.cuda.synchronize()
    return found


def build_graph(
    graph: onnx.ModelProto,
    weights: Path,
    inputs: Mapping[str, Tensor],
    folder: Path,
    *,
    backend: TensorRTBackend,
) -> Path:
    """Build an engine of `graph` for the shapes of `inputs` alone, in `folder`; the plan's path.

    Raises:
        MissingDependencyError: the library is absent.
        EngineBuildError: TensorRT does not take the graph.
    """
    import onnx

    check_tensorrt(backend)
    name = graph.graph.name or "graph"
    (folder / "source" / name).mkdir(parents=True)
    for tensor in graph.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                _place(weights / entry.value, folder / "source" / name / entry.value)
    for value in graph.graph.input:
        # An input that the export did not have, such as codes, comes without a shape.
        shape = onnx.helper.make_tensor_type_proto(value.type.tensor_type.elem_type, inputs[value.name].shape)
        value.type.CopyFrom(shape)
    onnx.save(graph, folder / "source" / name / ONNX_NAME)
    profile = {
        value.name: dict.fromkeys(("min", "opt", "max"), list(inputs[value.name].shape))
        for value in graph.graph.input
    }
    build_one(name, folder / "source", folder / "plans", [profile], BuildConfig(backend=backend))
    return folder / "plans" / name / PLAN_NAME


def component_of(graph: onnx.ModelProto, inputs: Mapping[str, Tensor]) -> ComponentSpec:
    """The graph's inputs and outputs; the sizes of outputs are not known before it runs."""
    return ComponentSpec(
        name=graph.graph.name or "graph",
        inputs=tuple(
            TensorSpec(name=value.name, dtype=_dtype(value), shape=tuple(inputs[value.name].shape))
            for value in graph.graph.input
        ),
        outputs=tuple(
            TensorSpec(name=value.name, dtype=_dtype(value), shape=()) for value in graph.graph.output
        ),
    )


def load_plan(plan: Path, spec: ComponentSpec, config: BuildConfig) -> TensorRTEngine:
    """A plan that was built on this machine with `config`, ready to run without CUDA graphs.

    Raises:
        StaleArtifactError: this GPU cannot load it; holds what TensorRT says.
    """
    library = import_tensorrt(config.backend)
    log, runtime = make_log(library), make_runtime(library, to_dict(config))
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise StaleArtifactError(
            f"{spec.name}: {title_of(config.backend)} {library.__version__} cannot load the engine that it has just "
            f"built ({'; '.join(log.errors) or 'it gives no reason'}); "
            "run `quest-deploy doctor` for what this GPU takes"
        )
    loaded = LoadedPlan(spec.name, library, engine, runtime)
    memory = ActivationMemory(engine.device_memory_size_v2, torch.device("cuda"))
    return TensorRTEngine(spec, loaded, memory, graphs=False)


def _on_gpu(call: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cuda() for name, value in call.items()}


def _dtype(value: onnx.ValueInfoProto) -> str:
    import onnx

    return str(onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name)


def _place(source: Path, target: Path) -> None:
    """The same file under another name, without a copy where the file system allows it."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)

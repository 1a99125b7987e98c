"""What a runtime really does with a graph, asked of the runtime itself in a process that may die of it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

ROOT = Path(__file__).resolve().parents[3]
CRASHED = "the process died"
PRODUCTS = ("Conv", "MatMul", "Gemm")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of one graph.

    Attributes:
        parses: The runtime reads it.
        works: It builds an engine (TensorRT for RTX), or loads it and runs it once.
        message: The first error.
        kernels: What the products became, where the runtime tells.
    """

    parses: bool
    works: bool
    message: str = ""
    kernels: tuple[str, ...] = ()


def attempt(runtime: str, models: Mapping[str, onnx.ModelProto]) -> tuple[str, dict[str, Outcome]]:
    """The runtime's version, and what it does with each model. A crash is an outcome, too."""
    version, outcomes, waiting = "", {}, list(models)
    with tempfile.TemporaryDirectory() as folder:
        for name, model in models.items():
            file_of(folder, name).write_bytes(model.SerializeToString())
        while waiting:
            done = subprocess.run(
                [sys.executable, "-m", "tests.export.lint.attempts", runtime, folder, *waiting],
                cwd=ROOT,
                env={**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": "1"},
                capture_output=True,
                text=True,
            )
            rows = [json.loads(line[4:]) for line in done.stdout.splitlines() if line.startswith("ROW ")]
            if not rows:
                raise RuntimeError(f"{runtime}: the process did not start: {done.stderr[-500:]}")
            for row in rows:
                name, version = row.pop("name"), row.pop("version")
                outcomes[name] = Outcome(**{**row, "kernels": tuple(row["kernels"])})
            waiting = [name for name in waiting if name not in outcomes]
    return version, outcomes


def file_of(folder: str, name: str) -> Path:
    """Where a model lies; a name may hold anything."""
    return Path(folder) / (re.sub(r"\W+", "_", name) + ".onnx")


def main(runtime: str, folder: str, names: list[str]) -> None:
    """Try each graph. A row of JSON before each risky step says what to report if the process dies of it."""
    version, read, work, cause = RUNTIMES[runtime]()
    for name in names:
        row: dict[str, Any] = {
            "name": name,
            "version": version,
            "parses": False,
            "works": False,
            "kernels": (),
        }
        send(row, CRASHED)
        message = ""
        try:
            network = read(file_of(folder, name))
            row["parses"] = True
            send(row, CRASHED)
            row["kernels"] = work(network)
            row["works"] = True
        except Exception as error:  # whatever a runtime raises is the finding
            message = cause(error)
        send(row, message)


def send(row: dict[str, Any], message: str) -> None:
    """Write one row for :func:`attempt`; libraries print to the same stream."""
    sys.stdout.write("\nROW " + json.dumps({**row, "message": message}) + "\n")
    sys.stdout.flush()


Steps = tuple[str, Callable[[Path], Any], Callable[[Any], Any], Callable[[Exception], str]]


def tensorrt_rtx() -> Steps:
    """Parse and build, as quest_deploy's own worker does."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path
    from polygraphy.logger import G_LOGGER

    from quest_deploy.engines.libraries import import_tensorrt
    from quest_deploy.engines.trt_worker import EventLog

    events = EventLog(io.StringIO())
    logging.getLogger().addHandler(events)
    G_LOGGER.use_python_logging_system = True

    def read(path: Path) -> Any:
        events.errors.clear()
        return network_from_onnx_path(str(path))

    def work(network: Any) -> tuple[str, ...]:
        engine_bytes_from_network(network[:2], CreateConfigRTX())
        return ()

    return import_tensorrt("tensorrt-rtx").__version__, read, work, lambda error: events.cause(str(error))


def onnx_runtime() -> Steps:
    """Load, run once, and read the optimised graph."""
    import onnxruntime

    def read(path: Path) -> Any:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.optimized_model_filepath = str(path.with_suffix(".optimized"))
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return path, session

    def work(loaded: Any) -> tuple[str, ...]:
        path, session = loaded
        inputs = session.get_inputs()
        if not any("bfloat16" in value.type for value in inputs):  # numpy has no such type
            session.run(None, ones(path))
        optimized = onnx.load(path.with_suffix(".optimized"))
        return tuple(node.op_type for node in optimized.graph.node if is_product(node.op_type))

    return onnxruntime.__version__, read, work, first_line


def is_product(op_type: str) -> bool:
    return any(word in op_type for word in PRODUCTS)


def openvino() -> Steps:
    """Compile, run once, and read the execution graph."""
    import openvino

    core = openvino.Core()

    def read(path: Path) -> Any:
        return path, core.read_model(path)

    def work(loaded: Any) -> tuple[str, ...]:
        path, model = loaded
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        if not any("bf16" in value.get_element_type().get_type_name() for value in model.inputs):
            compiled(ones(path))
        names = {node.name for node in onnx.load(path).graph.node if is_product(node.op_type)}
        found, inside = [], []
        for node in compiled.get_runtime_model().get_ordered_ops():
            info = {key: str(getattr(value, "value", value)) for key, value in node.get_rt_info().items()}
            if info["layerType"] in ("Convolution", "FullyConnected", "MatMul", "Deconvolution"):
                found.append(info["primitiveType"])
            elif info["layerType"] == "Subgraph":  # attention becomes one
                inside += [
                    info["primitiveType"] for name in info["originalLayersNames"].split(",") if name in names
                ]
        found = found or inside
        return tuple(found)

    return openvino.__version__.split("-")[0], read, work, first_line


def ones(path: Path) -> dict[str, Any]:
    """An input for a graph of static shapes."""
    import numpy as np

    graph = onnx.load(path).graph
    shapes = {
        value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.input
    }
    types = {
        value.name: onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        for value in graph.input
    }
    return {name: np.ones(shape, types[name]) for name, shape in shapes.items()}


def first_line(error: Exception) -> str:
    """The error in one line without its place in the source."""
    lines = [line.strip() for line in str(error).splitlines() if "Exception from" not in line]
    return next((line for line in lines if line), type(error).__name__)[:300]


RUNTIMES: dict[str, Callable[[], Steps]] = {
    "tensorrt-rtx": tensorrt_rtx,
    "onnxruntime": onnx_runtime,
    "openvino": openvino,
}

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])

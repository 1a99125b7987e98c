"""Whether each recipe builds TensorRT for RTX engines without a GPU, in what time, and how large they are."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper, numpy_helper

from benchmarks import stages
from benchmarks.environment import header
from benchmarks.merge import elsewhere
from benchmarks.settings import MODEL, Settings
from benchmarks.tables import Table, megabytes, seconds, yes
from quest_deploy.config import BuildConfig
from quest_deploy.manifest import MANIFEST_NAME
from scripts import demo

NAME = "engines"
TARGET = "tensorrt-rtx"
FULL_PRECISION = "fp32"
COMPONENTS = ("text_encoder", "unet", "vae_decoder")
CHANNELS, SIDE = 1024, 16
BATCHES = {"min": 1, "opt": 2, "max": 4}
WAYS = ("fp32", "fp16", "int8")


def run(settings: Settings) -> dict[str, Any]:
    """Export and build each recipe, and full precision to compare with."""
    sources = {FULL_PRECISION: MODEL}
    sources |= {name: stages.finetuned(settings, name)[0] for name in settings.recipes}
    built = {}
    for name, source in sources.items():
        onnx, _ = stages.export(settings, name, source, TARGET)
        engines, outcome = stages.build(settings, name, onnx)
        builds = outcome["exit_code"] == 0 and (engines / MANIFEST_NAME).is_file()
        built[name] = {**outcome, "builds": builds, "size_bytes": demo.sizes(engines) if builds else None}
    return {**header(settings), "engines": built, "one_product": {way: one_product(way) for way in WAYS}}


def one_product(way: str) -> dict[str, int]:
    """Bytes of ONNX and engine of a convolution with 9.4 million weights, which outweigh its kernels.

    Raises:
        EngineBuildError: TensorRT for RTX does not build it.
    """
    from quest_deploy.engines.trt_build import build_one

    shapes = {edge: [batch, CHANNELS, SIDE, SIDE] for edge, batch in BATCHES.items()}
    with TemporaryDirectory() as folder:
        onnx, engines = Path(folder) / way / "model.onnx", Path(folder) / "engines"
        onnx.parent.mkdir()
        size = onnx.write_bytes(convolution(way).SerializeToString())
        built = build_one(way, Path(folder), engines, [{"x": shapes}], BuildConfig(backend=TARGET))
    return {"onnx_bytes": size, "engine_bytes": int(built["size_bytes"])}


def convolution(way: str) -> ModelProto:
    """A 3x3 convolution of random weights: "fp32", "fp16", or "int8" weights and activations."""
    weight = np.random.default_rng(0).normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32)
    constants, nodes, names = {}, [], ("x", "weight")
    if way == "int8":
        scale = np.abs(weight).max(axis=(1, 2, 3)) / 127
        constants["codes"] = np.rint(weight / scale[:, None, None, None]).astype(np.int8)
        constants["scale"], constants["step"] = scale, np.float32(0.05)
        nodes = [
            helper.make_node("DequantizeLinear", ["codes", "scale"], ["weight"], axis=0),
            helper.make_node("QuantizeLinear", ["x", "step"], ["q"], output_dtype=TensorProto.INT8),
            helper.make_node("DequantizeLinear", ["q", "step"], ["x_q"]),
        ]
        names = ("x_q", "weight")
    else:
        constants["weight"] = weight.astype(np.float16 if way == "fp16" else np.float32)
    nodes.append(helper.make_node("Conv", names, ["y"], pads=[1] * 4))
    kind = TensorProto.FLOAT16 if way == "fp16" else TensorProto.FLOAT
    graph = helper.make_graph(
        nodes,
        way,
        [helper.make_tensor_value_info("x", kind, ["batch", CHANNELS, SIDE, SIDE])],
        [helper.make_tensor_value_info("y", kind, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def tables(result: dict[str, Any]) -> list[Table]:
    """One row for each recipe."""
    rows = []
    for name in (FULL_PRECISION, *result["settings"]["recipes"]):
        engine = result["engines"][name]
        sizes = engine["size_bytes"] or {}
        rows.append(
            (
                name.upper() if name != FULL_PRECISION else name,
                yes(engine["builds"]),
                seconds(engine["seconds"]),
                megabytes(engine["peak_memory_bytes"]),
                *(megabytes(sizes.get(component)) for component in COMPONENTS),
            )
        )
    return [
        Table(
            title="TensorRT for RTX engines, built without a GPU",
            columns=("model", "builds", "time", "peak memory", "text encoder", "denoiser", "VAE decoder"),
            rows=tuple(rows),
            note="Built, not run: a machine without a driver cannot load them. 4-bit weights are kept as int8, since "
            "the builder takes no int4 weights beside int8 activations. Most of engines this small is not "
            "weights."
            + elsewhere(result, {name: {"build": engine} for name, engine in result["engines"].items()}),
        ),
        Table(
            title="What weights take in an engine",
            columns=("one 3x3 convolution, 9.4 million weights", "ONNX", "engine"),
            rows=tuple(
                (way, megabytes(size["onnx_bytes"]), megabytes(size["engine_bytes"]))
                for way, size in (
                    (way, result["one_product"][way]) for way in WAYS if way in result["one_product"]
                )
            ),
        ),
    ]

"""ONNX that another tool quantized is linted, built and drawn with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
from PIL import Image

from quest_deploy.artifacts import Artifact, read_artifact
from quest_deploy.config import BuildConfig, GenerateConfig, ShapeRange
from quest_deploy.engines.trt_build import build_engine
from quest_deploy.errors import ArtifactError
from quest_deploy.export.lint import lint
from quest_deploy.pipeline import generate

PRODUCTS = ("Conv", "MatMul", "Gemm")
CONFIG = GenerateConfig(prompts=("rocket",), steps=2, guidance_scale=3.0, seed=1)


class Samples(CalibrationDataReader):
    """Inputs of the tiny U-Net, from which ranges are taken."""

    def __init__(self) -> None:
        numbers = np.random.default_rng(0)
        self.batches: Iterator[dict[str, np.ndarray]] = iter(
            [
                {
                    "sample": numbers.standard_normal((2, 4, 8, 8), dtype=np.float32),
                    "timestep": np.array(timestep, np.int64),
                    "encoder_hidden_states": numbers.standard_normal((2, 24, 16), dtype=np.float32),
                }
                for timestep in (1, 500, 999)
            ]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.batches, None)


def declare_otherwise(path: Path, name: str, kind: int, shape: list[Any]) -> None:
    """Change an input's type, and its rank from one to none: what other exporters declare."""
    model = onnx.load(path)
    graph = model.graph
    (value,) = (value for value in graph.input if value.name == name)
    wanted, rank = value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim)
    for node in graph.node:
        for index, read in enumerate(node.input):
            if read == name:
                node.input[index] = f"{name}.inside"
    target = f"{name}.cast" if rank > len(shape) else f"{name}.inside"
    adapted = [helper.make_node("Cast", [name], [target], to=wanted)]
    if rank > len(shape):
        graph.initializer.append(helper.make_tensor(f"{name}.axis", TensorProto.INT64, [1], [0]))
        adapted.append(helper.make_node("Unsqueeze", [target, f"{name}.axis"], [f"{name}.inside"]))
    nodes = [*adapted, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    value.CopyFrom(helper.make_tensor_value_info(name, kind, shape))
    onnx.save(model, path)


@pytest.fixture(scope="module")
def float_onnx(tmp_path_factory: pytest.TempPathFactory, tiny_onnx: Path) -> Path:
    """The tiny model as optimum-onnx would have it: no manifest, a scalar integer timestep, ids of 32 bits."""
    path = shutil.copytree(tiny_onnx, tmp_path_factory.mktemp("foreign") / "float")
    (path / "manifest.json").unlink()
    index = json.loads((path / "model_index.json").read_text())
    (path / "model_index.json").write_text(json.dumps(index | {"_class_name": "ORTStableDiffusionPipeline"}))
    declare_otherwise(path / "unet" / "model.onnx", "timestep", TensorProto.INT64, [])
    text = onnx.load(path / "text_encoder" / "model.onnx").graph.input[0].type.tensor_type
    shape = [size.dim_value or size.dim_param for size in text.shape.dim]
    declare_otherwise(path / "text_encoder" / "model.onnx", "input_ids", TensorProto.INT32, shape)
    return path


@pytest.fixture(scope="module")
def quantized_onnx(tmp_path_factory: pytest.TempPathFactory, float_onnx: Path) -> Path:
    """The same with a U-Net that ONNX Runtime's own quantizer made symmetric W8A8, per channel."""
    path = shutil.copytree(float_onnx, tmp_path_factory.mktemp("foreign") / "int8")
    quantize_static(
        float_onnx / "unet" / "model.onnx",
        path / "unet" / "model.onnx",
        Samples(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(PRODUCTS),
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            # ONNX Runtime fails to load int8 values that are moved behind DequantizeLinear (lint: moved-activation).
            "OpTypesToExcludeOutputQuantization": list(PRODUCTS),
        },
    )
    return path


def pixels(images: Artifact) -> np.ndarray:
    with Image.open(images.path / "image-00000.png") as image:
        return np.asarray(image, dtype=int)


def test_a_directory_without_a_manifest_is_onnx_with_a_digest_of_its_files(
    float_onnx: Path, quantized_onnx: Path
) -> None:
    first, second = (read_artifact(path, stage="onnx") for path in (float_onnx, quantized_onnx))
    assert first.manifest.details == {"foreign": True}
    assert first.digest != second.digest
    assert first.manifest.files.keys() == second.manifest.files.keys()


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_draws_what_quest_deploys_own_export_draws(
    tiny_onnx: Path, float_onnx: Path, tmp_path: Path, backend: str
) -> None:
    pytest.importorskip(backend)
    ours = generate(tiny_onnx, tmp_path / "ours", CONFIG, backend=backend)
    theirs = generate(float_onnx, tmp_path / "theirs", CONFIG, backend=backend)
    # The timestep of 32 bits is cast in the graph, which changes no number.
    assert np.array_equal(pixels(ours), pixels(theirs))
    assert theirs.manifest.details["source_stage"] == "onnx"


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_quantized_one_draws(float_onnx: Path, quantized_onnx: Path, tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    full = pixels(generate(float_onnx, tmp_path / "full", CONFIG, backend=backend))
    quantized = pixels(generate(quantized_onnx, tmp_path / "quantized", CONFIG, backend=backend))
    difference = np.abs(full - quantized).mean()
    # Eight bits change something, and leave the picture.
    assert 0 < difference < 0.1 * 255


def test_lint_finds_its_integer_products(quantized_onnx: Path) -> None:
    report = lint(quantized_onnx, "tensorrt-rtx")
    assert not report.breaks
    unet = [layer for layer in report.layers if layer.component == "unet"]
    assert sum(layer.execution == "int8" for layer in unet) > len(unet) / 2


def test_engines_are_built_from_it(quantized_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    config = BuildConfig(backend="tensorrt-rtx", batch=ShapeRange(min=1, opt=1, max=1))
    engines = build_engine(quantized_onnx, tmp_path / "engines", config)
    details = engines.manifest.details
    assert details["precision"] == "as in the graph, which another tool wrote"
    timestep = details["interfaces"]["unet"]["graph"]["inputs"][1]
    assert (timestep["dtype"], timestep["shape"]) == ("int64", [])
    assert (engines.path / "unet" / "model.plan").stat().st_size > 10_000
    assert (engines.path / "tokenizer" / "tokenizer.json").is_file()


def test_an_input_that_is_not_understood_is_named(float_onnx: Path, tmp_path: Path) -> None:
    path = shutil.copytree(float_onnx, tmp_path / "onnx")
    model = onnx.load(path / "unet" / "model.onnx")
    model.graph.input.append(helper.make_tensor_value_info("control", TensorProto.FLOAT16, ["batch", 3]))
    onnx.save(model, path / "unet" / "model.onnx")
    with pytest.raises(
        ArtifactError, match=r"unet: the graph takes 'control' \(float16 \['batch', 3\]\), which"
    ):
        generate(path, tmp_path / "images", CONFIG)


def test_a_directory_that_lacks_a_graph_is_refused(float_onnx: Path, tmp_path: Path) -> None:
    path = shutil.copytree(float_onnx, tmp_path / "onnx")
    (path / "vae_decoder" / "model.onnx").unlink()
    with pytest.raises(
        ArtifactError, match=r"vae_decoder/model\.onnx': .*needs the graphs of all components"
    ):
        generate(path, tmp_path / "images", CONFIG)

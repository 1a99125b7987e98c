"""What inspect says about models and artifacts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper

from quest_deploy.artifacts import write_artifact
from quest_deploy.commands import main

COMPONENTS = ("text_encoder", "unet", "vae_decoder")


def inspect(path: Path, *arguments: str) -> dict:
    done = CliRunner().invoke(main, ["inspect", str(path), "--json", *arguments])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def tiny_graph() -> onnx.ModelProto:
    """y = DequantizeLinear(int8 [2, 3]) + x."""
    nodes = [
        helper.make_node("DequantizeLinear", ["codes", "scale"], ["w"]),
        helper.make_node("Add", ["x", "w"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2, 3]) for name in "xy"]
    weights = [
        helper.make_tensor("codes", TensorProto.INT8, [2, 3], [1] * 6),
        helper.make_tensor("scale", TensorProto.FLOAT, [], [0.5]),
    ]
    graph = helper.make_graph(nodes, "tiny", value[:1], value[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])


@pytest.fixture
def small_onnx(tmp_path: Path, reference_model: Path) -> Path:
    """An ONNX artifact in the usual layout, with the same tiny graph for each component."""
    with write_artifact(tmp_path / "onnx", stage="onnx", config={"target": "onnxruntime"}) as writer:
        shutil.copy(reference_model / "model_index.json", writer.path)
        for name in COMPONENTS:
            (writer.path / name).mkdir()
            source = reference_model / name.removesuffix("_decoder") / "config.json"
            shutil.copy(source, writer.path / name)
            onnx.save(tiny_graph(), writer.path / name / "model.onnx")
    return tmp_path / "onnx"


def test_model_has_components_with_shapes(reference_model: Path) -> None:
    found = inspect(reference_model)
    assert (found["stage"], sorted(found["components"])) == ("model", sorted(COMPONENTS))
    sample = found["components"]["unet"]["inputs"][0]
    assert sample == {"name": "sample", "dtype": "float32", "shape": ["batch", 4, "height", "width"]}


def test_sizes_add_up(reference_model: Path) -> None:
    found = inspect(reference_model)
    sizes = [file.stat().st_size for file in reference_model.rglob("*") if file.is_file()]
    assert (found["files"], found["size_bytes"]) == (len(sizes), sum(sizes))
    unet = sum(file.stat().st_size for file in (reference_model / "unet").iterdir())
    assert found["components"]["unet"]["size_bytes"] == unet


def test_graph_is_counted(small_onnx: Path) -> None:
    graph = inspect(small_onnx)["components"]["unet"]["graph"]
    assert graph["operators"] == {"DequantizeLinear": 1, "Add": 1}
    assert graph["initializer_elements"] == {"int8": 6, "float": 1}
    assert graph["opset"] == {"ai.onnx": 21}


def test_each_half_of_an_exported_autoencoder_has_its_own_size(small_onnx: Path) -> None:
    index = small_onnx / "model_index.json"
    index.write_text(
        json.dumps(json.loads(index.read_text()) | {"_class_name": "StableDiffusionInpaintPipeline"})
    )
    shutil.copytree(small_onnx / "vae_decoder", small_onnx / "vae_encoder")
    (small_onnx / "vae_encoder" / "model.onnx_data").write_bytes(b"\0" * 1000)
    (small_onnx / "manifest.json").unlink()
    found = inspect(small_onnx)["components"]
    sizes = {name: component["size_bytes"] for name, component in found.items()}
    assert sizes["vae_encoder"] == sizes["vae_decoder"] + 1000


def test_a_graph_of_another_tool_has_its_own_types(small_onnx: Path) -> None:
    (small_onnx / "manifest.json").unlink()
    (sample,) = inspect(small_onnx)["components"]["unet"]["inputs"]
    assert sample == {"name": "x", "dtype": "float32", "shape": [2, 3]}


def test_text_names_every_component(small_onnx: Path) -> None:
    done = CliRunner().invoke(main, ["inspect", str(small_onnx)])
    for text in (*COMPONENTS, "out_sample float32[batch, 4, height, width]", "1 DequantizeLinear"):
        assert text in done.stdout


def test_time_tables_are_counted(table_checkpoint: Path, tiny_checkpoint: Path) -> None:
    shapes = inspect(table_checkpoint)["quantization"]["time_tables"]
    assert shapes and all(name.endswith("time_emb_proj") and shape[0] == 2 for name, shape in shapes.items())
    done = CliRunner().invoke(main, ["inspect", str(table_checkpoint)])
    assert f"time tables   {len(shapes)} layers" in done.stdout and "values at 2 knots" in done.stdout
    assert not inspect(tiny_checkpoint)["quantization"]["time_tables"]


def test_quantized_layers_are_counted_by_bits(tiny_checkpoint: Path) -> None:
    """W4A8, but for the first and last convolution, which stay at 8 bits."""
    found = inspect(tiny_checkpoint)["quantization"]
    assert (found["recipe"], found["timestep_groups"]) == ("tiny", 2)
    assert found["layers_by_bits"] == {"W4A8": len(found["layers"]) - 2, "W8A8": 2}
    assert found["layers"]["conv_in"]["weight_bits"] == 8


def test_single_safetensors_file_is_a_model(tmp_path: Path, reference_model: Path) -> None:
    file = tmp_path / "model.safetensors"
    shutil.copy(reference_model / "unet" / "diffusion_pytorch_model.safetensors", file)
    assert inspect(file)["size_bytes"] == file.stat().st_size
    assert inspect(file)["tensors"] > 100


@pytest.mark.parametrize("content", [b"", b"\xff" * 1000, b"\x08\0\0\0\0\0\0\0notjson!"])
def test_a_file_that_is_no_safetensors_is_an_error(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(content)
    done = CliRunner().invoke(main, ["inspect", str(file)])
    assert done.exit_code == 1
    assert "is corrupt or no safetensors file" in done.stderr


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "unet" / "model.onnx").unlink(), "unet/model.onnx is missing"),
        (lambda d: (d / "manifest.json").write_text("{"), "not valid JSON"),
        (shutil.rmtree, "does not exist"),
    ],
    ids=["missing file", "corrupt manifest", "missing directory"],
)
def test_damage_is_an_error(small_onnx: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(small_onnx)
    done = CliRunner().invoke(main, ["inspect", str(small_onnx)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert message in done.stderr


def test_file_that_is_not_onnx_is_an_error(tmp_path: Path, small_onnx: Path) -> None:
    """Its hash is right: the artifact was made with it."""
    with write_artifact(tmp_path / "bad", stage="onnx", config={}) as writer:
        shutil.copytree(small_onnx, writer.path, dirs_exist_ok=True)
        (writer.path / "manifest.json").unlink()
        (writer.path / "unet" / "model.onnx").write_bytes(b"\xff" * 64)
    done = CliRunner().invoke(main, ["inspect", str(tmp_path / "bad")])
    assert done.exit_code == 1
    assert "unet/model.onnx' is not an ONNX file" in done.stderr

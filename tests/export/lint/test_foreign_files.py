"""What other tools write: functions, fused operators, sizes left open, links, configurations of their own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from quest_deploy.export.lint import lint
from quest_deploy.export.lint.read import default_dimensions, size_of
from tests.export.lint.attempts import attempt
from tests.export.lint.conftest import Lint
from tests.export.lint.net import FLOAT, UINT8, Net
from tests.export.lint.pattern_products import K, N
from tests.export.lint.patterns import PATTERNS
from tests.export.lint.test_run import write


def in_a_function(opset: int) -> onnx.ModelProto:
    """A quantized product inside a function that the file defines itself."""
    model = PATTERNS["matmul_w8a8"]()
    nodes, initializers = list(model.graph.node), [tensor.name for tensor in model.graph.initializer]
    function = helper.make_function(
        "own", "Linear", ["x", *initializers], [nodes[-1].output[0]], nodes, [helper.make_opsetid("", opset)]
    )
    del model.graph.node[:]
    output = model.graph.output[0].name
    model.graph.node.append(helper.make_node("Linear", ["x", *initializers], [output], domain="own"))
    model.functions.append(function)
    model.opset_import.append(helper.make_opsetid("own", 1))
    return model


def test_products_of_functions_are_seen(lint_model: Lint) -> None:
    report = lint_model(in_a_function(21), "tensorrt-rtx")
    assert [(layer.execution, layer.macs) for layer in report.layers] == [("int8", 6 * K * N)]
    assert report


def test_a_function_that_cannot_be_written_out_is_told(lint_model: Lint) -> None:
    report = lint_model(in_a_function(20), "tensorrt-rtx")
    assert not report.layers
    assert [(finding.rule, finding.severity) for finding in report.findings] == [("own-function", "warning")]


@pytest.mark.parametrize("target", ["tensorrt-rtx", "onnxruntime", "openvino"])
def test_functions_are_taken_by_all_but_openvino(target: str, lint_model: Lint) -> None:
    pytest.importorskip(target.replace("-", "_"))
    models = {str(opset): in_a_function(opset) for opset in (20, 21)}
    _, outcomes = attempt(target, models)
    for name, model in models.items():
        assert lint_model(model, target).breaks == (target == "openvino") == (not outcomes[name].works)


@pytest.mark.parametrize("size", [-1, 0])
def test_a_size_left_open_as_minus_one_counts_as_one(size: int, lint_model: Lint) -> None:
    net = Net()
    net.input((size, 6, K))
    model = net.finish(net.op("MatMul", "x", net.floats((K, N))))
    (layer,) = lint_model(model, "onnxruntime").layers
    assert layer.macs == (6 * K * N if size else 0)


def test_no_file_hides_another_of_its_name(tmp_path: Path) -> None:
    for name in ("unet/model.onnx", "unet.onnx", "model.onnx", f"{tmp_path.name}.onnx"):
        write(tmp_path / name, PATTERNS["conv_w8a8"]())
    names = {layer.component for layer in lint(tmp_path).layers}
    assert names == {"unet", "unet.onnx", tmp_path.name, f"{tmp_path.name}.onnx"}


@pytest.mark.parametrize(
    ("component", "config"),
    [
        ("unet", {"sample_size": [8, 8, 8]}),
        ("unet", {"sample_size": 1.5}),
        ("unet", {"sample_size": 0}),
        ("text_encoder", {"max_position_embeddings": None}),
        ("vae_decoder", {"block_out_channels": 128}),
    ],
)
def test_a_configuration_that_says_it_otherwise_leaves_a_size_out(
    component: str, config: dict[str, object], tmp_path: Path
) -> None:
    for name in ("unet", "vae_decoder", "text_encoder"):
        (tmp_path / name).mkdir()
        own = config if name == component else {"sample_size": 8} if name == "unet" else {}
        (tmp_path / name / "config.json").write_text(json.dumps(own))
    sizes = {"batch": 1, "steps": 1}
    assert default_dimensions(tmp_path) == sizes | ({} if component == "unet" else {"height": 8, "width": 8})


def test_a_symbol_that_is_made_of_another_has_its_size() -> None:
    sizes = {"height": 8, "sequence": 77}
    names = (
        "height",
        "height_times_8",
        "height_over_2",
        "height_latent",
        "sequence_length",
        "a_over_b",
        "width",
    )
    assert [size_of(name, sizes) for name in names] == [8, 64, 4, 8, 77, 1, 1]


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx", "openvino"])
def test_weights_behind_a_link_are_there_for_runtimes_that_follow_it(target: str, tmp_path: Path) -> None:
    """As in the hub's cache. OpenVINO takes no link that leads out of the directory."""
    model = PATTERNS["conv_float"]()
    weight = model.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(np.zeros((16, 8, 3, 3), np.float32), weight.name))
    onnx.external_data_helper.set_external_data(weight, "model.onnx_data", offset=0, length=16 * 8 * 9 * 4)
    weight.ClearField("raw_data")
    path = write(tmp_path / "snapshot" / "model.onnx", model)
    (tmp_path / "blob").write_bytes(b"\0" * 4608)
    (tmp_path / "snapshot" / "model.onnx_data").symlink_to("../blob")
    assert lint(path, target).breaks == (target == "openvino")


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_zero_points_behind_a_link_are_looked_at(link: str, tmp_path: Path) -> None:
    path = tmp_path / "snapshot" / "model.onnx"
    path.parent.mkdir()
    model = PATTERNS["conv_w8a8_zero_point"]()
    for tensor in model.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=0)
    data = (path.parent / "data").rename(tmp_path / "blob")
    place = path.parent / "data"
    place.symlink_to(data) if link == "symbolic" else place.hardlink_to(data)
    assert "nonzero-zero-point" in {finding.rule for finding in lint(path, "tensorrt-rtx").findings}


def of_microsoft(
    op_type: str, *shapes: tuple[int, ...], shape: tuple[int, ...] = (1, 6, K), **attributes: object
) -> onnx.ModelProto:
    net = Net()
    y = net.op(op_type, net.input(shape), *map(net.floats, shapes), domain="com.microsoft", **attributes)
    model = net.finish(net.op("MatMul", y, net.floats((K, N))) if shape[-1] == K else net.op("Identity", y))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def bits() -> onnx.ModelProto:
    net = Net()
    codes = net.op("Cast", net.input((4, 4)), to=UINT8)
    return net.finish(net.op("Cast", net.op("BitwiseNot", codes), to=FLOAT))


def unsigned_by_attribute() -> onnx.ModelProto:
    net = Net()
    x, scale = net.input((1, 6, K)), net.scale()
    x = net.op("DequantizeLinear", net.op("QuantizeLinear", x, scale, output_dtype=UINT8), scale)
    return net.finish(net.op("MatMul", x, net.weight((K, N), axis=1)))


UNKNOWN = {
    "FusedMatMul": of_microsoft("FusedMatMul", (K, K)),
    "SkipLayerNormalization": of_microsoft("SkipLayerNormalization", (1, 6, K), (K,), (K,)),
    "QuickGelu": of_microsoft("QuickGelu"),
    "BiasGelu": of_microsoft("BiasGelu", (K,)),
    "Attention": of_microsoft("Attention", (K, 3 * K), (3 * K,), num_heads=2),
    "BitwiseNot": bits(),
    "unsigned": unsigned_by_attribute(),
}
KNOWN = {
    "Gelu": of_microsoft("Gelu"),
    "SkipSimplifiedLayerNormalization": of_microsoft("SkipSimplifiedLayerNormalization", (1, 6, K), (K,)),
}


def test_what_tensorrt_has_no_parser_for_breaks(lint_model: Lint) -> None:
    pytest.importorskip("tensorrt_rtx")
    _, outcomes = attempt("tensorrt-rtx", UNKNOWN | KNOWN)
    for name, model in (UNKNOWN | KNOWN).items():
        report = lint_model(model, "tensorrt-rtx")
        assert report.breaks == (name in UNKNOWN) == (not outcomes[name].works), name
        assert not lint_model(model, "onnxruntime").breaks


IMAGE = (1, 8, 8, 320)
FOR_CUDA = {
    "NhwcConv": of_microsoft("NhwcConv", (8, 3, 3, 320), shape=IMAGE),
    "GroupNorm": of_microsoft("GroupNorm", (320,), (320,), shape=IMAGE, groups=32, activation=1),
    "SkipGroupNorm": of_microsoft(
        "SkipGroupNorm", (320,), (320,), IMAGE, shape=IMAGE, groups=32, activation=1
    ),
    "BiasSplitGelu": of_microsoft("BiasSplitGelu", (2560,), shape=(1, 6, 2560)),
    "BiasAdd": of_microsoft("BiasAdd", (320,), (1, 6, 320), shape=(1, 6, 320)),
}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_what_onnx_runtime_writes_for_cuda_breaks_elsewhere(target: str, lint_model: Lint) -> None:
    pytest.importorskip(target)
    _, outcomes = attempt(target, FOR_CUDA)
    for name, model in FOR_CUDA.items():
        assert lint_model(model, target).breaks == (not outcomes[name].works), name
    assert not outcomes["NhwcConv"].works


def test_products_that_onnx_runtime_has_fused_are_listed(lint_model: Lint) -> None:
    fused, plain = lint_model(UNKNOWN["FusedMatMul"], "onnxruntime").layers
    assert (fused.op_type, fused.execution, fused.reasons) == (
        "FusedMatMul",
        "float",
        ("FusedMatMul is not looked into",),
    )
    assert plain.op_type == "MatMul"
    dynamic = of_microsoft("DynamicQuantizeMatMul", (K, K), (1,))
    assert [layer.execution for layer in lint_model(dynamic, "onnxruntime").layers] == ["int8", "float"]
    assert lint_model(dynamic, "tensorrt-rtx").breaks

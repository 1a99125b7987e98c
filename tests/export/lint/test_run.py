"""Files of any origin in, one report out."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from quest_deploy.artifacts import write_artifact
from quest_deploy.errors import ArtifactError, ConfigError
from quest_deploy.export.lint import lint
from quest_deploy.export.lint.read import resolve_shapes
from tests.export.lint.conftest import Lint
from tests.export.lint.net import Net
from tests.export.lint.pattern_products import K, N
from tests.export.lint.patterns import PATTERNS


def write(path: Path, model: onnx.ModelProto) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())
    return path


@pytest.mark.parametrize("content", [b"", b"not onnx", b"\x00" * 100])
def test_what_is_no_onnx_file_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"model\.onnx' is corrupt or no ONNX file"):
        lint(path)


def is_good(path: Path) -> bool:
    """Whether lint takes a file and finds no error in it."""
    try:
        return bool(lint(path))
    except ArtifactError:
        return False


def test_a_truncated_file_is_never_found_to_be_good(tmp_path: Path) -> None:
    path = write(tmp_path / "model.onnx", PATTERNS["conv_w8a8"]())
    content = path.read_bytes()
    assert is_good(path)
    for share in (0.05, 0.3, 0.6, 0.95):
        path.write_bytes(content[: int(len(content) * share)])
        assert not is_good(path), share


def test_an_empty_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no \.onnx file"):
        lint(tmp_path)


def test_a_missing_path_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="does not exist"):
        lint(tmp_path / "nothing")


def test_an_unknown_target_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of onnxruntime, tensorrt, tensorrt-rtx, openvino"):
        lint(tmp_path, "coreml")


def test_components_are_named_after_their_directories(tmp_path: Path) -> None:
    write(tmp_path / "unet" / "model.onnx", PATTERNS["conv_w8a8"]())
    write(tmp_path / "vae_decoder" / "model.onnx", PATTERNS["conv_float"]())
    assert [(layer.component, layer.execution) for layer in lint(tmp_path).layers] == [
        ("unet", "int8"),
        ("vae_decoder", "float"),
    ]


@pytest.mark.parametrize(
    ("pattern", "execution", "macs"),
    [
        ("conv_w8a8", "int8", 16 * 8 * 8 * 8 * 9),
        ("conv_depthwise", "int8", 8 * 6 * 6 * 9),
        ("conv_transpose", "int8", 8 * 8 * 8 * 16 * 9),
        ("matmul_w8a8", "int8", 6 * K * N),
        ("gemm_w8a8", "int8", 6 * K * N),
        ("matmul_w4_block64", "int4 storage", 6 * K * N),
        ("matmul_w4_block64_a8", "breaks", 6 * K * N),
        ("conv_w8_only", "float", 16 * 8 * 8 * 8 * 9),
    ],
)
def test_execution_and_multiply_accumulates(
    pattern: str, execution: str, macs: int, lint_model: Lint
) -> None:
    (layer,) = lint_model(PATTERNS[pattern](), "tensorrt-rtx").layers
    assert (layer.execution, layer.macs) == (execution, macs)


def test_shares_are_of_layers_and_of_multiply_accumulates(lint_model: Lint) -> None:
    net = Net()
    x = net.input((1, 6, K))
    small = net.op("MatMul", net.quantize(x), net.weight((K, N), axis=1))
    report = lint_model(net.finish(net.op("MatMul", small, net.floats((N, 3 * K)))), "tensorrt-rtx")
    assert report.summary()["share_of_layers"]["int8"] == pytest.approx(1 / 2)
    assert report.summary()["share_of_macs"]["int8"] == pytest.approx(1 / 4)


def test_symbolic_dimensions_are_the_models_own_size(tmp_path: Path) -> None:
    net = Net()
    net.input(("batch", 8, "height", "width"))
    model = net.finish(net.op("Conv", "x", net.weight((16, 8, 1, 1))))
    write(tmp_path / "unet" / "model.onnx", model)
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"sample_size": 4}))
    report = lint(tmp_path)
    assert report.dimensions == {"batch": 1, "height": 4, "width": 4}
    assert report.layers[0].macs == 16 * 16 * 8
    assert lint(tmp_path, dimensions={"batch": 2, "width": 8}).layers[0].macs == 4 * 16 * 16 * 8
    with pytest.raises(ConfigError, match="got widht, expected some of batch, height, width"):
        lint(tmp_path, dimensions={"batch": 2, "widht": 8})


def test_a_dimension_may_have_the_name_that_quest_deploy_gives_it(tmp_path: Path) -> None:
    net = Net()
    net.input(("batch_size", 8, 4, 4))
    write(tmp_path / "unet" / "model.onnx", net.finish(net.op("Conv", "x", net.weight((16, 8, 1, 1)))))
    assert lint(tmp_path, dimensions={"batch": 2}).dimensions == {"batch_size": 2}


def exported(root: Path) -> Path:
    """An artifact of one component, whose sizes only its configuration tells."""
    net = Net()
    net.input(("batch", 8, "height", "width"))
    with write_artifact(root / "onnx", stage="onnx", config={}) as writer:
        write(writer.path / "unet" / "model.onnx", net.finish(net.op("Conv", "x", net.weight((16, 8, 1, 1)))))
        (writer.path / "unet" / "config.json").write_text(json.dumps({"sample_size": 4}))
        (writer.path / "model_index.json").write_text("{}")
    return root / "onnx"


@pytest.mark.parametrize("path", ["model.onnx", ".", "..", "../unet", "../unet/model.onnx"])
def test_the_same_file_counts_alike_however_it_is_named(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = lint(exported(tmp_path)).to_json()
    monkeypatch.chdir(tmp_path / "onnx" / "unet")
    assert {**lint(Path(path)).to_json(), "path": expected["path"]} == expected


@pytest.mark.parametrize("inner", ["", "unet", "unet/model.onnx"])
def test_a_changed_artifact_is_refused(inner: str, tmp_path: Path) -> None:
    root = exported(tmp_path)
    file = root / "unet" / "model.onnx"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"not what its manifest says.*unet/model\.onnx"):
        lint(root / inner)


def test_a_manifest_above_a_file_of_another_origin_is_not_its_own(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    assert lint(write(tmp_path / "models" / "model.onnx", PATTERNS["conv_w8a8"]()))


def test_shapes_are_found_behind_group_normalization_and_computed_reshapes() -> None:
    net = Net()
    x = net.input(("batch", 4, "height", "width"))
    x = net.op("GroupNormalization", x, net.floats((4,)), net.floats((4,)), num_groups=2)
    sizes = [net.op("Squeeze", net.op("Shape", x, start=axis, end=axis + 1)) for axis in (2, 3)]
    minus_one = net.constant([-1], TensorProto.INT64)
    count = net.op("Reshape", net.op("Mul", *sizes), minus_one)
    shape = net.op("Concat", net.constant([1, 4], TensorProto.INT64), count, axis=0)
    proto, _ = resolve_shapes(net.finish(net.op("Reshape", x, shape)), {"height": 3, "width": 5})
    assert [dim.dim_value for dim in proto.graph.output[0].type.tensor_type.shape.dim] == [1, 4, 15]
    assert [node.op_type for node in proto.graph.node].count("GroupNormalization") == 1
    assert [node.op_type for node in proto.graph.node].count("Reshape") == 2


def test_shapes_are_found_behind_the_attention_of_onnxruntime(lint_model: Lint) -> None:
    attention, behind = lint_model(PATTERNS["attention_operator_of_onnxruntime"](), "onnxruntime").layers
    assert (attention.execution, attention.macs) == ("float", 2 * 16 * 16 * K)
    assert (behind.execution, behind.macs) == ("int8", 16 * K * N)


def test_missing_external_data_is_found(tmp_path: Path) -> None:
    model = PATTERNS["conv_float"]()
    weight = model.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(np.zeros((16, 8, 3, 3), np.float32), weight.name))
    onnx.external_data_helper.set_external_data(weight, "model.onnx.data", offset=0, length=16 * 8 * 9 * 4)
    weight.ClearField("raw_data")
    path = write(tmp_path / "model.onnx", model)
    rules = {finding.rule: finding for finding in lint(path).findings}
    assert "does not exist" in rules["external-data-missing"].message
    (tmp_path / "model.onnx.data").write_bytes(b"\0" * 100)
    rules = {finding.rule: finding for finding in lint(path).findings}
    assert "has 100 bytes where 4608 are needed" in rules["external-data-missing"].message
    (tmp_path / "model.onnx.data").write_bytes(b"\0" * 4608)
    assert "external-data-missing" not in {finding.rule for finding in lint(path).findings}


def test_external_data_outside_the_directory_is_found(tmp_path: Path) -> None:
    model = PATTERNS["conv_float"]()
    weight = model.graph.initializer[0]
    weight.CopyFrom(onnx.numpy_helper.from_array(np.zeros((16, 8, 3, 3), np.float32), weight.name))
    onnx.external_data_helper.set_external_data(weight, "../weights", offset=0, length=4)
    weight.ClearField("raw_data")
    (tmp_path / "weights").write_bytes(b"\0" * 9999)
    findings = lint(write(tmp_path / "inner" / "model.onnx", model)).findings
    assert any("not inside the model's directory" in finding.message for finding in findings)


def test_a_dangling_input_is_found(lint_model: Lint) -> None:
    model = PATTERNS["conv_w8a8"]()
    model.graph.node[-1].input[0] = "nowhere"
    found = [
        finding for finding in lint_model(model, "onnxruntime").findings if finding.rule == "dangling-input"
    ]
    assert len(found) == 1
    assert found[0].breaks


def test_no_dangling_input_in_a_branch_that_reads_outer_values(lint_model: Lint) -> None:
    report = lint_model(PATTERNS["product_in_a_branch"](), "onnxruntime")
    assert "dangling-input" not in {finding.rule for finding in report.findings}
    assert [layer.operands for layer in report.layers] == [("int8", "int8")]


def test_nothing_quantized_is_an_error(lint_model: Lint) -> None:
    report = lint_model(PATTERNS["conv_float"](), "onnxruntime")
    assert [(finding.rule, finding.severity) for finding in report.findings] == [
        ("nothing-quantized", "error")
    ]
    assert not report.breaks


def test_nothing_quantized_is_a_hint_where_it_was_asked_for(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "onnx", stage="onnx", config={"mode": "none"}) as writer:
        write(writer.path / "unet" / "model.onnx", PATTERNS["conv_float"]())
    report = lint(tmp_path / "onnx")
    assert [(finding.rule, finding.severity) for finding in report.findings] == [
        ("nothing-quantized", "info")
    ]
    assert report


def test_something_quantized_is_enough(lint_model: Lint) -> None:
    assert "nothing-quantized" not in {
        finding.rule for finding in lint_model(PATTERNS["conv_w8_only"](), "onnxruntime").findings
    }


def test_nodes_without_names_are_told_apart(lint_model: Lint) -> None:
    net = Net()
    x = net.input((1, 6, K))
    y = net.op("Add", net.op("MatMul", x, net.floats((K, N))), net.op("MatMul", x, net.floats((K, N))))
    model = net.finish(y)
    for node in model.graph.node:
        node.name = ""
    names = [layer.name for layer in lint_model(model, "tensorrt-rtx").layers]
    assert len(set(names)) == 2
    assert all(names)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_quest_deploy_exports_for_a_target_passes_it(tiny_checkpoint: Path, tmp_path: Path) -> None:
    from quest_deploy.config import ExportConfig
    from quest_deploy.export.to_onnx import export

    for target in ("tensorrt-rtx", "onnxruntime"):
        export(tiny_checkpoint, tmp_path / target, ExportConfig(target=target))
        assert lint(tmp_path / target, target)
    unet = [layer for layer in lint(tmp_path / "tensorrt-rtx").layers if layer.component == "unet"]
    assert {layer.execution for layer in unet if "int8" in layer.operands} == {"int8"}
    assert all(layer.macs for layer in unet)
    # Packed weights are for ONNX Runtime alone.
    crossed = lint(tmp_path / "onnxruntime", "tensorrt-rtx")
    assert {finding.rule for finding in crossed.findings if finding.breaks} == {"cast-codes"}


def test_a_model_of_another_domain_is_looked_at(lint_model: Lint) -> None:
    net = Net()
    y = net.op("Gelu", net.op("MatMul", net.input((1, 6, K)), net.floats((K, N))), domain="com.microsoft")
    model = net.finish(y)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    assert [layer.macs for layer in lint_model(model, "onnxruntime").layers] == [6 * K * N]


def test_no_weight_is_read(tmp_path: Path) -> None:
    """Files of many gigabytes are looked at in seconds."""
    net = Net()
    net.input((1, 6, K))
    model = net.finish(net.op("MatMul", net.quantize("x"), net.weight((K, N), axis=1)))
    codes = next(tensor for tensor in model.graph.initializer if tensor.name.startswith("codes"))
    codes.ClearField("int32_data")
    codes.raw_data = b"\0" * K * N
    onnx.external_data_helper.set_external_data(codes, "weights", offset=0, length=K * N)
    codes.ClearField("raw_data")
    path = write(tmp_path / "model.onnx", model)
    (tmp_path / "weights").write_bytes(b"\0" * K * N)
    opened: list[str] = []
    sys.addaudithook(lambda event, values: opened.append(str(values[0])) if event == "open" else None)
    assert lint(path).layers[0].execution == "int8"
    assert str(path) in opened
    assert str(tmp_path / "weights") not in opened

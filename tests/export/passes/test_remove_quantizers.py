"""Products out of low precision: what is computed then, and what stays as it was."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from quest_deploy.export.passes.remove_quantizers import RemoveQuantizers
from quest_deploy.export.quantized import graph_products, without_quantizers
from tests.export.passes.test_lower_precision import quantized
from tests.export.passes.test_passes import CODES, SCALE, graph, operators, run

STEP = np.array(0.25, dtype=np.float32)
X = np.array([[0.3, -0.9, 1.7, 0.1], [-40.0, 2.2, 0.6, 50.0]], dtype=np.float32)
WEIGHT = CODES.T  # [k, n]
CONSTANTS = {"step": STEP, "zero": np.array(0, np.int8), "weight": WEIGHT, "scale": SCALE}
PRODUCT = """
one (float[n, 4] x) => (float[n, 3] y) {
    codes = QuantizeLinear(x, step, zero)
    a = DequantizeLinear(codes, step)
    w = DequantizeLinear<axis = 1>(weight, scale)
    y = MatMul(a, w)
}"""
CLIPPED = PRODUCT.replace("codes = QuantizeLinear(x,", "c = Clip(x, low, high)\n codes = QuantizeLinear(c,")
SHARED = """
two (float[n, 4] x) => (float[n, 3] y, float[n, 3] z) {
    codes = QuantizeLinear(x, step, zero)
    a = DequantizeLinear(codes, step)
    w = DequantizeLinear<axis = 1>(weight, scale)
    y = MatMul(a, w)
    z = MatMul(a, w)
}"""
MOVED = """
moved (float[4, n] x) => (float[n, 3] y) {
    codes = QuantizeLinear(x, step, zero)
    turned = Transpose<perm = [1, 0]>(codes)
    a = DequantizeLinear(turned, step)
    w = DequantizeLinear<axis = 1>(weight, scale)
    y = MatMul(a, w)
}"""
ATTENTION = """
attention (float[n, 4] q, float[m, 4] k) => (float[n, m] y) {
    q_codes = QuantizeLinear(q, step, zero)
    a = DequantizeLinear(q_codes, step)
    k_codes = QuantizeLinear(k, step, zero)
    b = DequantizeLinear(k_codes, step)
    t = Transpose<perm = [1, 0]>(b)
    y = MatMul(a, t)
}"""


def build(text: str, **changed: np.ndarray) -> ir.Model:
    """A graph whose products are called after their outputs."""
    model = graph(text, **{name: value for name, value in {**CONSTANTS, **changed}.items() if name in text})
    for node in model.graph:
        node.name = str(node.outputs[0].name)
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.dtype = value.const_value.dtype
    return model


def remove(model: ir.Model, *products: str) -> bool:
    modified = RemoveQuantizers(products)(model).modified
    RemoveUnusedNodesPass()(model)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)
    return modified


def dequantized() -> np.ndarray:
    return WEIGHT.astype(np.float32) * SCALE


def test_product_multiplies_what_it_was_given_by_the_weights_that_codes_stand_for() -> None:
    model = build(PRODUCT)
    assert remove(model, "y")
    assert set(operators(model)) <= {"Cast", "MatMul"}
    np.testing.assert_array_equal(run(model, x=X)[0], X @ dequantized())


def test_clip_to_the_quantizer_s_grid_goes_with_it() -> None:
    model = build(CLIPPED, low=np.float32(-8) * STEP, high=np.float32(7) * STEP)
    assert remove(model, "y")
    np.testing.assert_array_equal(run(model, x=X)[0], X @ dequantized())


def test_clip_of_the_model_s_own_stays() -> None:
    model = build(CLIPPED, low=np.array(-0.6, np.float32), high=np.array(1.1, np.float32))
    assert remove(model, "y")
    assert "Clip" in operators(model)
    np.testing.assert_array_equal(
        run(model, x=X)[0], X.clip(np.float32(-0.6), np.float32(1.1)) @ dequantized()
    )


def test_others_that_read_the_same_codes_stay_as_they_are() -> None:
    model = build(SHARED)
    before = run(model, x=X)
    assert remove(model, "y")
    y, z = run(model, x=X)
    np.testing.assert_array_equal(z, before[1])
    np.testing.assert_array_equal(y, X @ dequantized())


def test_products_that_shared_a_weight_still_do() -> None:
    model = build(SHARED)
    assert remove(model, "y", "z")
    assert operators(model).count("MatMul") == 2 and "DequantizeLinear" not in operators(model)
    assert len([value for value in model.graph.initializers if "float" in value]) == 1


@pytest.mark.parametrize("text", [MOVED, ATTENTION], ids=["between-codes", "behind-the-dequantizer"])
def test_what_moves_values_is_repeated(text: str) -> None:
    model = build(text)
    inputs = {"x": X.T.copy()} if text is MOVED else {"q": X, "k": X[::-1].copy()}
    assert remove(model, "y")
    assert "QuantizeLinear" not in operators(model) and "Transpose" in operators(model)
    expected = X @ dequantized() if text is MOVED else X @ X[::-1].T
    np.testing.assert_allclose(run(model, **inputs)[0], expected, rtol=1e-6)


def test_weights_in_blocks_of_four_bits_are_unpacked() -> None:
    text = """
    blocks (float[n, 4] x) => (float[n, 3] y) {
        w = DequantizeLinear<axis = 0, block_size = 2>(weight, scale)
        y = MatMul(x, w)
    }"""
    scales = np.array([[0.5, 1.0, 2.0], [0.25, 4.0, 8.0]], np.float32)
    model = build(text, scale=scales)
    (weight,) = (value for value in model.graph.initializers.values() if value.name == "weight")
    weight.const_value = ir.Tensor(WEIGHT.astype(np.int8), dtype=ir.DataType.INT8, name="weight")
    assert remove(model, "y")
    expected = X @ (WEIGHT.astype(np.float32) * scales.repeat(2, axis=0))
    np.testing.assert_array_equal(run(model, x=X)[0], expected)


def test_half_precision_stays_half_precision_without_two_casts_in_a_row() -> None:
    from quest_deploy.export.graph import lower_precision

    model = lower_precision(quantized(), "fp16", ())
    name = next(str(node.name) for node in model.graph if node.op_type == "MatMul")
    assert remove(model, name)
    product = next(node for node in model.graph if node.op_type == "MatMul")
    assert [value.dtype for value in product.inputs if value is not None] == [ir.DataType.FLOAT16] * 2


@pytest.mark.parametrize(
    ("text", "products"),
    [
        pytest.param(PRODUCT, ("z",), id="another-product"),
        pytest.param(
            PRODUCT.replace("float[n, 4] x", "int8[n, 4] codes").replace(
                "codes = QuantizeLinear(x, step, zero)", ""
            ),
            ("y",),
            id="codes-are-an-input",
        ),
        pytest.param(
            PRODUCT.replace("(weight, scale)", "(computed, scale)").replace(
                "w = Deq", "twice = Add(weight, weight)\n computed = Relu(codes)\n w = Deq"
            ),
            ("y",),
            id="codes-are-computed",
        ),
        pytest.param(
            "one (float[n, 4] x) => (float[n, 3] y) { y = MatMul(x, matrix) }", ("y",), id="floats-already"
        ),
    ],
)
def test_leaves(text: str, products: Collection[str]) -> None:
    model = build(text, matrix=dequantized())
    before = operators(model)
    assert not RemoveQuantizers(products)(model).modified
    assert operators(model) == before


def test_file_is_written_with_the_named_products_alone_in_floats(tmp_path: Path) -> None:
    model = build(SHARED)
    ir.save(model, tmp_path / "model.onnx")
    found = graph_products(tmp_path / "model.onnx")
    assert [(one.name, one.removable) for one in found] == [("y", True), ("z", True)]
    assert set(found[0].quantizers) == {"a", "codes", "w"}
    without_quantizers(tmp_path / "model.onnx", ["y"], tmp_path / "float" / "model.onnx")
    written = graph_products(tmp_path / "float" / "model.onnx")
    assert [(one.name, one.removable) for one in written] == [("y", False), ("z", True)]

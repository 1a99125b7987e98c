"""Channel rows go into norms and weights where that changes nothing else."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from quest_deploy.export.passes.fold_rows import FoldRows

HEADER = '<ir_version: 10, opset_import: ["" : 21]>\n'
GENERATOR = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return GENERATOR.uniform(0.5, 2, shape).astype(np.float32)


def graph(text: str, **initializers: np.ndarray) -> ir.Model:
    tensors = [ir.tensor(value, name=name) for name, value in initializers.items() if name in text]
    return ir.from_onnx_text(HEADER + text, initializers=tensors)


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    return ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})


NORM = """
norm (float[n, 3, 4] x) => (float[n, 3, 2] y) {
    normed = LayerNormalization(x, scale, bias)
    scaled = Mul(normed, row)
    y = MatMul(scaled, weight)
}"""
NORM_PARTS = {"scale": floats(4), "bias": floats(4), "row": floats(1, 1, 4), "weight": floats(4, 2)}

GROUPS = """
groups (float[n, 4, 3, 3] x) => (float[n, 2, 3, 3] y) {
    normed = GroupNormalization<num_groups = 2>(x, scale, bias)
    scaled = Mul(row, normed)
    y = Conv(scaled, weight)
}"""
GROUPS_PARTS = {
    "scale": floats(4),
    "bias": floats(4),
    "row": floats(1, 4, 1, 1),
    "weight": floats(2, 4, 1, 1),
}

GEGLU = """
geglu (float[n, 3, 4] x) => (float[n, 3, 2] y) {
    w = DequantizeLinear<axis = 1>(codes, steps)
    product = MatMul(x, w)
    unscaled = Mul(product, of_sample)
    h = Add(unscaled, bias)
    value, gate = Split<axis = -1, num_outputs = 2>(h)
    open = Gelu(gate)
    gated = Mul(value, open)
    scaled = Mul(gated, row)
    y = MatMul(scaled, weight)
}"""
GEGLU_PARTS = {
    "codes": GENERATOR.integers(-8, 8, (4, 6)).astype(np.int8),
    "steps": floats(6),
    "of_sample": floats(1, 1, 1),
    "bias": floats(6),
    "row": floats(1, 1, 3),
    "weight": floats(3, 2),
}

ATTENTION = """
attention (float[n, 3, 4] x) => (float[n, 3, 2] y) {
    w = DequantizeLinear<axis = 1>(codes, steps)
    v = MatMul(x, w)
    apart = Reshape(v, heads)
    values = Transpose<perm = [0, 2, 1, 3]>(apart)
    attended = MatMul(probabilities, values)
    back = Transpose<perm = [0, 2, 1, 3]>(attended)
    together = Reshape(back, flat)
    scaled = Mul(together, row)
    y = MatMul(scaled, weight)
}"""
ATTENTION_PARTS = {
    "codes": GENERATOR.integers(-8, 8, (4, 6)).astype(np.int8),
    "steps": floats(6),
    "heads": np.array([0, 0, 2, 3]),
    "flat": np.array([0, 0, 6]),
    "probabilities": floats(1, 2, 3, 3),
    "row": floats(1, 1, 6),
    "weight": floats(6, 2),
}

CASES = {
    "layer-norm": (NORM, NORM_PARTS, (2, 3, 4)),
    "group-norm": (GROUPS, GROUPS_PARTS, (2, 4, 3, 3)),
    "geglu": (GEGLU, GEGLU_PARTS, (2, 3, 4)),
    "values-of-attention": (ATTENTION, ATTENTION_PARTS, (2, 3, 4)),
}


@pytest.mark.parametrize(("text", "parts", "shape"), CASES.values(), ids=CASES)
def test_the_row_goes_into_what_makes_the_input(
    text: str, parts: dict[str, np.ndarray], shape: tuple[int, ...]
) -> None:
    model, x = graph(text, **parts), floats(*shape)
    before, count = run(model, x)[0], operators(model).count("Mul")
    assert FoldRows()(model).modified
    assert operators(model).count("Mul") == count - 1
    assert "row" not in {value.name for node in model.graph for value in node.inputs if value is not None}
    np.testing.assert_allclose(run(model, x)[0], before, rtol=1e-5, atol=1e-5)
    assert not FoldRows()(model).modified


def test_readers_with_one_row_are_folded_together() -> None:
    text = NORM.replace(
        "y = MatMul(scaled, weight)",
        "again = Mul(normed, row)\n a = MatMul(scaled, weight)\n b = MatMul(again, weight)\n y = Add(a, b)",
    )
    model, x = graph(text, **NORM_PARTS), floats(2, 3, 4)
    before = run(model, x)[0]
    assert FoldRows()(model).modified
    assert "Mul" not in operators(model)
    np.testing.assert_allclose(run(model, x)[0], before, rtol=1e-5)


def test_a_shared_scale_is_changed_for_this_norm_only() -> None:
    text = NORM.replace("(float[n, 3, 2] y)", "(float[n, 3, 2] y, float[n, 3, 4] z)").replace(
        "normed = Layer", "z = LayerNormalization(x, scale, bias)\n normed = Layer"
    )
    model, x = graph(text, **NORM_PARTS), floats(2, 3, 4)
    before = run(model, x)
    assert FoldRows()(model).modified
    for now, then in zip(run(model, x), before, strict=True):
        np.testing.assert_allclose(now, then, rtol=1e-5)


UNFOLDABLE = {
    "another-reader-of-the-norm": (
        NORM.replace("y = MatMul(scaled, weight)", "p = MatMul(scaled, weight)\n y = Add(p, q)").replace(
            "scaled = Mul", "q = MatMul(normed, weight)\n scaled = Mul"
        ),
        NORM_PARTS,
    ),
    "readers-with-different-rows": (
        NORM.replace(
            "y = MatMul(scaled, weight)",
            "again = Mul(normed, other)\n a = MatMul(scaled, weight)\n b = MatMul(again, weight)\n y = Add(a, b)",
        ),
        {**NORM_PARTS, "other": floats(1, 1, 4)},
    ),
    "no-product-follows": (NORM.replace("MatMul(scaled, weight)", "Neg(scaled)"), NORM_PARTS),
    "one-factor-for-all-channels": (NORM, {**NORM_PARTS, "row": floats(1, 1, 1)}),
    "one-factor-for-each-token": (NORM, {**NORM_PARTS, "row": floats(1, 3, 1)}),
    "an-activation-lies-between": (
        NORM.replace("scaled = Mul(normed", "curved = Tanh(normed)\n scaled = Mul(curved"),
        NORM_PARTS,
    ),
    "channels-second-behind-a-norm-of-the-last-axis": (
        GROUPS.replace("GroupNormalization<num_groups = 2>", "LayerNormalization"),
        {**GROUPS_PARTS, "scale": floats(3), "bias": floats(3)},
    ),
    "one-number-is-added-to-all-channels": (GEGLU, {**GEGLU_PARTS, "bias": np.array(1, dtype=np.float32)}),
    "the-weight-is-float": (
        GEGLU.replace("w = DequantizeLinear<axis = 1>(codes, steps)", "w = Neg(float_w)"),
        {**GEGLU_PARTS, "float_w": floats(4, 6)},
    ),
    "the-weight-has-another-reader": (
        GEGLU.replace("product = MatMul", "other = MatMul(x, w)\n product = MatMul").replace(
            "h = Add(unscaled, bias)", "sum = Add(unscaled, other)\n h = Add(sum, bias)"
        ),
        GEGLU_PARTS,
    ),
    "the-value-half-has-another-reader": (
        GEGLU.replace("gated = Mul(value, open)", "both = Add(value, open)\n gated = Mul(value, both)"),
        GEGLU_PARTS,
    ),
    "scales-of-inputs-not-of-outputs": (
        GEGLU.replace("DequantizeLinear<axis = 1>", "DequantizeLinear<axis = 0>"),
        {**GEGLU_PARTS, "steps": floats(4)},
    ),
    "heads-in-another-order": (
        ATTENTION.replace(
            "back = Transpose<perm = [0, 2, 1, 3]>(attended)",
            "back = Transpose<perm = [0, 2, 3, 1]>(attended)",
        ),
        ATTENTION_PARTS,
    ),
    "values-are-quantized": (
        ATTENTION.replace(
            "attended = MatMul(probabilities, values)",
            "q = QuantizeLinear(values, one)\n d = DequantizeLinear(q, one)\n attended = MatMul(probabilities, d)",
        ),
        {**ATTENTION_PARTS, "one": np.array(0.5, dtype=np.float32)},
    ),
}


@pytest.mark.parametrize(("text", "parts"), UNFOLDABLE.values(), ids=UNFOLDABLE)
def test_must_not_fire(text: str, parts: dict[str, np.ndarray]) -> None:
    model = graph(text, **parts)
    before = ir.to_proto(model).SerializeToString()
    assert not FoldRows()(model).modified
    assert ir.to_proto(model).SerializeToString() == before

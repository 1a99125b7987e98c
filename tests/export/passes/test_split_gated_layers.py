"""Gated units are made by two products where that changes no number."""

from __future__ import annotations

import numpy as np
import pytest

from quest_deploy.export.passes.split_gated_layers import SplitGatedLayers
from tests.export.passes.test_fold_rows import floats, graph, operators, run

GEGLU = """
geglu (float[n, 3, 4] x) => (float[n, 3, 3] y)
<float[n, 3, 6] h, float[n, 3, 3] value, float[n, 3, 3] gate>
{
    w = DequantizeLinear<axis = 1>(codes, steps)
    product = MatMul(x, w)
    unscaled = Mul(product, of_sample)
    h = Add(unscaled, bias)
    value, gate = Split<axis = -1, num_outputs = 2>(h)
    open = Gelu(gate)
    y = Mul(value, open)
}"""
SWIGLU = GEGLU.replace("open = Gelu(gate)", "half = Sigmoid(gate)\n open = Mul(gate, half)").replace(
    "value, gate = Split", "gate, value = Split"
)
PARTS = {
    "codes": np.random.default_rng(0).integers(-8, 8, (4, 6)).astype(np.int8),
    "steps": floats(6),
    "of_sample": floats(1, 1, 1),
    "bias": floats(6),
    "spare": floats(6),
}


@pytest.mark.parametrize("text", [GEGLU, SWIGLU], ids=["geglu", "swiglu"])
def test_each_half_has_a_product_and_the_same_numbers(text: str) -> None:
    model, x = graph(text, **PARTS), floats(2, 3, 4)
    before = run(model, x)[0]
    assert SplitGatedLayers()(model).modified
    found = operators(model)
    assert "Split" not in found
    assert found.count("MatMul") == found.count("DequantizeLinear") == found.count("Add") == 2
    np.testing.assert_array_equal(run(model, x)[0], before)
    weights = [node.inputs[0] for node in model.graph if node.op_type == "DequantizeLinear"]
    assert [value.const_value.shape.numpy() for value in weights] == [(4, 3), (4, 3)]
    assert not SplitGatedLayers()(model).modified


def test_without_bias_and_factor() -> None:
    start, end = GEGLU.index("product ="), GEGLU.index("value, gate")
    text = GEGLU[:start] + "h = MatMul(x, w)\n" + GEGLU[end:]
    model, x = graph(text, **PARTS), floats(2, 3, 4)
    before = run(model, x)[0]
    assert SplitGatedLayers()(model).modified
    assert operators(model) == ["DequantizeLinear", "MatMul", "DequantizeLinear", "MatMul", "Gelu", "Mul"]
    np.testing.assert_array_equal(run(model, x)[0], before)


KEEPS = {
    "no-gate": ("open = Gelu(gate)", "open = Neg(gate)"),
    "three-parts": (
        "value, gate = Split<axis = -1, num_outputs = 2>(h)\n    open = Gelu(gate)\n    y = Mul(value, open)",
        "value, gate, third = Split<axis = -1, num_outputs = 3>(h)\n    y = Gelu(gate)",
    ),
    "another-axis": ("axis = -1, num", "axis = 0, num"),
    "whole-is-read": (
        "y = Mul(value, open)",
        "both = ReduceMax(h)\n gated = Mul(value, open)\n y = Add(gated, both)",
    ),
    "part-is-an-output": ("(float[n, 3, 3] y)", "(float[n, 3, 3] y, float[n, 3, 3] value)"),
    "shared-codes": (
        "product = MatMul(x, w)",
        "again = DequantizeLinear<axis = 1>(codes, spare)\n one = MatMul(x, w)\n two = MatMul(x, again)\n"
        " product = Add(one, two)",
    ),
    "float-weight": ("product = MatMul(x, w)", "flat = Neg(w)\n product = MatMul(x, flat)"),
    "scale-of-rows": ("<axis = 1>(codes, steps)", "<axis = 0>(codes, of_rows)"),
    "computed-bias": ("h = Add(unscaled, bias)", "own = Neg(bias)\n h = Add(unscaled, own)"),
}


@pytest.mark.parametrize(("old", "new"), KEEPS.values(), ids=KEEPS)
def test_anything_else_stays(old: str, new: str) -> None:
    assert old in GEGLU
    model = graph(GEGLU.replace(old, new), **PARTS, of_rows=floats(4))
    before = operators(model)
    assert not SplitGatedLayers()(model).modified
    assert operators(model) == before

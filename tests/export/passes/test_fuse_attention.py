"""Attention in float becomes one operator, with the same numbers, and no scores in memory."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from quest_deploy.export.passes.fuse_attention import FuseAttention
from quest_deploy.export.passes.transpose_keys import TransposeKeys
from tests.export.passes.test_fold_rows import floats, graph, operators

TOKENS, KEYS, HEADS, SIZE = 5, 7, 2, 4
WIDTH = HEADS * SIZE
# As torch exports scaled_dot_product_attention.
ATTENTION = """
attention (float[b, n, 8] x, float[b, m, 8] told) => (float[b, n, 8] y)
<float[b, n, 2, 4] q3, float[b, 2, n, 4] q, float[b, m, 2, 4] k3, float[b, 2, m, 4] k, float[b, m, 2, 4] v3,
 float[b, 2, m, 4] v, float[b, 2, n, 4] o, float[b, n, 2, 4] o3>
{
    q3 = Reshape(x, heads)
    q = Transpose<perm = [0, 2, 1, 3]>(q3)
    k3 = Reshape(told, heads)
    k = Transpose<perm = [0, 2, 1, 3]>(k3)
    v3 = Reshape(told, heads)
    v = Transpose<perm = [0, 2, 1, 3]>(v3)
    sizes = Shape<start = 0>(k)
    outer = Slice(sizes, lowest, minus_two)
    last = Slice(sizes, minus_one, highest)
    before = Slice(sizes, minus_two, minus_one)
    merged = Concat<axis = 0>(minus_one, before, last)
    swapped = Concat<axis = 0>(outer, last, before)
    pairs = Reshape(k, merged)
    turned = Transpose<perm = [0, 2, 1]>(pairs)
    kt = Reshape(turned, swapped)
    qs = Mul(q, root)
    ks = Mul(kt, root)
    scores = MatMul(qs, ks)
    p = Softmax<axis = -1>(scores)
    o = MatMul(p, v)
    o3 = Transpose<perm = [0, 2, 1, 3]>(o)
    y = Reshape(o3, joined)
}"""
PLAIN_TRANSPOSE = (
    "kt = Reshape(turned, swapped)",
    "kt = Transpose<perm = [0, 1, 3, 2]>(k)",
)
PARTS = {
    "heads": np.array([0, -1, HEADS, SIZE]),
    "joined": np.array([0, -1, WIDTH]),
    "lowest": np.array([np.iinfo(np.int64).min]),
    "highest": np.array([np.iinfo(np.int64).max]),
    "minus_one": np.array([-1]),
    "minus_two": np.array([-2]),
    "root": np.array([SIZE**-0.25], np.float32),
    "mask": floats(1, 1, TOKENS, KEYS),
    "row": floats(1, HEADS, 1, SIZE),
    "step": np.array(0.05, np.float32),
    "zero": np.array(0, np.int8),
}


def run(model: ir.Model) -> list[np.ndarray]:
    """ONNX Runtime as it is: the operator is its own."""
    generator = np.random.default_rng(1)
    proto = ir.to_proto(model)
    del proto.graph.value_info[:]
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    given = {
        "x": generator.normal(size=(3, TOKENS, WIDTH)).astype(np.float32),
        "told": generator.normal(size=(3, KEYS, WIDTH)).astype(np.float32),
    }
    return session.run(None, {one.name: given[one.name] for one in session.get_inputs()})


def fused(text: str) -> tuple[ir.Model, ir.Node]:
    """The model after the pass, the same numbers seen, and its one operator."""
    model = graph(text, **PARTS)
    before, names = run(model), [value.name for value in model.graph.outputs]
    TransposeKeys()(model)
    assert FuseAttention()(model).modified
    assert [value.name for value in model.graph.outputs] == names
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert not {"Softmax", "MatMul"} & set(operators(model))
    for got, wanted in zip(run(model), before, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)
    assert not FuseAttention()(model).modified
    (node,) = (node for node in model.graph if node.op_type == "MultiHeadAttention")
    return model, node


@pytest.mark.parametrize("change", [("", ""), PLAIN_TRANSPOSE], ids=["as torch writes it", "one transpose"])
def test_what_parts_and_joins_heads_goes(change: tuple[str, str]) -> None:
    model, node = fused(ATTENTION.replace(*change))
    assert operators(model) == ["MultiHeadAttention"]
    assert node.domain == "com.microsoft" and model.graph.opset_imports["com.microsoft"] == 1
    assert node.attributes.get_int("num_heads") == HEADS
    assert node.attributes.get_float("scale") == pytest.approx(SIZE**-0.5)
    assert list(node.outputs[0].shape)[2] == WIDTH


def test_scores_that_are_scaled_themselves() -> None:
    text = ATTENTION.replace("scores = MatMul(qs, ks)", "raw = MatMul(q, kt)\n scores = Div(raw, root)")
    _, node = fused(text)
    assert node.attributes.get_float("scale") == pytest.approx(SIZE**0.25)


def test_queries_with_a_factor_of_each_feature_keep_it() -> None:
    text = ATTENTION.replace("qs = Mul(q, root)", "turn = Mul(q, row)\n qs = Mul(turn, root)").replace(
        "float[b, 2, n, 4] q,", "float[b, 2, n, 4] q, float[b, 2, n, 4] turn,"
    )
    model, _ = fused(text)
    assert operators(model).count("Mul") == 1
    assert operators(model)[-4:] == ["Mul", "Transpose", "Reshape", "MultiHeadAttention"]


def test_heads_that_stay_apart_behind_it() -> None:
    text = ATTENTION.replace("(float[b, n, 8] y)", "(float[b, n, 8] y, float[b, 2, n, 4] o)")
    model, _ = fused(text.replace("v, float[b, 2, n, 4] o,", "v,"))
    assert operators(model).count("MultiHeadAttention") == 1
    assert operators(model)[-2:] == ["Transpose", "Reshape"]


def test_attentions_of_the_same_heads_and_other_sizes() -> None:
    """Heads stay apart behind both; the second works on the first half of each head."""
    text = ATTENTION.replace(
        "(float[b, n, 8] y)", "(float[b, n, 8] y, float[b, 2, n, 4] o, float[b, 2, n, 2] z)"
    )
    text = text.replace("v, float[b, 2, n, 4] o,", "v, float[b, 2, n, 2] h,").replace(
        "    y = Reshape",
        "    h, rest = Split<axis = -1, num_outputs = 2>(q)\n    ht = Transpose<perm = [0, 1, 3, 2]>(h)\n"
        "    hs = MatMul(h, ht)\n    hp = Softmax<axis = -1>(hs)\n    z = MatMul(hp, h)\n    y = Reshape",
    )
    model, names = graph(text, **PARTS), ["y", "o", "z"]
    before = run(model)
    TransposeKeys()(model)
    assert FuseAttention()(model).modified
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert operators(model).count("MultiHeadAttention") == 2 and "Softmax" not in operators(model)
    assert [value.name for value in model.graph.outputs] == names
    for got, wanted in zip(run(model), before, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=2e-6, atol=2e-6)


KEEPS = {
    "mask": ("scores = MatMul(qs, ks)", "raw = MatMul(qs, ks)\n scores = Add(raw, mask)"),
    "another axis": ("p = Softmax<axis = -1>", "p = Softmax<axis = 2>"),
    "probabilities are read": (
        "y = Reshape(o3, joined)",
        "more = ReduceSum(p)\n some = Reshape(o3, joined)\n y = Add(some, more)",
    ),
    "scores are read": (
        "y = Reshape(o3, joined)",
        "more = ReduceSum(scores)\n some = Reshape(o3, joined)\n y = Add(some, more)",
    ),
    "quantized probabilities": (
        "o = MatMul(p, v)",
        "codes = QuantizeLinear(p, step, zero)\n steps = DequantizeLinear(codes, step, zero)\n o = MatMul(steps, v)",
    ),
    "quantized queries": (
        "qs = Mul(q, root)",
        "codes = QuantizeLinear(q, step, zero)\n grid = DequantizeLinear(codes, step, zero)\n qs = Mul(grid, root)",
    ),
    "quantized values": (
        "o = MatMul(p, v)",
        "codes = QuantizeLinear(v, step, zero)\n grid = DequantizeLinear(codes, step, zero)\n o = MatMul(p, grid)",
    ),
    "keys are moved otherwise": (
        "merged = Concat<axis = 0>(minus_one, before, last)",
        "merged = Concat<axis = 0>(minus_one, last, before)",
    ),
    "unknown heads": ("float[b, 2, n, 4] q,", "float[b, h, n, 4] q,"),
}


@pytest.mark.parametrize(("old", "new"), KEEPS.values(), ids=KEEPS)
def test_anything_else_stays(old: str, new: str) -> None:
    assert old in ATTENTION
    model = graph(ATTENTION.replace(old, new), **PARTS)
    typed(model)
    TransposeKeys()(model)
    before = operators(model)
    assert not FuseAttention()(model).modified
    assert operators(model) == before


def typed(model: ir.Model) -> None:
    """Give what the text does not say the shape of what it is made from, as the exporter does."""
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.outputs[0].shape = node.inputs[0].shape


def test_float_inputs_are_what_the_tests_of_codes_change() -> None:
    """Quantized operands alone keep the last three: the same graphs fuse without the quantizers."""
    for name in ("quantized queries", "quantized values", "quantized probabilities"):
        old, new = KEEPS[name]
        model = graph(ATTENTION.replace(old, new), **PARTS)
        typed(model)
        TransposeKeys()(model)
        for node in list(model.graph):
            if node.op_type == "DequantizeLinear":
                quantize = node.inputs[0].producer()
                node.outputs[0].replace_all_uses_with(quantize.inputs[0])
                model.graph.remove([node, quantize], safe=True)
        assert FuseAttention()(model).modified, name

"""Keys are transposed by one Transpose, and nothing else is taken for that."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from quest_deploy.export.passes.transpose_keys import TransposeKeys
from tests.export.passes.test_fold_rows import graph, operators, run

HEADS, SIZE = 2, 4
# As torch exports scaled_dot_product_attention.
KEYS = """
keys (float[b, 2, m, 4] x) => (float[b, 2, 4, m] y) {
    sizes = Shape<start = 0>(x)
    outer = Slice(sizes, lowest, minus_two)
    last = Slice(sizes, minus_one, highest)
    before = Slice(sizes, minus_two, minus_one)
    merged = Concat<axis = 0>(minus_one, before, last)
    swapped = Concat<axis = 0>(outer, last, before)
    pairs = Reshape(x, merged)
    turned = Transpose<perm = [0, 2, 1]>(pairs)
    y = Reshape(turned, swapped)
}"""
PARTS = {
    "lowest": np.array([np.iinfo(np.int64).min]),
    "highest": np.array([np.iinfo(np.int64).max]),
    "minus_one": np.array([-1]),
    "minus_two": np.array([-2]),
    "constant_merged": np.array([-1, 3, SIZE]),
}
X = np.arange(2 * HEADS * 3 * SIZE, dtype=np.float32).reshape(2, HEADS, 3, SIZE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x)", "x)"),
        ("merged)\n", "constant_merged)\n"),
        # An axis of one size has no name in what the exporter infers.
        ("(float[b, 2, m, 4] x) => (float[b, 2, 4, m] y)", "(float[b, 2, ?, 4] x) => (float[b, 2, 4, ?] y)"),
    ],
    ids=["computed", "constant", "unknown"],
)
def test_two_reshapes_go(old: str, new: str) -> None:
    text = KEYS.replace("float[b, 2, m, 4] x", "float[b, 2, 3, 4] x") if "constant" in new else KEYS
    assert old in text
    model = graph(text.replace(old, new), **PARTS)
    before = run(model, X)[0]
    assert TransposeKeys()(model).modified
    ir.passes.common.RemoveUnusedNodesPass()(model)
    assert operators(model) == ["Transpose"]
    assert [value.name for value in model.graph.outputs] == ["y"]
    np.testing.assert_array_equal(run(model, X)[0], before)
    assert not TransposeKeys()(model).modified


KEEPS = {
    "merged in another order": (
        "merged = Concat<axis = 0>(minus_one, before, last)",
        "merged = Concat<axis = 0>(minus_one, last, before)",
    ),
    "parted in another order": (
        "swapped = Concat<axis = 0>(outer, last, before)",
        "swapped = Concat<axis = 0>(outer, before, last)",
    ),
    "both unknown, in another order": (
        "float[b, 2, m, 4] x) => (float[b, 2, 4, m] y) {\n    sizes = Shape<start = 0>(x)\n"
        "    outer = Slice(sizes, lowest, minus_two)\n    last = Slice(sizes, minus_one, highest)\n"
        "    before = Slice(sizes, minus_two, minus_one)\n",
        "float[b, 2, ?, ?] x) => (float[b, 2, ?, ?] y) {\n    sizes = Shape<start = 0>(x)\n"
        "    outer = Slice(sizes, lowest, minus_two)\n    before = Slice(sizes, minus_one, highest)\n"
        "    last = Slice(sizes, minus_two, minus_one)\n",
    ),
    "other axes swapped": ("perm = [0, 2, 1]", "perm = [1, 0, 2]"),
    "heads merged into another axis": (
        "merged = Concat<axis = 0>(minus_one, before, last)",
        "merged = Concat<axis = 0>(outer, minus_one)",
    ),
    "read in between": ("(float[b, 2, 4, m] y)", "(float[b, 2, 4, m] y, float[c, 4, m] turned)"),
}


@pytest.mark.parametrize(("old", "new"), KEEPS.values(), ids=KEEPS)
def test_anything_else_stays(old: str, new: str) -> None:
    assert old in KEYS
    model = graph(KEYS.replace(old, new), **PARTS)
    before = operators(model)
    assert not TransposeKeys()(model).modified
    assert operators(model) == before

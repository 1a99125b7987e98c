"""Products that share an input have codes of their own, which ONNX Runtime needs to multiply them as integers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from quest_deploy.export.passes.unshare_dequantize import UnshareDequantize
from quest_deploy.export.passes.unshare_quantize import UnshareQuantize
from tests.export.passes.test_passes import CODES, ONE, SCALE, graph, run

TOKENS = """
tokens (float[n, 3, 4] x) => (float[n, 3, 3] y) {
    q = QuantizeLinear<axis = 1>(x, one, zero)
    a = DequantizeLinear(q, one, zero)
    b = DequantizeLinear(q, one, zero)
    w = DequantizeLinear<axis = 1>(codes, scale)
    left = MatMul(a, w)
    right = MatMul(b, w)
    y = Sub(left, right)
}"""
PARTS = {
    "one": ONE,
    "zero": np.array(0, dtype=np.int8),
    "codes": CODES.T.copy(),
    "scale": SCALE,
}


def test_gives_each_product_its_own() -> None:
    model = graph(TOKENS, **PARTS)
    assert UnshareQuantize()(model).modified
    quantizers = [node for node in model.graph if node.op_type == "QuantizeLinear"]
    assert [node.attributes.get_int("axis") for node in quantizers] == [1, -3]
    assert len({node.inputs[0] for node in quantizers}) == 1
    tokens = np.linspace(-1, 1, 12, dtype=np.float32).reshape(1, 3, 4)
    assert not run(model, x=tokens)[0].any()
    assert not UnshareQuantize()(model).modified


def test_onnx_runtime_multiplies_integers(tmp_path: Path) -> None:
    model = graph(TOKENS, **PARTS)
    UnshareDequantize()(model)
    assert fused(model, tmp_path).count("MatMulIntegerToFloat") == 0
    UnshareQuantize()(model)
    assert fused(model, tmp_path).count("MatMulIntegerToFloat") == 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("right = MatMul(b, w)", "c = Neg(b)\n    right = MatMul(c, w)"),
        ("float[n, 3, 3] y)", "float[n, 3, 3] y, int8[n, 3, 4] q)"),
        ("(x, one, zero)", "(x, rows, zero)"),
        ("b = DequantizeLinear(q, one, zero)", "b = Identity(a)"),
    ],
    ids=["no-product", "graph-output", "scale-of-rows", "one-reader"],
)
def test_leaves_anything_else(old: str, new: str) -> None:
    text = TOKENS.replace(old, new)
    assert text != TOKENS
    rows = {"rows": SCALE} if "rows" in text else {}
    assert not UnshareQuantize()(graph(text, **PARTS, **rows)).modified


def fused(model: ir.Model, folder: Path) -> list[str]:
    """The operators that ONNX Runtime makes of a graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(
        ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return [node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node]

"""Multiply-accumulates of a product, from inferred shapes."""

from __future__ import annotations

import math

import onnx_ir as ir

# The standard's, and ONNX Runtime's.
ATTENTIONS = ("Attention", "MultiHeadAttention")

_MATRIX_PRODUCTS = (
    *(
        "MatMul",
        "MatMulInteger",
        "MatMulNBits",
        "QLinearMatMul",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
    ),
    *("FusedMatMul", "Gemm", "FusedGemm"),
)


def count_macs(node: ir.Node) -> int | None:
    """Multiply-accumulates of one run of `node`; None where a shape is unknown or the operator is not counted."""
    shapes = [shape_of(value) for value in (*node.inputs, *node.outputs)]
    inputs, output = shapes[: len(node.inputs)], shapes[len(node.inputs)]
    kind = node.op_type
    if kind in ATTENTIONS:
        return attention_macs(inputs)
    if kind in _MATRIX_PRODUCTS:
        flag = node.attributes.get("transA")
        first = inputs[0]
        depth = None if not first else first[-2] if flag is not None and flag.as_int() else first[-1]
        return None if output is None or depth is None else math.prod(output) * depth
    if kind in ("Conv", "ConvInteger", "FusedConv"):
        return convolution_macs(output, inputs[1])
    if kind == "QLinearConv":
        return convolution_macs(output, inputs[3])
    if kind == "ConvTranspose":
        return convolution_macs(inputs[0], inputs[1])
    return None


def convolution_macs(positions: tuple[int, ...] | None, weight: tuple[int, ...] | None) -> int | None:
    """Elements on the side with one channel a filter, times the elements of a filter.

    Args:
        positions: Shape of the output (of the input, for a transposed convolution).
        weight: Its second axis holds the channels of one group.
    """
    return None if positions is None or weight is None else math.prod(positions) * math.prod(weight[1:])


def attention_macs(inputs: list[tuple[int, ...] | None]) -> int | None:
    """Both products: queries times keys, and probabilities times values.

    Args:
        inputs: Shapes of q, k, v: [b, heads, tokens, d], or [b, tokens, heads * d].
    """
    if len(inputs) < 3 or any(shape is None for shape in inputs[:3]):
        return None
    (*outer, queries, depth), (*_, keys, _), (*_, values) = (shape for shape in inputs[:3] if shape)
    return math.prod(outer) * queries * keys * (depth + values)


def shape_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a value, where every size is known."""
    if value is None or value.shape is None:
        return None
    sizes = tuple(size for size in value.shape if isinstance(size, int))
    return sizes if len(sizes) == len(value.shape) else None

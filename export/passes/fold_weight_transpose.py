"""Transpose integer weights ahead of time, so that products read DequantizeLinear directly."""

from __future__ import annotations

import onnx_ir as ir

from quest_deploy.export.lazy import transposed

DEQUANTIZE = "DequantizeLinear"


class FoldWeightTranspose(ir.passes.InPlacePass):
    """Leave ``MatMul(x, DequantizeLinear(codes))`` where the exporter writes transposes.

    Runtimes fuse only that form into an integer product.

    1. ``Transpose(DequantizeLinear(codes, scale, axis), perm)``, with codes and scale initializers and the transpose
       the only reader, becomes ``DequantizeLinear(transposed codes, scale, position of axis in perm)``.
    2. ``Gemm(x, DequantizeLinear(codes), transB=1)`` without bias, alpha 1 and transA 0 becomes
       ``MatMul(x, DequantizeLinear(transposed codes))``: ONNX Runtime has kernels for integer products with float
       output, and for 4-bit weights, for MatMul, not for Gemm.
    3. Must not fire where the dequantized weight or its codes have another reader, where codes are computed, on a
       zero-point that is not a scalar, on block-quantized weights (block_size > 0), nor on a Gemm with a bias.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "Transpose" and _is_foldable(node.inputs[0]):
                _fold_transpose(model.graph, node)
            elif node.op_type == "Gemm" and _is_plain_gemm(node):
                _gemm_to_matmul(model.graph, node)
            else:
                continue
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _is_foldable(value: ir.Value | None) -> bool:
    if value is None or value.is_graph_output() or len(value.uses()) != 1:
        return False
    node = value.producer()
    if node is None or node.op_type != DEQUANTIZE or node.attributes.get_int("block_size", 0) != 0:
        return False
    codes, scale = node.inputs[0], node.inputs[1]
    if codes is None or scale is None or codes.const_value is None or scale.const_value is None:
        return False
    zero_point = node.inputs[2] if len(node.inputs) > 2 else None
    scalar = zero_point is None or (zero_point.const_value is not None and zero_point.const_value.size == 1)
    return scalar and len(codes.uses()) == 1 and len(codes.const_value.shape) > 1


def _is_plain_gemm(node: ir.Node) -> bool:
    attributes = node.attributes
    return (
        (len(node.inputs) < 3 or node.inputs[2] is None)
        and attributes.get_int("transA", 0) == 0
        and attributes.get_int("transB", 0) == 1
        and attributes.get_float("alpha", 1.0) == 1.0
        and _is_foldable(node.inputs[1])
    )


def _transpose_codes(dequantize: ir.Node, perm: list[int]) -> None:
    """Permute the codes of a DequantizeLinear, and its axis with them."""
    codes = dequantize.inputs[0]
    assert codes is not None and codes.const_value is not None
    codes.const_value = transposed(codes.const_value, perm)
    codes.shape = ir.Shape(codes.const_value.shape.numpy())
    axis = dequantize.attributes.get_int("axis", 1) % len(perm)
    dequantize.attributes["axis"] = ir.AttrInt64("axis", perm.index(axis))


def _fold_transpose(graph: ir.Graph, transpose: ir.Node) -> None:
    weight = transpose.inputs[0]
    assert weight is not None
    dequantize = weight.producer()
    assert dequantize is not None and dequantize.inputs[0] is not None
    rank = len(dequantize.inputs[0].const_value.shape)  # type: ignore[union-attr]
    perm = list(transpose.attributes.get_ints("perm", tuple(reversed(range(rank)))))
    _transpose_codes(dequantize, perm)
    output = transpose.outputs[0]
    weight.shape = output.shape
    output.replace_all_uses_with(weight, replace_graph_outputs=True)
    graph.remove(transpose, safe=True)


def _gemm_to_matmul(graph: ir.Graph, gemm: ir.Node) -> None:
    x, weight = gemm.inputs[0], gemm.inputs[1]
    assert weight is not None
    dequantize = weight.producer()
    assert dequantize is not None
    _transpose_codes(dequantize, [1, 0])
    matmul = ir.node("MatMul", [x, weight])
    matmul.metadata_props.update(gemm.metadata_props)
    output = matmul.outputs[0]
    # The name too: it may be that of an output of the graph.
    output.name, output.shape, output.type = gemm.outputs[0].name, gemm.outputs[0].shape, gemm.outputs[0].type
    graph.insert_before(gemm, matmul)
    gemm.outputs[0].replace_all_uses_with(output, replace_graph_outputs=True)
    graph.remove(gemm, safe=True)

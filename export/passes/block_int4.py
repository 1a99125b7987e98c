"""Weights of products as blocks of 4-bit codes, the form that runtimes keep in 4 bits."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from quest_deploy.export.lazy import sizes_of
from quest_deploy.export.passes.pack_int4 import as_int4, is_packable

BLOCKS = (128, 64, 32)


class BlockInt4(ir.passes.InPlacePass):
    """Give ``MatMul(x, DequantizeLinear(int8 codes, scale[n], axis=1))`` INT4 codes, and a scale for each block.

    TensorRT and ONNX Runtime (MatMulNBits) keep INT4 weights of a product of float activations only in blocks along k.
    A scale of an output channel, repeated over its blocks, is the same weight.

    1. Fires on codes [k, n] in [-8, 7] that only such products read, where `x` is no DequantizeLinear and the largest
       of the blocks 128, 64 and 32 that divides k exists. Nothing is lost.
    2. Must not fire on convolutions, on products of integers (TensorRT multiplies INT4 by INT8 nowhere), where k is not
       a multiple of 32, nor where a code needs more than 4 bits: those stay int8.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        modified = False
        for node in list(model.graph):
            if node.op_type == "DequantizeLinear" and (block := block_of(node)):
                _regroup(model.graph, node, block)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def block_of(dequantize: ir.Node) -> int | None:
    """The block that a weight is stored in; None where rule 2 holds."""
    codes, scale = dequantize.inputs[0], dequantize.inputs[1]
    if codes is None or scale is None or scale.const_value is None or not is_packable(codes):
        return None
    assert codes.const_value is not None
    shape = codes.const_value.shape.numpy()
    if len(shape) != 2 or len(codes.uses()) != 1 or dequantize.attributes.get_int("axis", 1) % 2 != 1:
        return None
    uses = dequantize.outputs[0].uses()
    if not uses or not all(
        use.node.op_type == "MatMul" and use.idx == 1 and _is_float(use.node) for use in uses
    ):
        return None
    return next((block for block in BLOCKS if shape[0] % block == 0), None)


def _is_float(product: ir.Node) -> bool:
    x = product.inputs[0]
    producer = None if x is None else x.producer()
    return producer is None or producer.op_type != "DequantizeLinear"


def _regroup(graph: ir.Graph, dequantize: ir.Node, block: int) -> None:
    codes, scale = dequantize.inputs[0], dequantize.inputs[1]
    assert codes is not None and codes.const_value is not None
    assert scale is not None and scale.const_value is not None
    inputs = sizes_of(codes.const_value)[0]
    codes.const_value = as_int4(codes)
    codes.dtype = ir.DataType.INT4
    repeated = np.repeat(scale.const_value.numpy().reshape(1, -1), inputs // block, axis=0)
    name = f"{codes.name}_block_scale"
    own = ir.Value(
        name=name,
        type=ir.TensorType(ir.DataType.FLOAT),
        shape=ir.Shape(repeated.shape),
        const_value=ir.tensor(repeated, name=name),
    )
    graph.register_initializer(own)
    dequantize.replace_input_with(1, own)
    dequantize.attributes["axis"] = ir.AttrInt64("axis", 0)
    dequantize.attributes["block_size"] = ir.AttrInt64("block_size", block)

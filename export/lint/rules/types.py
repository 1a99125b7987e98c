"""Float types: what exports in fp16 and bf16 can get wrong."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from quest_deploy.export.lint.execution.common import stored_weight_alone
from quest_deploy.export.lint.execution.onnx_runtime import takes_n_bits
from quest_deploy.export.lint.rules.problem import ONNX_RUNTIME, OPENVINO, TENSORRT, TITLES, Problem
from quest_deploy.export.lint.view import CONVOLUTIONS, DEQUANTIZE, FOUR_BITS, View, integer

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)
# Operator sets that brought `output_dtype`.
_OUTPUT_TYPE_OPSET = {"QuantizeLinear": 21, DEQUANTIZE: 23}
_BFLOAT16_OPSET = 22
_BFLOAT16_SINCE_22 = (*CONVOLUTIONS, "InstanceNormalization")
# Inputs that have one type; of Where, the first is a condition.
_SAME_TYPE = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Max", "Min", "Concat", "MatMul", "Gemm", *CONVOLUTIONS), 0),
    "Where": 1,
}
# ONNX Runtime's CPU provider has no kernel for them in double (tried).
_NO_DOUBLE = (*CONVOLUTIONS, "Erf", "Gelu", "HardSwish", "Softplus", "InstanceNormalization", "Resize")
_MOVES_TYPES = ("Cast", "CastLike", "Constant", "Identity")


def packed_scale_type(view: View, target: str) -> Iterator[Problem]:
    """Packed weights are dequantized in the type of their scales.

    1. For TensorRT: a 4-bit weight whose DequantizeLinear gives another type than its scales have breaks.
    2. For ONNX Runtime: so does a 4-bit or 8-bit weight alone, which is fused to MatMulNBits all the same.
    3. Must not fire on int8 weights of TensorRT, on a Cast behind the DequantizeLinear, nor on OpenVINO.
    """
    if target == OPENVINO:
        return
    for product in view.products:
        weight = product.weight
        dequantizer = None if weight is None else weight.dequantizer
        if weight is None or dequantizer is None or dequantizer.origin != "stored":
            continue
        scale = dequantizer.node.inputs[1]
        given = integer(dequantizer.node, "output_dtype", 0)
        if not given or scale is None or scale.dtype is None or given == scale.dtype:
            continue
        packed = dequantizer.kind in FOUR_BITS
        if target == ONNX_RUNTIME:
            packed = stored_weight_alone(product) is weight and takes_n_bits(product, weight)
        if packed:
            yield Problem(
                node=dequantizer.node,
                breaks=True,
                message=f"its scales are {scale.dtype.name.lower()} and it gives {ir.DataType(given).name.lower()}: "
                f"{TITLES[target]} has no such product with packed weights; store the scales in the product's type",
            )


def output_type_opset(view: View, target: str) -> Iterator[Problem]:
    """QuantizeLinear has `output_dtype` from opset 21 on, DequantizeLinear from 23 on.

    1. An earlier one breaks ONNX Runtime; elsewhere it is a warning, since the file is not valid.
    2. Must not fire on nodes of ONNX Runtime's own domain.
    """
    for node in view.linear_nodes:
        needed = _OUTPUT_TYPE_OPSET[node.op_type]
        if not node.domain and view.opset < needed and integer(node, "output_dtype", 0):
            yield Problem(
                node=node,
                breaks=target == ONNX_RUNTIME,
                message=f"{node.op_type} has output_dtype from opset {needed} on, got {view.opset}; export with opset "
                f"{needed}, or put a Cast behind it",
            )


def bfloat16_opset(view: View, target: str) -> Iterator[Problem]:
    """Convolutions in bfloat16 came with opset 22.

    1. An earlier one breaks ONNX Runtime; elsewhere it is a warning, since the file is not valid.
    2. Must not fire on MatMul and Gemm, which have bfloat16 from opset 13 on.
    """
    if view.opset >= _BFLOAT16_OPSET:
        return
    for node in view.model.graph.all_nodes():
        if node.op_type in _BFLOAT16_SINCE_22 and ir.DataType.BFLOAT16 in types_of(node):
            yield Problem(
                node=node,
                breaks=target == ONNX_RUNTIME,
                message=f"{node.op_type} in bfloat16 at opset {view.opset}, which the standard has from "
                f"{_BFLOAT16_OPSET} on; export with opset {_BFLOAT16_OPSET}",
            )


def bfloat16_attention(view: View, target: str) -> Iterator[Problem]:
    """OpenVINO does not multiply two quantized activations in bfloat16.

    1. Such a product breaks: it is not compiled, or computes something else.
    2. Must not fire on other float types, on stored weights, nor for other runtimes.
    """
    if target != OPENVINO:
        return
    for product in view.products:
        kinds = types_of(product.node)
        if product.weight is None and product.both_quantized() and ir.DataType.BFLOAT16 in kinds:
            yield Problem(
                node=product.node,
                breaks=True,
                message="it multiplies two quantized activations in bfloat16, which OpenVINO computes wrongly; "
                "export with --dtype fp32 or fp16",
            )


def mixed_types(view: View, target: str) -> Iterator[Problem]:
    """Float operands of one operator have one type.

    1. An Add, Sub, Mul, Div, Max, Min, Concat, Where, MatMul, Gemm or convolution of two float types breaks.
    2. Must not fire on a product with a DequantizeLinear (`scale-type` does), on unknown types, nor, for TensorRT, on
       double beside float32.
    """
    if not inference_is_right(view):
        return
    quantized = {id(product.node) for product in view.products if product.dequantizers}
    for node in view.model.graph.all_nodes():
        if node.op_type not in _SAME_TYPE or node.domain or id(node) in quantized:
            continue
        found = {
            ir.DataType.FLOAT if value.dtype == ir.DataType.DOUBLE and target in TENSORRT else value.dtype
            for value in node.inputs[_SAME_TYPE[node.op_type] :]
            if value is not None and value.dtype in FLOATS
        }
        if len(found) > 1:
            names = " and ".join(sorted(kind.name.lower() for kind in found if kind is not None))
            yield Problem(
                node=node,
                breaks=True,
                message=f"{node.op_type} of {names}; put a Cast before one of its operands",
            )


def inference_is_right(view: View) -> bool:
    """Whether inferred types can be relied on.

    Before opset 19 inference makes every DequantizeLinear float32, and it ignores an `output_dtype` before its time.
    """
    early = any(output_type_opset(view, ONNX_RUNTIME))
    return not early and (view.opset >= 19 or not view.dequantizers)


def double_precision(view: View, target: str) -> Iterator[Problem]:
    """Nobody computes images in float64.

    1. For TensorRT and OpenVINO, a warning: both compute a float64 operator in float32.
    2. For ONNX Runtime, a convolution, Erf, Gelu, HardSwish, Softplus, InstanceNormalization or Resize in float64
       breaks: there is no kernel.
    3. Must not fire on Casts from and to float64.
    """
    for node in view.model.graph.all_nodes():
        if node.op_type in _MOVES_TYPES or ir.DataType.DOUBLE not in types_of(node):
            continue
        if target != ONNX_RUNTIME:
            yield Problem(
                node=node,
                message=f"{node.op_type} in float64, which {TITLES[target]} computes in float32; export in float32",
            )
        elif node.op_type in _NO_DOUBLE:
            yield Problem(
                node=node,
                breaks=True,
                message=f"{node.op_type} in float64, for which ONNX Runtime has no CPU kernel; export in float32",
            )


def types_of(node: ir.Node) -> set[ir.DataType]:
    """The types of a node's inputs and outputs, as far as they are known."""
    values = (*node.inputs, *node.outputs)
    return {value.dtype for value in values if value is not None and value.dtype is not None}

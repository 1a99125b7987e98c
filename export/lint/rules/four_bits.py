"""Types of codes that integer kernels do not take: four bits, sixteen, and two types in one product."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from quest_deploy.export.lint.rules.problem import ONNX_RUNTIME, OPENVINO, TENSORRT, Problem
from quest_deploy.export.lint.view import (
    DEQUANTIZE,
    EIGHT_BITS,
    FLOAT8,
    FOUR_BITS,
    MATRIX_PRODUCTS,
    QUANTIZE,
    SIXTEEN_BITS,
    Dequantizer,
    Operand,
    Product,
    View,
    is_constant,
    quantized_type,
    walk_up,
)


def four_bit_weight_on_convolution(view: View, target: str) -> Iterator[Problem]:
    """No runtime has convolutions with 4-bit weights.

    1. A convolution with a 4-bit weight is a warning: the weight is dequantized, the arithmetic is float.
    2. It breaks TensorRT where the activation is quantized, too (unless scales along another axis than the output
       channels keep it in float anyway).
    3. Must not fire on MatMul and Gemm.
    """
    for product in view.products:
        weight = product.weight
        if not product.is_convolution or weight is None or not has_four_bits(weight):
            continue
        yield Problem(
            node=product.node,
            breaks=target in TENSORRT and product.both_quantized() and not product.along_the_sum(weight),
            message="a 4-bit weight on a convolution, for which there is no integer kernel; store the values as int8",
        )


def four_bit_activation(view: View, target: str) -> Iterator[Problem]:
    """Four-bit codes are for weights.

    1. A product of a 4-bit activation is a warning: no integer kernel takes it.
    2. It breaks TensorRT where a convolution has both operands quantized (with the exception of the rule above), and
       where probabilities from a Softmax meet another 4-bit activation.
    3. It breaks OpenVINO (its process dies, mostly) where a MatMul or Gemm has an 8-bit weight that would make it an
       integer product.
    4. Must not fire on weights.
    """
    for product in view.products:
        for operand in product.operands:
            dequantizer = operand.dequantizer
            if dequantizer is None or operand.is_weight or dequantizer.kind not in FOUR_BITS:
                continue
            yield Problem(
                node=dequantizer.node,
                breaks=activation_breaks(product, operand, target),
                message=f"the activation of '{product.node.name}' is {dequantizer.describe()}; put a Clip before an "
                "int8 quantizer with the same scale: the values are the same",
            )


def activation_breaks(product: Product, operand: Operand, target: str) -> bool:
    """Whether the target refuses a 4-bit activation (rules 2 and 3)."""
    others = [other for other in product.operands if other is not operand]
    if target in TENSORRT and product.is_convolution:
        return product.both_quantized() and not any(product.along_the_sum(other) for other in others)
    if target in TENSORRT:
        return from_softmax(operand) and any(not other.is_weight and has_four_bits(other) for other in others)
    weight = product.operands[-1]
    return (
        target == OPENVINO
        and product.node.op_type in MATRIX_PRODUCTS
        and weight.is_weight
        and weight.dequantizer is not None
        and weight.dequantizer.kind in EIGHT_BITS
        and weight.dequantizer.granularity != "block"
        and not product.along_the_sum(weight)
        and weight.float_type != ir.DataType.BFLOAT16
        and has_constant_scales(product)
    )


def from_softmax(operand: Operand) -> bool:
    """Whether an activation's codes are probabilities."""
    if operand.dequantizer is None or operand.dequantizer.quantizer is None:
        return False
    value = operand.dequantizer.quantizer.inputs[0]
    producer = None if value is None else walk_up(value, ("Clip", "Identity", "Cast"))[0].producer()
    return producer is not None and producer.op_type == "Softmax"


def has_four_bits(operand: Operand) -> bool:
    """Whether an operand comes from 4-bit codes that reach DequantizeLinear as such."""
    return operand.dequantizer is not None and operand.dequantizer.kind in FOUR_BITS


def four_bit_weight_along_the_sum(view: View, target: str) -> Iterator[Problem]:
    """OpenVINO does not survive 4-bit weights with a scale for each summed channel.

    1. For OpenVINO: breaks a MatMul or Gemm of such a weight in fp32 or fp16 (the process dies).
    2. Must not fire on scales by output channel or by block, nor on other targets.
    """
    if target != OPENVINO:
        return
    for product in view.products:
        weight = product.weight
        if product.node.op_type not in MATRIX_PRODUCTS or weight is None:
            continue
        if weight.float_type == ir.DataType.BFLOAT16:
            continue
        by_channel = weight.dequantizer is not None and weight.dequantizer.granularity == "channel"
        if has_four_bits(weight) and by_channel and product.along_the_sum(weight):
            yield Problem(
                node=product.node,
                breaks=True,
                message="a 4-bit weight whose scales lie along the summed axis; quantize along the output channels",
            )


def code_opset(view: View, target: str) -> Iterator[Problem]:
    """Codes of 4 and 16 bits came with operator set 21, 8-bit floats with 19.

    1. Q or DQ of such codes before that breaks ONNX Runtime; a warning elsewhere, as the file is no valid ONNX.
    2. Must not fire from opset 21 on, nor on nodes of ONNX Runtime's own domain.
    """
    for dequantizer in view.dequantizers:
        kind = dequantizer.kind
        wanted = 21 if kind in (*FOUR_BITS, *SIXTEEN_BITS) else 19 if kind in FLOAT8 else 0
        if view.opset < wanted and not dequantizer.node.domain:
            yield Problem(
                node=dequantizer.node,
                breaks=target == ONNX_RUNTIME,
                message=f"{dequantizer.describe()} codes at opset {view.opset}, which does not have them; export with "
                f"opset {wanted} or later",
            )


def clip_before_rare_codes(view: View, target: str) -> Iterator[Problem]:
    """ONNX Runtime drops a Clip that a quantizer repeats, but knows no bounds of 4-bit integers and 8-bit floats.

    1. For ONNX Runtime: Clip in float32 before a QuantizeLinear to these, with a constant scale, breaks: the session
       does not load.
    2. Must not fire on 8-bit integers, on a Clip of the graph's input, nor behind Relu (merged with it before).
    """
    if target != ONNX_RUNTIME:
        return
    for node in view.quantizers:
        value, scale = node.inputs[0], node.inputs[1]
        clip = None if value is None else value.producer()
        if quantized_type(node) not in (*FOUR_BITS, *FLOAT8) or clip is None or clip.op_type != "Clip":
            continue
        before = None if clip.inputs[0] is None else clip.inputs[0].producer()
        constant_scale = scale is not None and is_constant(scale) and scale.dtype == ir.DataType.FLOAT
        if before is not None and before.op_type != "Relu" and constant_scale:
            yield Problem(
                node=node,
                breaks=True,
                message=f"Clip before a quantizer to {quantized_type(node).name.lower()}, which ONNX Runtime 1.32 "
                "fails to load; quantize to int8 behind the Clip",
            )


def mixed_codes(view: View, target: str) -> Iterator[Problem]:
    """Both operands of an integer product have codes of one type.

    1. For TensorRT: different types break a convolution (unless scales along the sum keep it in float); with constant
       scales they break a MatMul or Gemm if one is an 8-bit float, or if both have one scale.
    2. Else, for TensorRT, a warning: the product runs in float.
    3. Must not fire where types agree, on other targets, nor on integers with scales by block.
    """
    if target not in TENSORRT:
        return
    for product in view.products:
        if not product.both_quantized():
            continue
        first, second = product.dequantizers
        kinds = {as_tensorrt_reads(first), as_tensorrt_reads(second)}
        float8 = any(kind in FLOAT8 for kind in kinds)
        blocks = "block" in (first.granularity, second.granularity)
        if len(kinds) == 1 or (blocks and not float8):
            continue
        one_scale = first.granularity == second.granularity == "tensor"
        outside = any(product.along_the_sum(operand) for operand in product.operands if operand.is_weight)
        yield Problem(
            node=product.node,
            breaks=(product.is_convolution and not outside)
            or ((float8 or one_scale) and has_constant_scales(product)),
            message=f"operands are {first.describe()} and {second.describe()}; use int8 for both",
        )


def as_tensorrt_reads(dequantizer: Dequantizer) -> ir.DataType | None:
    """The type of codes in TensorRT, which makes int8 of an activation's uint8."""
    unsigned = dequantizer.kind == ir.DataType.UINT8 and dequantizer.origin == "quantized"
    return ir.DataType.INT8 if unsigned else dequantizer.kind


def has_constant_scales(product: Product) -> bool:
    """Whether every scale around a product is known before anything runs."""
    scales = [node.inputs[1] for node in product.nodes() if node.op_type in (QUANTIZE, DEQUANTIZE)]
    return all(scale is None or is_constant(scale) for scale in scales)

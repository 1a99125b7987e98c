"""OpenVINO on the CPU at precision f32, as its execution graphs show (version 2026.4, see ``docs/lint.md``)."""

from __future__ import annotations

import onnx_ir as ir

from quest_deploy.export.lint.execution.common import (
    has_zero_point,
    is_four_bit_matrix,
    missing_codes,
    obstacles,
    outside,
    side,
    stored_weight_alone,
)
from quest_deploy.export.lint.report import Execution
from quest_deploy.export.lint.view import FLOAT8, FOUR_BITS, Operand, Product, View


def in_openvino(product: Product, view: View) -> tuple[Execution, tuple[str, ...]]:
    """The primitive that a product becomes."""
    if product.node.op_type == "QLinearMatMul":
        return "int8", ()
    if reason := outside(product):
        return "float", (reason,)
    if product.both_quantized():
        reasons = tuple(float_reasons(product))
        return ("float", reasons) if reasons else ("int8", ())
    if is_four_bit_matrix(product) is not None:
        return "int4 storage", ()
    reasons = tuple(missing_codes(product))
    if (weight := stored_weight_alone(product)) is not None and weight.dequantizer is not None:
        bits = 4 if weight.dequantizer.kind in FOUR_BITS else 8
        reasons = (*reasons, f"the weight is stored in {bits} bits and dequantized")
    return "float", reasons


def float_reasons(product: Product) -> list[str]:
    """Why two quantized operands are multiplied in float all the same."""
    reasons = []
    for reason in obstacles(product, unsigned=True, cast=True):
        # Both are folded: scales by channel into a filter, scales by token behind a product, 4-bit codes into 8 bits.
        folded = "the activation has scales by channel" in reason and not along_the_sum(product)
        widened = product.is_convolution and "the activation is int4" in reason
        if not folded and not widened:
            reasons.append(reason)
    for operand in product.operands:
        if operand.dequantizer is not None and set(operand.dequantizer.codes_through) - {"Cast"}:
            reasons.append(f"the codes of {side(product, operand)} are moved before DequantizeLinear")
        if operand is not product.operands[0] and has_zero_point(operand):
            reasons.append(f"{side(product, operand)} has a zero-point that is not 0")
        elif operand is product.operands[1] and is_unsigned(operand):
            reasons.append(f"{side(product, operand)} is uint8, not int8")
        if operand.dequantizer is not None and operand.dequantizer.kind in FLOAT8:
            reasons.append(f"{side(product, operand)} is an 8-bit float")
    if product.weight is None and product.is_convolution:
        reasons.append("its filter is no constant")
    return list(dict.fromkeys(reasons))


def along_the_sum(product: Product) -> bool:
    """Whether the activation of a matrix product has its scales along the summed axis."""
    activation = product.operands[0]
    shape = activation.value.shape
    return product.node.op_type != "Conv" and shape is not None and activation.scale_axis() == len(shape) - 1


def is_unsigned(operand: Operand) -> bool:
    """Whether an operand's codes are uint8."""
    return operand.dequantizer is not None and operand.dequantizer.kind == ir.DataType.UINT8

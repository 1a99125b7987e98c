"""ONNX Runtime on the CPU, as its optimised graphs show (version 1.32, see ``docs/lint.md``)."""

from __future__ import annotations

import onnx_ir as ir

from quest_deploy.export.lint.execution.common import (
    is_constant_scale,
    missing_codes,
    obstacles,
    outside,
    stored_weight_alone,
)
from quest_deploy.export.lint.report import Execution
from quest_deploy.export.lint.view import (
    DEQUANTIZE,
    EIGHT_BITS,
    FOUR_BITS,
    QUANTIZE,
    Operand,
    Product,
    View,
    is_read_by,
)

_INTEGER_KERNELS = (
    *("QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger"),
    *("MatMulIntegerToFloat", "DynamicQuantizeMatMul"),
)


def in_onnx_runtime(product: Product, view: View) -> tuple[Execution, tuple[str, ...]]:
    """The kernel that a product is fused to."""
    kind = product.node.op_type
    if kind in _INTEGER_KERNELS:
        return "int8", ()
    if kind == "MatMulNBits":
        return "int4 storage", ()
    if reason := outside(product):
        return "float", (reason,)
    if product.both_quantized():
        reasons = tuple(float_reasons(product))
        return ("float", reasons) if reasons else ("int8", ())
    return weight_alone(product)


def float_reasons(product: Product) -> list[str]:
    """Why two quantized operands are multiplied in float all the same."""
    kind, node = product.node.op_type, product.node
    dynamic = kind == "MatMul"  # MatMulIntegerToFloat reads its scales when it runs
    reasons = [
        reason
        for reason in obstacles(product, unsigned=True, cast=False)
        if not (dynamic and reason.endswith("computed at run time"))
    ]
    if any(operand.value.dtype == ir.DataType.FLOAT16 for operand in product.operands):
        reasons.append("fp16 is computed in fp32 on the CPU")
    if kind == "Conv" and not is_quantized(node.outputs[0]):
        reasons.append("QLinearConv is fused only where the output is quantized, too")
    if kind in ("Gemm", "ConvTranspose", "Einsum"):
        reasons.append(f"{kind} has no integer kernel behind float quantizers")
    if kind == "MatMul" and product.operands[0].is_weight:
        reasons.append("the weight is the first operand")
    return reasons + shared_reasons(product)


def shared_reasons(product: Product) -> list[str]:
    """What keeps an activation's Q and DQ from being fused into a product."""
    reasons = []
    for operand in product.operands:
        dequantizer = operand.dequantizer
        if dequantizer is None or operand.is_weight:
            continue
        if len(dequantizer.node.outputs[0].uses()) > 1:
            reasons.append("its activation's DequantizeLinear has other readers; give each product its own")
        if dequantizer.codes_through:
            reasons.append(f"{dequantizer.codes_through[0]} lies between the activation's Q and DQ")
    return reasons


def is_quantized(value: ir.Value) -> bool:
    """Whether all that reads `value` is one QuantizeLinear with a DequantizeLinear behind it."""
    uses = list(value.uses())
    return [use.node.op_type for use in uses] == [QUANTIZE] and is_read_by(
        uses[0].node.outputs[0], DEQUANTIZE
    )


def weight_alone(product: Product) -> tuple[Execution, tuple[str, ...]]:
    """MatMulNBits, where only the weight has codes."""
    reasons = tuple(missing_codes(product))
    weight = stored_weight_alone(product)
    if weight is None or weight.dequantizer is None:
        return "float", reasons
    bits = 4 if weight.dequantizer.kind in FOUR_BITS else 8
    if not takes_n_bits(product, weight):
        return "float", (*reasons, f"the {bits}-bit weight is dequantized on every run")
    if weight.dequantizer.kind in FOUR_BITS:
        return "int4 storage", ("fused to MatMulNBits",)
    return "float", (*reasons, "fused to MatMulNBits, which keeps the weight in 8 bits")


def takes_n_bits(product: Product, weight: Operand) -> bool:
    """Whether ONNX Runtime fuses a weight and its product to MatMulNBits."""
    dequantizer, kind = weight.dequantizer, product.node.op_type
    if dequantizer is None or dequantizer.kind not in (*FOUR_BITS, *EIGHT_BITS):
        return False
    if weight is not product.operands[1] or weight.through or not is_constant_scale(weight):
        return False
    rank = None if weight.value.shape is None else len(weight.value.shape)
    transposed = kind == "Gemm" and product.channel_axis(weight) == 0
    along = weight.scale_axis()
    wanted = {"tensor": (along,), "channel": (1,), "block": (0,)}[dequantizer.granularity]
    shared = len(dequantizer.node.outputs[0].uses()) > 1
    return kind in ("MatMul", "Gemm") and rank == 2 and along in wanted and not transposed and not shared

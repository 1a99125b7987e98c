"""What every runtime wants of an integer product."""

from __future__ import annotations

from collections.abc import Iterator

from quest_deploy.export.lint.macs import ATTENTIONS
from quest_deploy.export.lint.view import (
    EIGHT_BITS,
    FOUR_BITS,
    FUSED_PRODUCTS,
    INTEGER_PRODUCTS,
    MATRIX_PRODUCTS,
    Operand,
    Product,
    constant,
    is_constant,
)


def outside(product: Product) -> str | None:
    """Why a product is float whatever its operands are."""
    kind = product.node.op_type
    if kind in ATTENTIONS:
        return f"the {kind} operator computes in float; quantizers go between MatMul and Softmax"
    if kind in (*INTEGER_PRODUCTS, *FUSED_PRODUCTS) or len(product.operands) < 2:
        return f"{kind} is not looked into"
    return None


def missing_codes(product: Product) -> Iterator[str]:
    """Operands that have no codes."""
    if not product.dequantizers:
        yield "nothing is quantized"
        return
    for operand in product.operands:
        if operand.dequantizer is None:
            yield f"{side(product, operand)} is not quantized"


def obstacles(product: Product, *, unsigned: bool, cast: bool) -> Iterator[str]:
    """What keeps a product of two quantized operands from an 8-bit integer kernel on any runtime.

    Args:
        product: With both operands quantized.
        unsigned: Whether uint8 codes are taken.
        cast: Whether a Cast may lie between DequantizeLinear and the product.
    """
    for operand in product.operands:
        dequantizer = operand.dequantizer
        if dequantizer is None:
            continue
        name = side(product, operand)
        kinds = EIGHT_BITS if unsigned else EIGHT_BITS[:1]
        if dequantizer.kind not in kinds:
            yield f"{name} is {dequantizer.describe()}, not int8"
        if not is_constant_scale(operand):
            yield f"the scale of {name} is computed at run time"
        if not has_constant_zero_point(operand):
            yield f"the zero-point of {name} is computed at run time"
        if dequantizer.origin in ("external", "computed"):
            yield f"the codes of {name} do not come from a QuantizeLinear"
        if not operand.is_weight and dequantizer.granularity != "tensor":
            yield f"{name} has scales by {dequantizer.granularity}"
        if operand.is_weight and not scale_leaves_the_sum(product, operand):
            yield f"the scales of {name} do not lie along its output channels"
        if not cast and any(node.op_type == "Cast" for node in operand.through):
            yield f"a Cast lies between DequantizeLinear and {name}"


def side(product: Product, operand: Operand) -> str:
    """What to call an operand in a reason."""
    if operand.is_weight:
        return "the weight"
    others = [other for other in product.operands if other is not operand and not other.is_weight]
    if not others:
        return "the activation"
    return "the first operand" if operand is product.operands[0] else "the second operand"


def is_constant_scale(operand: Operand) -> bool:
    """Whether the scales of an operand's quantizers are known before anything runs."""
    dequantizer = operand.dequantizer
    if dequantizer is None:
        return False
    nodes = [dequantizer.node] + ([dequantizer.quantizer] if dequantizer.quantizer is not None else [])
    return all(node.inputs[1] is not None and is_constant(node.inputs[1]) for node in nodes)


def scale_leaves_the_sum(product: Product, operand: Operand) -> bool:
    """Whether a weight has one scale, or one for each output channel; unknown axes count as right."""
    dequantizer = operand.dequantizer
    if dequantizer is None or dequantizer.granularity == "tensor":
        return True
    axis, wanted = operand.scale_axis(), product.channel_axis(operand)
    return dequantizer.granularity == "channel" and (axis is None or wanted is None or axis == wanted)


def has_constant_zero_point(operand: Operand) -> bool:
    """Whether an operand has no zero-point, or one that is known before anything runs."""
    if operand.dequantizer is None or len(operand.dequantizer.node.inputs) < 3:
        return True
    point = operand.dequantizer.node.inputs[2]
    return point is None or is_constant(point)


def has_zero_point(operand: Operand) -> bool:
    """Whether a constant zero-point is not 0."""
    if operand.dequantizer is None or len(operand.dequantizer.node.inputs) < 3:
        return False
    point = constant(operand.dequantizer.node.inputs[2])
    return point is not None and bool(point.any())


def stored_weight_alone(product: Product) -> Operand | None:
    """The weight of a product that has codes while the activation is float."""
    weight = product.weight
    if weight is None or weight.dequantizer is None or len(product.dequantizers) != 1:
        return None
    return weight if weight.dequantizer.origin == "stored" else None


def is_four_bit_matrix(product: Product) -> Operand | None:
    """A MatMul's or Gemm's 4-bit weight that meets a float activation."""
    weight = stored_weight_alone(product)
    if weight is None or weight.dequantizer is None or product.node.op_type not in MATRIX_PRODUCTS:
        return None
    return weight if weight.dequantizer.kind in FOUR_BITS else None

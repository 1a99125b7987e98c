"""Weights with a scale for every block of elements."""

from __future__ import annotations

from collections.abc import Iterator

from quest_deploy.export.lint.rules.four_bits import has_constant_scales, has_four_bits
from quest_deploy.export.lint.rules.problem import ONNX_RUNTIME, TENSORRT, TITLES, Problem
from quest_deploy.export.lint.rules.scales import is_fused_by_onnx_runtime
from quest_deploy.export.lint.view import (
    EIGHT_BITS,
    MATRIX_PRODUCTS,
    QUANTIZE,
    Dequantizer,
    Operand,
    Product,
    View,
    is_read_by,
)


def block_scale_of_weight(view: View, target: str) -> Iterator[Problem]:
    """Scales by block are for weights of MatMul and Gemm whose activation stays in float.

    1. TensorRT: breaks where the number of blocks does not divide their axis, where blocks do not lie along one of the
       last two axes, and where the activation is quantized, too (not in a Gemm that does not transpose the weight and
       has constant scales, nor with one block in all).
    2. TensorRT: other blocks that do not divide their axis are an error: it takes equal blocks.
    3. ONNX Runtime: breaks a product of 8-bit operands that it fuses all the same: an fp32 MatMul, and a Conv whose
       output is quantized.
    4. OpenVINO: breaks where blocks do not divide their axis, or do not lie along the summed axis.
    5. Must not fire on scales by channel.
    """
    for product in view.products:
        weight = product.weight
        dequantizer = None if weight is None else weight.dequantizer
        if weight is None or dequantizer is None or not has_blocks(dequantizer):
            continue
        what = f"the weight of '{product.node.name}' has a scale for every {dequantizer.block_size} elements"
        if target in TENSORRT:
            problem = tensorrt_problem(product, dequantizer)
        elif target == ONNX_RUNTIME:
            problem = onnx_runtime_problem(product, dequantizer)
        else:
            problem = openvino_problem(product, weight, dequantizer)
        if problem is not None:
            yield Problem(node=dequantizer.node, breaks=True, message=f"{what}, {problem}")
        elif target in TENSORRT and not divides(dequantizer):
            yield Problem(
                node=dequantizer.node,
                severity="error",
                message=f"{what}, which do not divide its axis: {TITLES[target]} takes equal blocks and computes other "
                "numbers; keep such a layer in int8",
            )


def tensorrt_problem(product: Product, dequantizer: Dequantizer) -> str | None:
    """Why TensorRT refuses a weight with blocks, if it does."""
    codes, axis = dequantizer.node.inputs[0], dequantizer.axis
    rank = None if codes is None or codes.shape is None else len(codes.shape)
    if rank is not None and axis is not None and axis < rank - 2:
        return f"along axis {axis}, TensorRT takes the last two; use scales by output channel"
    size, blocks = axis_sizes(dequantizer)
    if size and blocks and size % blocks:
        return f"{blocks} blocks on {size} elements; use a block size that divides them"
    weight = product.weight
    plain_gemm = product.node.op_type == "Gemm" and weight is not None and product.channel_axis(weight) == 1
    plain_gemm = plain_gemm and has_constant_scales(product)
    if product.both_quantized() and blocks != 1 and not plain_gemm:
        return "which goes with float activations only; use scales by output channel"
    return None


def onnx_runtime_problem(product: Product, dequantizer: Dequantizer) -> str | None:
    """Why ONNX Runtime fails to run a product with such a weight, if it does."""
    if axis_sizes(dequantizer)[1] == 1:  # as good as a channel
        return None
    kinds = {dequantizer.kind for dequantizer in product.dequantizers}
    convolution = (
        product.node.op_type == "Conv"
        and product.both_quantized()
        and kinds <= set(EIGHT_BITS)
        and is_read_by(product.node.outputs[0], QUANTIZE)
    )
    if convolution or is_fused_by_onnx_runtime(product):
        return "and a quantized activation, which fails when it runs; use scales by output channel"
    return None


def openvino_problem(product: Product, weight: Operand, dequantizer: Dequantizer) -> str | None:
    """Why OpenVINO refuses a weight with blocks, if it does."""
    if product.node.op_type not in MATRIX_PRODUCTS:
        return None
    if not divides(dequantizer):
        return "which do not divide its axis; use a block size that does"
    wanted = product.channel_axis(weight)
    if wanted is not None and weight.scale_axis() == wanted:
        return "along its output channels; lay the blocks along the summed axis"
    return None


def has_blocks(dequantizer: Dequantizer | None) -> bool:
    """Whether scales are by block."""
    return dequantizer is not None and dequantizer.granularity == "block"


def divides(dequantizer: Dequantizer) -> bool:
    """Whether blocks divide their axis, as far as shapes are known."""
    size, _ = axis_sizes(dequantizer)
    return size is None or size % dequantizer.block_size == 0


def axis_sizes(dequantizer: Dequantizer) -> tuple[int | None, int | None]:
    """Elements and scales along the axis of blocks."""
    axis = dequantizer.axis
    sizes: list[int | None] = []
    for value in dequantizer.node.inputs[:2]:
        shape = None if value is None else value.shape
        size = shape[axis] if shape is not None and axis is not None and axis < len(shape) else None
        sizes.append(size if isinstance(size, int) else None)
    return sizes[0], sizes[1]


def four_bit_weight_on_the_left(view: View, target: str) -> Iterator[Problem]:
    """TensorRT wants a block-quantized weight on the right.

    1. For TensorRT: a 4-bit weight with block scales as first operand breaks (its builder's process dies).
    2. Must not fire on scales by channel, nor on int8.
    """
    if target not in TENSORRT:
        return
    for product in view.products:
        if product.node.op_type not in MATRIX_PRODUCTS or not product.operands:
            continue
        first = product.operands[0]
        if first.is_weight and has_four_bits(first) and has_blocks(first.dequantizer):
            yield Problem(
                node=product.node,
                breaks=True,
                message="a 4-bit weight with block scales is the first operand; transpose the product",
            )


def four_bit_weight_shared(view: View, target: str) -> Iterator[Problem]:
    """One block-quantized weight for two activations.

    1. For TensorRT: stored 4-bit codes with block scales that meet different activations break: the builder's process
       died in most such graphs (not in all: a Concat of the two products along the first axis builds).
    2. Must not fire where the products share their activation, too.
    """
    if target not in TENSORRT:
        return
    activations: dict[int, set[int]] = {}
    for product in view.products:
        weight = product.weight
        if product.node.op_type not in MATRIX_PRODUCTS or weight is None or weight.dequantizer is None:
            continue
        if not has_four_bits(weight) or not has_blocks(weight.dequantizer):
            continue
        partners = activations.setdefault(id(weight.dequantizer.node.inputs[0]), set())
        partners |= {id(operand.value) for operand in product.operands if operand is not weight}
        if len(partners) > 1:
            yield Problem(
                node=product.node,
                breaks=True,
                message="its 4-bit weight with block scales meets another activation elsewhere, too; store the weight "
                "twice, or keep it in int8",
            )

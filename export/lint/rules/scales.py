"""Scales: values, types, shapes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from quest_deploy.export.lint.rules.problem import ONNX_RUNTIME, OPENVINO, TENSORRT, TITLES, Problem
from quest_deploy.export.lint.view import (
    CONVOLUTIONS,
    EIGHT_BITS,
    QUANTIZE,
    Operand,
    Product,
    View,
    axis_of,
    constant,
    integer,
    is_constant,
    is_read_by,
    size_of,
)


def invalid_scale(view: View, target: str) -> Iterator[Problem]:
    """A scale is a positive, finite number.

    1. Zero, negative and NaN scales break TensorRT; elsewhere they are errors, as what is computed has no meaning.
    2. Infinite scales are errors; every runtime takes them.
    3. Must not fire on a scale that is no constant.
    """
    for node in view.linear_nodes:
        scale = constant(node.inputs[1])
        if scale is None:
            continue
        numbers = scale.astype(np.float64)
        refused = ~(numbers > 0)
        bad = refused | np.isinf(numbers)
        if np.any(bad):
            value = numbers.ravel()[np.flatnonzero(bad)[0]]
            yield Problem(
                node=node,
                severity="error",
                breaks=target in TENSORRT and bool(np.any(refused)),
                message=f"{int(bad.sum())} of {numbers.size} scales are no positive numbers (the first is {value:g}); "
                "calibrate this layer again",
            )


def dynamic_scale(view: View, target: str) -> Iterator[Problem]:
    """A scale must be a constant for an integer kernel.

    1. Fires on Q or DQ whose scale does not follow from constants.
    2. Breaks TensorRT where a convolution has both operands quantized; else a warning.
    3. Must not fire on a scale computed from constants alone.
    """
    for node in view.linear_nodes:
        scale = node.inputs[1]
        if scale is None or is_constant(scale):
            continue
        breaks = target in TENSORRT and any(
            product.is_convolution and product.both_quantized() for product in view.readers.get(id(node), ())
        )
        yield Problem(
            node=node,
            breaks=breaks,
            message="the scale is computed at run time; multiply by r before a quantizer with a constant scale and "
            "divide behind the product instead",
        )


def scale_count(view: View, target: str) -> Iterator[Problem]:
    """As many scales as channels.

    1. Fires where a vector of scales is not as long as the axis it belongs to; breaks every target.
    2. Must not fire on one scale, on blocks, or where a shape is unknown.
    """
    for node in view.linear_nodes:
        value, scale, axis = node.inputs[0], node.inputs[1], axis_of(node)
        elements = None if scale is None else size_of(scale)
        if elements in (None, 1) or integer(node, "block_size", 0) or value is None or value.shape is None:
            continue
        if axis is None or axis >= len(value.shape) or value.shape[axis] != elements:
            size = value.shape[axis] if axis is not None and axis < len(value.shape) else "no such axis"
            if isinstance(size, ir.SymbolicDim):
                continue
            yield Problem(
                node=node,
                breaks=True,
                message=f"{elements} scales along axis {axis}, which has {size}; expected one scale a channel",
            )


def scale_opset(view: View, target: str) -> Iterator[Problem]:
    """Scales by channel came with operator set 13, other float types with 19, blocks with 21.

    1. More than one scale before opset 13, and blocks before 21, break ONNX Runtime and OpenVINO.
    2. Scales that are not float32, before opset 19, break ONNX Runtime.
    3. Must not fire on TensorRT, which takes all of them at any opset, nor on nodes of ONNX Runtime's own domain.
    """
    if target in TENSORRT or view.opset >= 21:
        return
    for node in view.linear_nodes:
        scale = node.inputs[1]
        if scale is None or node.domain:
            continue
        if view.opset < 13 and size_of(scale) not in (None, 1):
            wanted, what = 13, "scales by channel"
        elif integer(node, "block_size", 0):
            wanted, what = 21, "scales by block"
        elif view.opset < 19 and scale.dtype not in (None, ir.DataType.FLOAT) and target == ONNX_RUNTIME:
            wanted, what = 19, f"{scale.dtype.name.lower()} scales"
        else:
            continue
        yield Problem(
            node=node,
            breaks=True,
            message=f"{what} at opset {view.opset}, which does not have them; export with opset {wanted} or later",
        )


def scale_type(view: View, target: str) -> Iterator[Problem]:
    """Types must agree around a quantizer.

    1. A product whose operands are of different float types breaks every target: DequantizeLinear gives its scale's
       type, unless (from opset 23) `output_dtype` says otherwise.
    2. From opset 19 to 22, a scale of another type than the data breaks ONNX Runtime.
    3. A double scale breaks ONNX Runtime and OpenVINO.
    4. Must not fire where a type is unknown.
    """
    for product in view.products:
        types = [operand.float_type for operand in product.operands]
        if target in TENSORRT:  # makes float32 of doubles
            types = [ir.DataType.FLOAT if kind == ir.DataType.DOUBLE else kind for kind in types]
        if len(types) >= 2 and None not in types and types[0] != types[1] and product.dequantizers:
            names = " and ".join(kind.name.lower() for kind in types[:2] if kind is not None)
            yield Problem(
                node=product.node,
                breaks=True,
                message=f"{product.node.op_type} of {names}: DequantizeLinear gives its scale's type; use scales of "
                "the data's type, or opset 23 with output_dtype",
            )
    for node in view.quantizers:
        data, scale = node.inputs[0], node.inputs[1]
        if data is None or scale is None or data.dtype is None or scale.dtype is None or node.domain:
            continue
        double = scale.dtype == ir.DataType.DOUBLE
        if double and target in (ONNX_RUNTIME, OPENVINO):
            yield Problem(node=node, breaks=True, message="the scale is a double; store it as float32")
        elif 19 <= view.opset < 23 and data.dtype != scale.dtype and target == ONNX_RUNTIME:
            yield Problem(
                node=node,
                breaks=True,
                message=f"a {scale.dtype.name.lower()} scale for {data.dtype.name.lower()} data needs opset 23, got "
                f"{view.opset}; put Casts around the quantizer, or export with opset 23",
            )


def mismatched_scales(view: View, target: str) -> Iterator[Problem]:
    """Q and the DQ behind it share one scale.

    1. Fires where both scales are constants and differ.
    2. Must not fire where either is unknown.
    """
    for dequantizer in view.dequantizers:
        if dequantizer.quantizer is None:
            continue
        first, second = constant(dequantizer.quantizer.inputs[1]), constant(dequantizer.node.inputs[1])
        if first is None or second is None or np.array_equal(first, second, equal_nan=True):
            continue
        yield Problem(
            node=dequantizer.node,
            message="its scale differs from its QuantizeLinear's, so that the pair also rescales; give both one scale",
        )


def weight_scale_axis(view: View, target: str) -> Iterator[Problem]:
    """Only a scale along the output channels leaves the sum.

    1. A weight with one scale for each channel of another axis cannot use an integer kernel: a warning.
    2. For ONNX Runtime it breaks a fp32 MatMul with an 8-bit activation, which is fused all the same and fails when it
       runs.
    3. Must not fire on one scale, on blocks, nor on weights alone (their activation in float).
    """
    for product, operand in quantized_weights(view):
        axis, wanted = operand.scale_axis(), product.channel_axis(operand)
        if operand.dequantizer is None or operand.dequantizer.granularity != "channel":
            continue
        if not product.along_the_sum(operand) or not product.both_quantized():
            continue
        yield Problem(
            node=operand.dequantizer.node,
            breaks=target == ONNX_RUNTIME and is_fused_by_onnx_runtime(product),
            message=f"scales lie along axis {axis} of the weight of '{product.node.name}', its output channels along "
            f"{wanted}: {TITLES[target]} cannot take them out of the sum; quantize along axis {wanted}",
        )


def activation_scale_granularity(view: View, target: str) -> Iterator[Problem]:
    """An integer product has one scale for its activation.

    1. A product with an activation that has scales by channel, token or block: a warning.
    2. Must not fire on weights, and not on OpenVINO's convolutions, which fold them into the weight.
    """
    for product in view.products:
        for operand in product.operands:
            dequantizer = operand.dequantizer
            if dequantizer is None or operand.is_weight or dequantizer.granularity == "tensor":
                continue
            if target == OPENVINO and product.node.op_type in CONVOLUTIONS:
                continue
            yield Problem(
                node=dequantizer.node,
                message=f"the activation of '{product.node.name}' has scales by {dequantizer.granularity}, an integer "
                "product takes one; fold the rows into the weight and keep one scale",
            )


def quantized_weights(view: View) -> Iterator[tuple[Product, Operand]]:
    """Every product's constant operand that comes from codes."""
    for product in view.products:
        weight = product.weight
        if weight is not None and weight.dequantizer is not None:
            yield product, weight


def is_fused_by_onnx_runtime(product: Product) -> bool:
    """Whether ONNX Runtime makes one node of Q, DQ and MatMul without a look at the shape of the weight's scale."""
    weight = product.weight
    return (
        product.node.op_type == "MatMul"
        and product.both_quantized()
        and weight is product.operands[1]
        and all(dequantizer.kind in EIGHT_BITS for dequantizer in product.dequantizers)
        and all(operand.float_type == ir.DataType.FLOAT for operand in product.operands)
        and not is_read_by(product.node.outputs[0], QUANTIZE)
    )

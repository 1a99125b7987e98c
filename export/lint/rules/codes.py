"""Zero-points and types of codes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from quest_deploy.export.lint.rules.problem import ONNX_RUNTIME, TENSORRT, TITLES, Problem
from quest_deploy.export.lint.view import FOUR_BITS, QUANTIZE, View, constant, integer, quantized_type

_READ_BY_TENSORRT = {
    ir.DataType.INT8,
    ir.DataType.INT4,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT4E2M1,
    # Rules of their own.
    ir.DataType.UINT8,
    ir.DataType.INT32,
}


def zero_point_of(node: ir.Node) -> ir.Value | None:
    """The third input of Q or DQ."""
    return node.inputs[2] if len(node.inputs) > 2 else None


def nonzero_zero_point(view: View, target: str) -> Iterator[Problem]:
    """TensorRT takes zero-point 0 only.

    1. For TensorRT: a constant zero-point of Q or DQ with an element that is not 0 breaks.
    2. Must not fire on other targets, nor on zero-points of 0 or none.
    """
    if target not in TENSORRT:
        return
    for node in view.linear_nodes:
        point = constant(zero_point_of(node))
        if point is not None and np.any(point.astype(np.float32) != 0):
            value = point.ravel()[np.flatnonzero(point.astype(np.float32))[0]]
            yield Problem(
                node=node,
                breaks=True,
                message=f"zero-point {value}, {TITLES[target]} takes 0 only; quantize symmetrically, or put a Clip "
                "before an int8 quantizer with zero-point 0",
            )


def dynamic_zero_point(view: View, target: str) -> Iterator[Problem]:
    """A zero-point must be known when an engine is built.

    1. Fires on a zero-point that no constant gives: breaks TensorRT, keeps the product in float elsewhere.
    2. Must not fire on initializers and Constant nodes.
    """
    for node in view.linear_nodes:
        point = zero_point_of(node)
        if point is not None and constant(point) is None and not point.is_initializer():
            yield Problem(
                node=node,
                breaks=target in TENSORRT,
                message="the zero-point is computed at run time; make it a constant 0",
            )


def unsigned_codes(view: View, target: str) -> Iterator[Problem]:
    """TensorRT has no unsigned codes: it reads them as signed ones, or not at all.

    1. For TensorRT: a QuantizeLinear to uint8 is an error, since codes above 127 saturate; so is one without
       zero-point and `output_dtype`, which is uint8 by the standard.
    2. For TensorRT: a QuantizeLinear that is told so by `output_dtype` alone breaks, as does a DequantizeLinear of
       stored or incoming uint8 codes.
    3. Must not fire on other targets, nor where `nonzero_zero_point` fires.
    """
    if target not in TENSORRT:
        return
    for node in view.quantizers:
        point = constant(zero_point_of(node))
        if quantized_type(node) == ir.DataType.UINT8 and (point is None or not np.any(point)):
            yield Problem(
                node=node,
                severity="error",
                breaks=zero_point_of(node) is None and integer(node, "output_dtype", 0) != 0,
                message=f"codes are uint8, which {TITLES[target]} reads as int8, so that values above 127 scales "
                "saturate; quantize to int8 with zero-point 0",
            )
    for dequantizer in view.dequantizers:
        if dequantizer.kind == ir.DataType.UINT8 and dequantizer.origin != "quantized":
            yield Problem(
                node=dequantizer.node,
                breaks=True,
                message=f"{dequantizer.origin} uint8 codes, which {TITLES[target]} does not read; store int8 codes",
            )


def unsupported_codes(view: View, target: str) -> Iterator[Problem]:
    """TensorRT reads int8, int4 and 8-bit floats.

    1. For TensorRT: Q or DQ of another type (uint4, int16, uint16) breaks.
    2. Must not fire on int8 and int4, nor on uint8 and int32, which have rules of their own.
    """
    if target not in TENSORRT:
        return
    kinds = {id(item.node): item.kind for item in view.dequantizers}
    for node in view.linear_nodes:
        kind = quantized_type(node) if node.op_type == QUANTIZE else kinds[id(node)]
        if kind is not None and kind not in _READ_BY_TENSORRT:
            yield Problem(
                node=node,
                breaks=True,
                message=f"codes are {kind.name.lower()}, {TITLES[target]} takes int8 (and int4 weights)",
            )


def int32_codes(view: View, target: str) -> Iterator[Problem]:
    """TensorRT does not dequantize int32, which ONNX Runtime's quantizer makes of biases.

    1. For TensorRT: a DequantizeLinear of int32 breaks.
    2. Must not fire on other targets.
    """
    if target not in TENSORRT:
        return
    for dequantizer in view.dequantizers:
        if dequantizer.kind == ir.DataType.INT32:
            yield Problem(
                node=dequantizer.node,
                breaks=True,
                message=f"int32 codes (a quantized bias), which {TITLES[target]} does not take; keep biases in float "
                "(ONNX Runtime's quantizer: extra option QuantizeBias=False)",
            )


def cast_codes(view: View, target: str) -> Iterator[Problem]:
    """Packed weights are unpacked by a Cast in the form for ONNX Runtime.

    1. For TensorRT: a Cast of stored 4-bit codes before DequantizeLinear breaks.
    2. Must not fire on other targets.
    """
    if target not in TENSORRT:
        return
    for dequantizer in view.dequantizers:
        if "Cast" in dequantizer.codes_through and dequantizer.stored_kind in FOUR_BITS:
            yield Problem(
                node=dequantizer.node,
                breaks=True,
                message=f"4-bit codes are cast to 8 bits, the form for ONNX Runtime; export with --target {target}",
            )


def moved_codes(view: View, target: str) -> Iterator[Problem]:
    """Stored codes must stand right before their DequantizeLinear.

    1. For TensorRT: an operator (Transpose, Reshape, Gather) between stored codes and DequantizeLinear breaks.
    2. For ONNX Runtime: a warning where codes of an activation are moved, as the product then stays in float.
    3. Must not fire on a Cast, which has a rule of its own.
    """
    for dequantizer in view.dequantizers:
        moved = [step for step in dequantizer.codes_through if step != "Cast"]
        if not moved:
            continue
        if target in TENSORRT and dequantizer.origin == "stored":
            yield Problem(
                node=dequantizer.node,
                breaks=True,
                message=f"{moved[0]} of stored codes before DequantizeLinear, which {TITLES[target]} refuses; "
                "store the codes as the product needs them",
            )
        elif target == ONNX_RUNTIME and dequantizer.origin == "quantized":
            yield Problem(
                node=dequantizer.node,
                message=f"{moved[0]} between QuantizeLinear and DequantizeLinear; move it before the quantizer",
            )

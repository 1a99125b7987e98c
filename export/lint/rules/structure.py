"""Operators and how quantizers are placed among them."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from quest_deploy.export.lint.rules.problem import ONNX_RUNTIME, OPENVINO, TENSORRT, TITLES, Problem
from quest_deploy.export.lint.view import (
    DEQUANTIZE,
    INTEGER_PRODUCTS,
    MOVES,
    QUANTIZE,
    View,
    integer,
    is_constant,
    walk_up,
)

# The smallest head that TensorRT for RTX has an attention kernel for (8 was refused, 16 to 256 were taken).
_SMALLEST_HEAD = 16
# Operators that ONNX Runtime's CPU provider has no bfloat16 kernel for (tried); a Clip without bounds is dropped.
_NO_BFLOAT16 = frozenset(
    (
        *("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Equal", "Greater", "Less", "Neg", "Abs", "Floor"),
        *(
            "Exp",
            "Log",
            "Sqrt",
            "Reciprocal",
            "Sin",
            "Cos",
            "Erf",
            "Tanh",
            "Sigmoid",
            "Relu",
            "HardSwish",
            "Gelu",
        ),
        *(
            "Softplus",
            "Softmax",
            "ReduceMean",
            "ReduceSum",
            "Expand",
            "GroupNormalization",
            "InstanceNormalization",
        ),
        "Resize",
    )
)
# ONNX Runtime's own operators that the parser of TensorRT for RTX 1.7 knows: asked of it by name.
_MICROSOFT = "com.microsoft"
_KNOWN_OF_MICROSOFT = frozenset(
    (
        *(QUANTIZE, DEQUANTIZE, "MultiHeadAttention", "GroupQueryAttention", "RotaryEmbedding", "Gelu"),
        *("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization"),
    )
)
# And of the standard's, those that it does not know and exporters of networks write.
_UNKNOWN_TO_TENSORRT = frozenset(
    (
        *("BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CumProd", "Compress", "Unique"),
        *("SequenceConstruct", "SequenceAt", "SequenceInsert", "SplitToSequence", "ConcatFromSequence"),
        *("Bernoulli", "Multinomial", "DFT", "Det", "DeformConv", "AffineGrid", "CenterCropPad", "Col2Im"),
        *("MaxUnpool", "MaxRoiPool", "Optional", "OptionalGetElement", "OptionalHasElement"),
    )
)
# What ONNX Runtime's optimizer writes for its CUDA provider: its CPU provider refuses all of them, OpenVINO some.
_FOR_CUDA = {
    ONNX_RUNTIME: frozenset(("NhwcConv", "GroupNorm", "SkipGroupNorm", "BiasSplitGelu", "BiasAdd")),
    OPENVINO: frozenset(("NhwcConv", "SkipGroupNorm", "BiasSplitGelu")),
}
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def unsupported_operator(view: View, target: str) -> Iterator[Problem]:
    """Operators that hold their own quantization, and others that the target does not know.

    1. QLinearConv, QLinearMatMul, ConvInteger, MatMulInteger, DynamicQuantizeLinear and MatMulNBits break TensorRT.
    2. For TensorRT, so do ONNX Runtime's own operators, which its optimizer writes, but for a few; and sequences,
       operators on bits and others of the standard.
    3. QLinearConv breaks OpenVINO.
    4. For ONNX Runtime on the CPU, and OpenVINO, operators that its optimizer writes for CUDA break.
    5. Must not fire on Q and DQ, in ONNX Runtime's own domain or not, nor on MultiHeadAttention.
    """
    refused: tuple[str, ...] = ()
    on_cpu = " on the CPU" if target == ONNX_RUNTIME else ""
    if target in TENSORRT:
        refused = (*INTEGER_PRODUCTS, "DynamicQuantizeLinear")
    elif target == OPENVINO:
        refused = ("QLinearConv",)
    for node in view.model.graph.all_nodes():
        if node.op_type in refused:
            yield Problem(
                node=node,
                breaks=True,
                message=f"{node.op_type}, which {TITLES[target]} does not take; quantize with Q/DQ nodes instead "
                "(ONNX Runtime's quantizer: static, quant_format QDQ)",
            )
        elif is_unknown(node, target):
            yield Problem(
                node=node,
                breaks=True,
                message=f"{node.op_type}, which {TITLES[target]}{on_cpu} does not know; export the model "
                + (
                    "as ONNX Runtime's optimizer has not changed it"
                    if node.domain
                    else "without this operator"
                ),
            )


def is_unknown(node: ir.Node, target: str) -> bool:
    """Whether a target has no operator of this name and domain."""
    if node.domain == _MICROSOFT:
        if target in TENSORRT:
            return node.op_type not in _KNOWN_OF_MICROSOFT
        return node.op_type in _FOR_CUDA[target]
    return target in TENSORRT and not node.domain and node.op_type in _UNKNOWN_TO_TENSORRT


def unsupported_type(view: View, target: str) -> Iterator[Problem]:
    """ONNX Runtime's CPU kernels do not compute in bfloat16, and misread a type that is given twice.

    1. For ONNX Runtime: a product, Q, DQ, and arithmetic of bfloat16 break; what only moves or casts values does not.
    2. For ONNX Runtime: a QuantizeLinear with both a zero-point and `output_dtype` int8 breaks.
    3. Must not fire on other targets.
    """
    if target != ONNX_RUNTIME:
        return
    nodes = [product.node for product in view.products if product.node.op_type not in INTEGER_PRODUCTS]
    others = [
        node
        for node in view.model.graph.all_nodes()
        if node.op_type in _NO_BFLOAT16 or (node.op_type == "Clip" and len(node.inputs) > 1)
    ]
    for node in (*nodes, *view.linear_nodes, *others):
        values = (*node.inputs[:2], *node.outputs)
        if any(value is not None and value.dtype == ir.DataType.BFLOAT16 for value in values):
            yield Problem(
                node=node,
                breaks=True,
                message=f"{node.op_type} in bfloat16, for which ONNX Runtime has no CPU kernel; export as fp32",
            )
    for node in view.quantizers:
        if len(node.inputs) > 2 and integer(node, "output_dtype", 0) == ir.DataType.INT8:
            yield Problem(
                node=node,
                breaks=True,
                message="both a zero-point and output_dtype give the codes' type, which ONNX Runtime refuses; drop one",
            )


def attention_operator(view: View, target: str) -> Iterator[Problem]:
    """The Attention operator of opset 23 is one kernel, or nothing.

    1. For TensorRT: breaks in float32, and with heads smaller than 16.
    2. Must not fire on attention made of MatMul and Softmax, nor on ONNX Runtime's MultiHeadAttention.
    """
    if target not in TENSORRT:
        return
    for product in view.products:
        if product.node.op_type != "Attention":
            continue
        query = product.operands[0].value
        size = query.shape[-1] if query.shape is not None and len(query.shape) == 4 else None
        small = isinstance(size, int) and size < _SMALLEST_HEAD
        if query.dtype not in (None, *_HALVES) or small:
            what = f"heads of {size}" if small else str(query.dtype.name.lower() if query.dtype else "?")
            yield Problem(
                node=product.node,
                breaks=True,
                message=f"Attention with {what}: {TITLES[target]} has kernels for fp16 and bf16 with heads of at least "
                f"{_SMALLEST_HEAD}; export with opset 21, which writes MatMul and Softmax",
            )


def quantize_without_dequantize(view: View, target: str) -> Iterator[Problem]:
    """Codes are for products, not for other operators.

    1. Fires where codes leave the graph, or are read by something else than DequantizeLinear.
    2. Must not fire where operators that only move values lie in between.
    """
    for node in view.quantizers:
        if others := readers_of_codes(node.outputs[0]):
            yield Problem(
                node=node,
                message=f"its codes are read by {', '.join(sorted(others))} without a DequantizeLinear; no kernel is "
                "fused with it",
            )


def readers_of_codes(codes: ir.Value) -> set[str]:
    """What reads codes, beside DequantizeLinear and products of integers."""
    found: set[str] = {"the graph's output"} if codes.is_graph_output() else set()
    for use in codes.uses():
        if use.node.op_type in MOVES:
            found |= readers_of_codes(use.node.outputs[0])
        elif use.node.op_type != DEQUANTIZE and use.node.op_type not in INTEGER_PRODUCTS:
            found.add(use.node.op_type)
    return found


def dequantize_without_quantize(view: View, target: str) -> Iterator[Problem]:
    """Codes come from a quantizer or from storage.

    1. Fires where codes are an input of the graph, or computed.
    2. Must not fire on stored codes, nor on the output of an integer product.
    """
    for dequantizer in view.dequantizers:
        codes = dequantizer.node.inputs[0]
        producer = None if codes is None else codes.producer()
        if producer is not None and producer.op_type in INTEGER_PRODUCTS:
            continue
        if dequantizer.origin in ("external", "computed"):
            yield Problem(
                node=dequantizer.node,
                message=f"its codes are {dequantizer.origin}, not made by QuantizeLinear; whether they fit its scale "
                "is not known here",
            )


def moved_activation(view: View, target: str) -> Iterator[Problem]:
    """ONNX Runtime repeats quantizers behind operators that move values, with a fault from opset 21 on.

    1. For ONNX Runtime: from opset 21, int8 DequantizeLinear with a zero-point before Transpose, Reshape, Squeeze,
       Unsqueeze or Flatten breaks: the session does not load.
    2. Must not fire on weights, before opset 21, nor without a zero-point.
    """
    if target != ONNX_RUNTIME or view.opset < 21:
        return
    for dequantizer in view.dequantizers:
        node = dequantizer.node
        signed = dequantizer.kind == ir.DataType.INT8 and len(node.inputs) > 2
        if dequantizer.origin == "stored" or not signed:
            continue
        moves = sorted({use.node.op_type for use in node.outputs[0].uses()} & set(MOVES) - {"Identity"})
        if moves:
            yield Problem(
                node=node,
                breaks=True,
                message=f"{moves[0]} behind an int8 DequantizeLinear, which ONNX Runtime 1.32 fails to load at opset "
                f"{view.opset}; quantize behind the {moves[0]} instead",
            )


def float_branch(view: View, target: str) -> Iterator[Problem]:
    """Where quantized and float values meet between quantizers, the sum or concatenation runs in float.

    1. A hint where one input of an Add or Concat comes from DequantizeLinear, another is a float activation, and the
       result is quantized.
    2. Must not fire where all inputs are quantized or none is, nor on constants.
    """
    for node in view.model.graph.all_nodes():
        if node.op_type not in ("Add", "Concat") or not is_quantized_again(node.outputs[0]):
            continue
        inputs = [value for value in node.inputs if value is not None and not is_constant(value)]
        quantized = [comes_from_codes(value) for value in inputs]
        if any(quantized) and not all(quantized):
            name = inputs[quantized.index(False)].name
            yield Problem(
                node=node,
                severity="info",
                message=f"input '{name}' is float, another one is quantized; quantize both, so that the {node.op_type} "
                "can stay in int8",
            )


def comes_from_codes(value: ir.Value) -> bool:
    """Whether a DequantizeLinear gives `value`."""
    producer = walk_up(value)[0].producer()
    return producer is not None and producer.op_type == DEQUANTIZE


def is_quantized_again(value: ir.Value) -> bool:
    """Whether a QuantizeLinear reads `value`, behind a Clip or not."""
    return any(
        use.node.op_type == QUANTIZE
        or (use.node.op_type in ("Clip", "Relu", *MOVES) and is_quantized_again(use.node.outputs[0]))
        for use in value.uses()
    )


def float_stored_weight(view: View, target: str) -> Iterator[Problem]:
    """A quantized weight can be stored as codes.

    1. A hint where a constant float goes through Q and DQ into a product: the file holds it in full precision.
    2. Must not fire on stored codes.
    """
    for product in view.products:
        for operand in product.operands:
            dequantizer = operand.dequantizer
            if operand.is_weight and dequantizer is not None and dequantizer.quantizer is not None:
                yield Problem(
                    node=dequantizer.quantizer,
                    severity="info",
                    message=f"the weight of '{product.node.name}' is stored as floats before a quantizer; store codes",
                )


def dangling_input(view: View, target: str) -> Iterator[Problem]:
    """Every value comes from somewhere.

    1. Fires on a node that reads a value which no node, initializer or input of the graph gives; breaks every target.
    2. Must not fire on inputs left out.
    """
    for node in view.model.graph.all_nodes():
        for value in node.inputs:
            if value is None or value.producer() is not None:
                continue
            if not value.is_initializer() and not value.is_graph_input():
                yield Problem(
                    node=node,
                    breaks=True,
                    message=f"reads '{value.name}', which nothing in the graph gives; export it again",
                )

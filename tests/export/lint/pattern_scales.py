"""Scales, biases, operators that hold their own quantization, outputs, attention."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.export.lint.net import BFLOAT16, FLOAT, INT4, INT8, INT32, Net
from tests.export.lint.pattern_products import CONV, IMAGE, PATTERNS, ROWS, K, N, pattern

for _name, _value in {"zero": 0.0, "negative": -0.05, "nan": np.nan, "inf": np.inf}.items():

    def _bad_scale(value: float = _value) -> onnx.ModelProto:
        net = Net()
        x = net.quantize(net.input(IMAGE), scale=net.scale(value))
        return net.finish(net.op("Conv", x, net.weight(CONV)))

    def _bad_weight_scale(value: float = _value) -> onnx.ModelProto:
        net = Net()
        x = net.quantize(net.input(ROWS))
        scale = net.scale([0.01] * (N - 1) + [value])
        return net.finish(net.op("MatMul", x, net.op("DequantizeLinear", net.codes((K, N)), scale, axis=1)))

    PATTERNS[f"conv_scale_{_name}"] = _bad_scale
    PATTERNS[f"matmul_weight_scale_{_name}"] = _bad_weight_scale


@pattern
def conv_int32_bias() -> onnx.ModelProto:
    """What ONNX Runtime's quantizer writes."""
    net = Net()
    x = net.quantize(net.input(IMAGE))
    bias = net.op(
        "DequantizeLinear", net.constant(np.arange(16), INT32, "bias"), net.scale(np.full(16, 1e-3)), axis=0
    )
    return net.finish(net.op("Conv", x, net.weight(CONV), bias, pads=[1, 1, 1, 1]))


@pattern
def gemm_int32_bias() -> onnx.ModelProto:
    net = Net()
    x = net.quantize(net.input((6, K)))
    bias = net.op(
        "DequantizeLinear", net.constant(np.arange(N), INT32, "bias"), net.scale(np.full(N, 1e-3)), axis=0
    )
    return net.finish(net.op("Gemm", x, net.weight((N, K)), bias, transB=1))


@pattern
def conv_dynamic_scale() -> onnx.ModelProto:
    """The scale follows the data."""
    net = Net()
    x = net.input(IMAGE)
    peak = net.op("ReduceMax", net.op("Abs", x), keepdims=0)
    scale = net.op("Div", peak, net.constant(127.0, FLOAT))
    return net.finish(net.op("Conv", net.quantize(x, scale=scale), net.weight(CONV)))


@pattern
def conv_table_scale() -> onnx.ModelProto:
    """The scale is read from a table by the timestep: what the constant-scale lowering avoids."""
    net = Net()
    x, index = net.input(IMAGE), net.input((), "group", TensorProto.INT64)
    scale = net.op("Gather", net.scale([0.05, 0.04, 0.03]), index)
    return net.finish(net.op("Conv", net.quantize(x, scale=scale), net.weight(CONV)))


@pattern
def matmul_dynamic_scale() -> onnx.ModelProto:
    """One scale for the whole tensor, from the data."""
    net = Net()
    x = net.input(ROWS)
    scale = net.op("Div", net.op("ReduceMax", net.op("Abs", x), keepdims=0), net.constant(127.0, FLOAT))
    return net.finish(net.op("MatMul", net.quantize(x, scale=scale), net.weight((K, N), axis=1)))


@pattern
def matmul_dynamic_weight_scale() -> onnx.ModelProto:
    """Stored codes, but a scale that comes from outside."""
    net = Net()
    x, scale = net.quantize(net.input(ROWS)), net.input((N,), "scale")
    return net.finish(net.op("MatMul", x, net.op("DequantizeLinear", net.codes((K, N)), scale, axis=1)))


@pattern
def conv_computed_constant_scale() -> onnx.ModelProto:
    """A scale that is computed, but from constants alone."""
    net = Net()
    x = net.input(IMAGE)
    scale = net.op("Mul", net.scale(0.5), net.scale(0.1))
    return net.finish(net.op("Conv", net.quantize(x, scale=scale), net.weight(CONV)))


@pattern
def matmul_dynamic_quantize() -> onnx.ModelProto:
    """DynamicQuantizeLinear and MatMulInteger: ONNX Runtime's dynamic quantization."""
    net = Net()
    x = net.input(ROWS)
    net.nodes.append(
        helper.make_node("DynamicQuantizeLinear", [x], ["codes", "step", "point"], name="dynamic")
    )
    product = net.op("MatMulInteger", "codes", net.codes((K, N)), "point")
    product = net.op("Cast", product, to=FLOAT)
    return net.finish(net.op("Mul", product, net.op("Mul", "step", net.scale(0.01))))


@pattern
def qlinear_conv() -> onnx.ModelProto:
    """The operator form, which has no Q/DQ nodes around the product."""
    net = Net()
    scale, zero = net.scale(), net.constant(0, INT8, "zero")
    codes = net.op("QuantizeLinear", net.input(IMAGE), scale, zero)
    w = (net.codes(CONV), net.scale(np.full(16, 0.01)), net.constant(np.zeros(16), INT8, "zero"))
    product = net.op("QLinearConv", codes, scale, zero, *w, scale, zero)
    return net.finish(net.op("DequantizeLinear", product, scale, zero))


@pattern
def quantize_without_dequantize() -> onnx.ModelProto:
    """Codes leave the graph."""
    net = Net()
    x = net.op("Conv", net.quantize(net.input(IMAGE)), net.weight(CONV))
    return net.finish(net.op("QuantizeLinear", x, net.scale(), net.constant(0, INT8, "zero")), kind=INT8)


@pattern
def quantize_cast() -> onnx.ModelProto:
    """Codes are read as numbers."""
    net = Net()
    codes = net.op("QuantizeLinear", net.input(IMAGE), net.scale(), net.constant(0, INT8, "zero"))
    x = net.op("Mul", net.op("Cast", codes, to=FLOAT), net.scale())
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def dequantize_without_quantize() -> onnx.ModelProto:
    """Codes come in from outside."""
    net = Net()
    codes = net.input(IMAGE, kind=INT8)
    x = net.op("DequantizeLinear", codes, net.scale(), net.constant(0, INT8, "zero"))
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def conv_output_quantized() -> onnx.ModelProto:
    """Q/DQ behind the product, too, as ONNX Runtime's quantizer writes it."""
    net = Net()
    x = net.op("Conv", net.quantize(net.input(IMAGE)), net.weight(CONV), net.floats((16,)))
    return net.finish(net.quantize(x))


@pattern
def matmul_output_quantized() -> onnx.ModelProto:
    net = Net()
    x = net.op("MatMul", net.quantize(net.input(ROWS)), net.weight((K, N), axis=1))
    return net.finish(net.quantize(x))


@pattern
def gemm_output_quantized() -> onnx.ModelProto:
    net = Net()
    x = net.op("Gemm", net.quantize(net.input((6, K))), net.weight((N, K)), net.floats((N,)), transB=1)
    return net.finish(net.quantize(x))


@pattern
def matmul_time_aware() -> onnx.ModelProto:
    """Multiplied by r before Q and divided by it behind the product."""
    net = Net()
    x, group = net.input(ROWS), net.input((1,), "group", TensorProto.INT64)
    r = net.op("Gather", net.scale([1.0, 0.7, 0.5]), group)
    product = net.op("MatMul", net.clipped(net.op("Mul", x, r)), net.weight((K, N), axis=1))
    return net.finish(net.op("Add", net.op("Div", product, r), net.floats((N,))))


def attention(
    *,
    probabilities: bool = True,
    scale_before: bool = False,
    kind: int = INT8,
    data: int = FLOAT,
    outer: int | None = None,
) -> onnx.ModelProto:
    """Two products of activations around a softmax; [1, heads 2, tokens 16, 8], which are given as `outer`."""
    net = Net(data=data)
    q, k, v = (net.input((1, 2, 16, 8), name, outer) for name in "qkv")
    if outer not in (None, data):
        q, k, v = (net.op("Cast", value, to=data) for value in (q, k, v))
    k = net.op("Transpose", k, perm=[0, 1, 3, 2])
    scores = net.op("MatMul", net.quantize(q, kind=kind), net.quantize(k, kind=kind))
    if scale_before:
        scores = net.op("Div", scores, net.constant(8**0.5, FLOAT))
    share = net.op("Softmax", scores, axis=-1)
    if probabilities:
        share = net.quantize(share, scale=net.scale(1 / 127), kind=kind)
    product = net.op("MatMul", share, net.quantize(v, kind=kind))
    if outer not in (None, data):
        product = net.op("Cast", product, to=outer)
    return net.finish(product, kind=outer)


PATTERNS |= {
    "attention_qkv_softmax": attention,
    "attention_scaled": lambda: attention(scale_before=True),
    "attention_int4": lambda: attention(kind=INT4),
    "attention_softmax_float": lambda: attention(probabilities=False),
    "attention_bf16": lambda: attention(data=BFLOAT16),
    "attention_softmax_float_bf16": lambda: attention(probabilities=False, data=BFLOAT16),
}


@pattern
def attention_operator() -> onnx.ModelProto:
    """The fused operator of opset 23, behind quantizers that it cannot take inside."""
    net = Net(opset=23)
    q, k, v = (net.quantize(net.input((1, 2, 16, 8), name)) for name in "qkv")
    return net.finish(net.op("Attention", q, k, v))


@pattern
def attention_operator_of_onnxruntime() -> onnx.ModelProto:
    """What exports for ONNX Runtime hold where nothing in attention is quantized; its output meets another product."""
    net = Net()
    q, k, v = (net.input((1, 16, K), name) for name in "qkv")
    joined = net.op("MultiHeadAttention", q, k, v, domain="com.microsoft", num_heads=4)
    model = net.finish(net.op("MatMul", net.quantize(joined), net.weight((K, N), axis=1)))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model

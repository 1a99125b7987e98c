"""What lies between codes, quantizers and products; more than one reader."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.export.lint.net import BFLOAT16, FLOAT, HALF, INT4, INT8, INT32, UINT8, Net
from tests.export.lint.pattern_products import CONV, IMAGE, ROWS, K, N, pattern


@pattern
def conv_dynamic_scale_float_weight() -> onnx.ModelProto:
    net = Net()
    scale = net.input((), "scale")
    return net.finish(net.op("Conv", net.quantize(net.input(IMAGE), scale=scale), net.floats(CONV)))


@pattern
def conv_dynamic_weight_scale() -> onnx.ModelProto:
    net = Net()
    w = net.op("DequantizeLinear", net.codes(CONV), net.input((16,), "scale"), axis=0)
    return net.finish(net.op("Conv", net.quantize(net.input(IMAGE)), w))


@pattern
def conv_dynamic_zero_point() -> onnx.ModelProto:
    net = Net()
    scale, zero = net.scale(), net.input((), "zero", INT8)
    codes = net.op("QuantizeLinear", net.input(IMAGE), scale, zero)
    return net.finish(net.op("Conv", net.op("DequantizeLinear", codes, scale, zero), net.weight(CONV)))


@pattern
def matmul_qk_int4() -> onnx.ModelProto:
    """Two activations in 4 bits, without a softmax before them."""
    net = Net()
    q, k = net.input((1, 2, 16, 8), "q"), net.input((1, 2, 8, 16), "k")
    return net.finish(net.op("MatMul", net.quantize(q, kind=INT4), net.quantize(k, kind=INT4)))


@pattern
def matmul_qk_int4_int8() -> onnx.ModelProto:
    net = Net()
    q, k = net.input((1, 2, 16, 8), "q"), net.input((1, 2, 8, 16), "k")
    return net.finish(net.op("MatMul", net.quantize(q, kind=INT4), net.quantize(k)))


@pattern
def matmul_qk_one_side() -> onnx.ModelProto:
    net = Net()
    q, k = net.input((1, 2, 16, 8), "q"), net.input((1, 2, 8, 16), "k")
    return net.finish(net.op("MatMul", net.quantize(q), k))


@pattern
def attention_operator_fp16() -> onnx.ModelProto:
    """Heads of 64 in half precision, which TensorRT has kernels for."""
    net = Net(opset=23, data=HALF)
    q, k, v = (net.quantize(net.input((1, 2, 128, 64), name)) for name in "qkv")
    return net.finish(net.op("Attention", q, k, v))


@pattern
def codes_transposed() -> onnx.ModelProto:
    """Codes are moved between Q and DQ."""
    net = Net()
    scale, zero = net.scale(), net.constant(0, INT8, "zero")
    codes = net.op("QuantizeLinear", net.input((1, K, 6)), scale, zero)
    x = net.op("DequantizeLinear", net.op("Transpose", codes, perm=[0, 2, 1]), scale, zero)
    return net.finish(net.op("MatMul", x, net.weight((K, N), axis=1)))


@pattern
def activation_transposed() -> onnx.ModelProto:
    """Values are moved between DQ and the product."""
    net = Net()
    x = net.op("Transpose", net.quantize(net.input((1, K, 6))), perm=[0, 2, 1])
    return net.finish(net.op("MatMul", x, net.weight((K, N), axis=1)))


@pattern
def weight_codes_transposed() -> onnx.ModelProto:
    """Stored codes are moved before they are dequantized."""
    net = Net()
    codes = net.op("Transpose", net.codes((N, K)), perm=[1, 0])
    w = net.op("DequantizeLinear", codes, net.scale(np.full(N, 0.01)), axis=1)
    return net.finish(net.op("MatMul", net.quantize(net.input(ROWS)), w))


@pattern
def embedding_of_codes() -> onnx.ModelProto:
    """Rows are taken from stored codes, and then dequantized."""
    net = Net()
    rows = net.op("Gather", net.codes((64, K)), net.input((4,), "ids", TensorProto.INT64))
    return net.finish(net.op("DequantizeLinear", rows, net.scale(0.01)))


@pattern
def qlinear_matmul() -> onnx.ModelProto:
    net = Net()
    scale, zero = net.scale(), net.constant(0, INT8, "zero")
    codes = net.op("QuantizeLinear", net.input(ROWS), scale, zero)
    product = net.op("QLinearMatMul", codes, scale, zero, net.codes((K, N)), net.scale(), zero, scale, zero)
    return net.finish(net.op("DequantizeLinear", product, scale, zero))


@pattern
def int32_table() -> onnx.ModelProto:
    """Int32 codes behind DequantizeLinear that are no bias."""
    net = Net()
    table = net.op("DequantizeLinear", net.constant(np.arange(K), INT32, "bias"), net.scale(0.01))
    return net.finish(net.op("Add", net.input(ROWS), table))


@pattern
def uint8_input() -> onnx.ModelProto:
    """An image of bytes enters the graph."""
    net = Net()
    pixels = net.input(IMAGE, kind=UINT8)
    x = net.op("DequantizeLinear", pixels, net.scale(), net.constant(0, UINT8, "zero"))
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def conv_of_activations() -> onnx.ModelProto:
    net = Net()
    x, w = net.quantize(net.input(IMAGE)), net.quantize(net.input(CONV, "w"))
    return net.finish(net.op("Conv", x, w))


@pattern
def activation_in_blocks() -> onnx.ModelProto:
    net = Net()
    scale = net.scale(np.full((6, 2), 0.05))
    x = net.quantize(net.input((6, K)), scale=scale, zero=np.zeros((6, 2)), axis=1, block_size=64)
    return net.finish(net.op("MatMul", x, net.weight((K, N), axis=1)))


@pattern
def matmul_int8_block_weight_first() -> onnx.ModelProto:
    net = Net()
    return net.finish(net.op("MatMul", net.weight((N, K), axis=1, block=64), net.input((1, K, 6))))


@pattern
def int4_block_weight_shared() -> onnx.ModelProto:
    """Two different activations meet one 4-bit weight."""
    net = Net()
    x, w = net.input(ROWS), net.weight((K, N), kind=INT4, axis=0, block=64)
    return net.finish(net.op("Add", net.op("MatMul", x, w), net.op("MatMul", net.op("Sigmoid", x), w)))


@pattern
def int4_block_weight_of_three_dimensions() -> onnx.ModelProto:
    net = Net()
    return net.finish(
        net.op("MatMul", net.input((2, 6, K)), net.weight((2, K, N), kind=INT4, axis=1, block=64))
    )


@pattern
def microsoft_domain() -> onnx.ModelProto:
    """Q and DQ in ONNX Runtime's own domain, as older quantizers write 16-bit codes."""
    net = Net()
    scale, zero = net.scale(), net.constant(0, INT8, "zero")
    codes = net.op("QuantizeLinear", net.input(IMAGE), scale, zero, domain="com.microsoft")
    x = net.op("DequantizeLinear", codes, scale, zero, domain="com.microsoft")
    model = net.finish(net.op("Conv", x, net.weight(CONV)))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


@pattern
def scale_of_one_element() -> onnx.ModelProto:
    """A per-tensor scale as [1]."""
    net = Net()
    x = net.quantize(net.input(IMAGE), scale=net.scale([0.05]), zero=[0])
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def bf16_float_scale() -> onnx.ModelProto:
    net = Net(opset=23, data=BFLOAT16)
    x = net.quantize(net.input(IMAGE), scale=net.scale(kind=FLOAT), data=BFLOAT16)
    return net.finish(net.op("Conv", x, net.weight(CONV, scale_kind=FLOAT, output_dtype=BFLOAT16)))


@pattern
def fp16_float_scale_without_output_type() -> onnx.ModelProto:
    """Opset 23, but nothing says that the product is in fp16."""
    net = Net(opset=23, data=HALF)
    x = net.quantize(net.input(IMAGE), scale=net.scale(kind=FLOAT))
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def einsum_quantized() -> onnx.ModelProto:
    net = Net()
    x, w = net.quantize(net.input(ROWS)), net.weight((K, N), axis=1)
    return net.finish(net.op("Einsum", x, w, equation="bij,jk->bik"))

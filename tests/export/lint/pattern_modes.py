"""What exports in fp16, bf16 and with INT4 blocks are made of, and what goes wrong in them."""

from __future__ import annotations

import onnx
from onnx import TensorProto

from tests.export.lint.net import BFLOAT16, FLOAT, HALF, INT4, INT8, Net
from tests.export.lint.pattern_products import CONV, IMAGE, PATTERNS, ROWS, K, N, conv, matmul, pattern

DOUBLE = TensorProto.DOUBLE


def time_aware(data: int, *, opset: int = 23) -> onnx.ModelProto:
    """Cast, multiply, Clip and Q in float32, DQ and product in `data`: our quantized exports in `data`."""
    net = Net(opset=opset, data=FLOAT)
    x = net.op("Cast", net.input(IMAGE, kind=data), to=FLOAT)
    x = net.op("Mul", x, net.constant([0.8], FLOAT, "ratio"))
    x = net.clipped(x, scale=net.scale(), data=data)
    w = net.weight(CONV, scale_kind=FLOAT, output_dtype=data)
    y = net.op("Conv", x, w)
    y = net.op("Mul", y, net.constant([1.25], data, "ratio"))
    return net.finish(net.op("Add", y, net.floats((1, 16, 1, 1), data)), kind=data)


def block_weight(data: int, scale: int, *, opset: int = 23, told: bool = False) -> onnx.ModelProto:
    """INT4 blocks with `scale` scales for a product in `data`; `told` says so with `output_dtype`."""
    options = {"output_dtype": data} if told else {}
    net = Net(opset=opset, data=data)
    w = net.weight((K, N), kind=INT4, axis=0, block=64, scale_kind=scale, **options)
    return net.finish(net.op("MatMul", net.input(ROWS), w))


def weight_alone(
    kind: int, data: int, scale: int, *, op_type: str = "MatMul", cast: bool = False
) -> onnx.ModelProto:
    """A weight with float32 scales by channel for a product in `data`, by `output_dtype` or behind a Cast."""
    net = Net(opset=23, data=data)
    options = {} if cast else {"output_dtype": data}
    w = net.weight((K, N), kind=kind, axis=1, scale_kind=scale, **options)
    x = net.input((6, K) if op_type == "Gemm" else ROWS)
    return net.finish(net.op(op_type, x, net.op("Cast", w, to=data) if cast else w))


def float_conv(data: int, opset: int) -> onnx.ModelProto:
    return conv(Net(opset=opset, data=data))


def between_casts(data: int, op_type: str, *more: float) -> onnx.ModelProto:
    """One operator in `data`, float32 around it."""
    net = Net(opset=22)
    x = net.op("Cast", net.op("Sigmoid", net.input(ROWS)), to=data)
    y = net.op(op_type, x, *(net.constant([value], data, "operand") for value in more))
    return net.finish(net.op("Cast", y, to=FLOAT))


PATTERNS.update(
    {
        "mode_int8_fp16": lambda: time_aware(HALF),
        "mode_int8_bf16": lambda: time_aware(BFLOAT16),
        "mode_int8_fp16_opset22": lambda: time_aware(HALF, opset=22),
        "mode_int4_fp16": lambda: block_weight(HALF, HALF),
        "mode_int4_bf16": lambda: block_weight(BFLOAT16, BFLOAT16),
        "mode_int4_fp16_opset21": lambda: block_weight(HALF, HALF, opset=21),
        "mode_int4_fp16_float_scale": lambda: block_weight(HALF, FLOAT, told=True),
        "mode_int4_bf16_float_scale": lambda: block_weight(BFLOAT16, FLOAT, told=True),
        "mode_int4_fp16_float_scale_untold": lambda: block_weight(HALF, FLOAT),
        "mode_int4_fp32_half_scale": lambda: block_weight(FLOAT, HALF, told=True),
        "mode_int4_channel_fp16_float_scale": lambda: weight_alone(INT4, HALF, FLOAT),
        "mode_int4_channel_fp16_cast": lambda: weight_alone(INT4, HALF, FLOAT, cast=True),
        "mode_int4_channel_fp16_gemm": lambda: weight_alone(INT4, HALF, FLOAT, op_type="Gemm"),
        "mode_int8_alone_fp16": lambda: weight_alone(INT8, HALF, FLOAT),
        "mode_int8_alone_fp16_cast": lambda: weight_alone(INT8, HALF, FLOAT, cast=True),
        "mode_int8_alone_fp16_half_scale": lambda: weight_alone(INT8, HALF, HALF),
        "mode_int8_alone_fp16_gemm": lambda: weight_alone(INT8, HALF, FLOAT, op_type="Gemm"),
        "float_conv_fp16": lambda: float_conv(HALF, 21),
        "float_conv_bf16_opset21": lambda: float_conv(BFLOAT16, 21),
        "float_conv_bf16_opset22": lambda: float_conv(BFLOAT16, 22),
        "float_conv_double": lambda: float_conv(DOUBLE, 21),
        "float_matmul_fp16": lambda: matmul(Net(opset=21, data=HALF)),
        "float_matmul_bf16": lambda: matmul(Net(opset=21, data=BFLOAT16)),
        "float_matmul_double": lambda: matmul(Net(opset=21, data=DOUBLE)),
        "fp16_sigmoid": lambda: between_casts(HALF, "Sigmoid"),
        "fp16_add": lambda: between_casts(HALF, "Add", 1.0),
        "fp16_softmax": lambda: between_casts(HALF, "Softmax"),
        "bf16_cast_alone": lambda: between_casts(BFLOAT16, "Identity"),
        "bf16_sigmoid": lambda: between_casts(BFLOAT16, "Sigmoid"),
        "bf16_add": lambda: between_casts(BFLOAT16, "Add", 1.0),
        "bf16_mul": lambda: between_casts(BFLOAT16, "Mul", 2.0),
        "bf16_softmax": lambda: between_casts(BFLOAT16, "Softmax"),
        "bf16_sqrt": lambda: between_casts(BFLOAT16, "Sqrt"),
        "bf16_pow": lambda: between_casts(BFLOAT16, "Pow", 2.0),
        "bf16_clip": lambda: between_casts(BFLOAT16, "Clip"),
        "double_cast_alone": lambda: between_casts(DOUBLE, "Identity"),
        "double_sigmoid": lambda: between_casts(DOUBLE, "Sigmoid"),
        "double_add": lambda: between_casts(DOUBLE, "Add", 1.0),
        "double_sqrt": lambda: between_casts(DOUBLE, "Sqrt"),
    }
)


@pattern
def quantize_output_type_opset19() -> onnx.ModelProto:
    """`output_dtype` before QuantizeLinear had it."""
    net = Net(opset=19)
    scale = net.scale()
    codes = net.op(
        "QuantizeLinear", net.input(IMAGE), scale, net.constant(0, INT8, "zero"), output_dtype=INT8
    )
    x = net.op("DequantizeLinear", codes, scale, net.constant(0, INT8, "zero"))
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def double_input() -> onnx.ModelProto:
    """A float64 input that is cast at once."""
    net = Net(opset=21)
    x = net.op("Cast", net.input(ROWS, kind=DOUBLE), to=FLOAT)
    return net.finish(net.op("MatMul", x, net.floats((K, N))))


@pattern
def double_constant() -> onnx.ModelProto:
    """A float64 constant that is cast at once: what a Python number becomes."""
    net = Net(opset=21)
    factor = net.op("Cast", net.constant([0.5], DOUBLE, "factor"), to=FLOAT)
    return net.finish(net.op("MatMul", net.op("Mul", net.input(ROWS), factor), net.floats((K, N))))


@pattern
def mixed_add() -> onnx.ModelProto:
    """fp16 and float32 meet without a Cast."""
    net = Net(opset=21, data=HALF)
    return net.finish(net.op("Add", net.op("Sigmoid", net.input(ROWS)), net.constant([1.0], FLOAT, "one")))


@pattern
def mixed_matmul() -> onnx.ModelProto:
    """A float32 weight for an fp16 activation."""
    net = Net(opset=21, data=HALF)
    return net.finish(net.op("MatMul", net.input(ROWS), net.floats((K, N), FLOAT)))


@pattern
def mixed_conv() -> onnx.ModelProto:
    """A float32 bias for an fp16 convolution."""
    net = Net(opset=21, data=HALF)
    return net.finish(net.op("Conv", net.input(IMAGE), net.floats(CONV), net.floats((CONV[0],), FLOAT)))

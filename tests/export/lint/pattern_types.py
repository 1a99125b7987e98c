"""Float types around quantizers, forms of weights, residual sums."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.export.lint.net import FLOAT, FP8, HALF, INT4, INT8, UINT8, Net
from tests.export.lint.pattern_products import CONV, IMAGE, ROWS, K, N, pattern


@pattern
def conv_fp16_float_scale() -> onnx.ModelProto:
    """float32 scales around fp16 data, which opset 23 allows."""
    net = Net(opset=23, data=HALF)
    x = net.quantize(net.input(IMAGE), scale=net.scale(kind=FLOAT), data=HALF)
    return net.finish(net.op("Conv", x, net.weight(CONV, scale_kind=FLOAT, output_dtype=HALF)))


@pattern
def conv_fp16_float_scale_opset21() -> onnx.ModelProto:
    """The same where the operator set does not allow it."""
    net = Net(opset=21, data=HALF)
    x = net.quantize(net.input(IMAGE), scale=net.scale(kind=FLOAT))
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def conv_fp16_casts() -> onnx.ModelProto:
    """float32 quantizers between casts: the form for opset 21."""
    net = Net(opset=21, data=HALF)
    x = net.op("Cast", net.input(IMAGE), to=FLOAT)
    x = net.op("Cast", net.quantize(x, scale=net.scale(kind=FLOAT)), to=HALF)
    w = net.op("Cast", net.weight(CONV, scale_kind=FLOAT), to=HALF)
    return net.finish(net.op("Conv", x, w))


@pattern
def conv_other_scale_behind() -> onnx.ModelProto:
    """Q and DQ that disagree about the scale."""
    net = Net()
    zero = net.constant(0, INT8, "zero")
    codes = net.op("QuantizeLinear", net.input(IMAGE), net.scale(0.05), zero)
    x = net.op("DequantizeLinear", codes, net.scale(0.1), zero)
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def conv_activation_per_channel() -> onnx.ModelProto:
    """One activation scale an input channel."""
    net = Net()
    x = net.quantize(net.input(IMAGE), scale=net.scale(np.full(8, 0.05)), zero=np.zeros(8), axis=1)
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def matmul_activation_per_token() -> onnx.ModelProto:
    net = Net()
    x = net.quantize(net.input(ROWS), scale=net.scale(np.full(6, 0.05)), zero=np.zeros(6), axis=1)
    return net.finish(net.op("MatMul", x, net.weight((K, N), axis=1)))


@pattern
def matmul_weight_transposed() -> onnx.ModelProto:
    """The weight is dequantized, then transposed: what torch's Linear becomes without a pass."""
    net = Net()
    w = net.op("Transpose", net.weight((N, K), axis=0), perm=[1, 0])
    return net.finish(net.op("MatMul", net.quantize(net.input(ROWS)), w))


@pattern
def matmul_int4_weight_transposed() -> onnx.ModelProto:
    net = Net()
    w = net.op("Transpose", net.weight((N, K), kind=INT4, axis=1, block=64), perm=[1, 0])
    return net.finish(net.op("MatMul", net.input(ROWS), w))


@pattern
def matmul_int4_weight_first() -> onnx.ModelProto:
    """The weight is the left operand."""
    net = Net()
    w = net.weight((N, K), kind=INT4, axis=1, block=64)
    return net.finish(net.op("MatMul", w, net.input((1, K, 6))))


@pattern
def matmul_int4_channel_weight_first() -> onnx.ModelProto:
    net = Net()
    return net.finish(net.op("MatMul", net.weight((N, K), kind=INT4), net.input((1, K, 6))))


@pattern
def matmul_int8_weight_first() -> onnx.ModelProto:
    net = Net()
    return net.finish(net.op("MatMul", net.weight((N, K)), net.quantize(net.input((1, K, 6)))))


@pattern
def matmul_int4_cast_to_int8() -> onnx.ModelProto:
    """Packed weights in the form for ONNX Runtime."""
    net = Net()
    codes = net.op("Cast", net.codes((K, N), INT4), to=INT8)
    w = net.op("DequantizeLinear", codes, net.scale(np.full(N, 0.01)), axis=1)
    return net.finish(net.op("MatMul", net.quantize(net.input(ROWS)), w))


@pattern
def matmul_nbits() -> onnx.ModelProto:
    """ONNX Runtime's own operator for 4-bit weights."""
    net = Net()
    packed = net.constant(net.rng.integers(0, 256, (N, K // 64, 32)), UINT8, "packed")
    scales = net.scale(np.full(N * (K // 64), 0.01))
    y = net.op(
        "MatMulNBits", net.input(ROWS), packed, scales,
        domain="com.microsoft", K=K, N=N, bits=4, block_size=64,
    )  # fmt: skip
    model = net.finish(y)
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


@pattern
def conv_weight_quantized_in_graph() -> onnx.ModelProto:
    """The weight is stored in float, with Q and DQ behind it."""
    net = Net()
    w = net.quantize(net.floats(CONV), scale=net.scale(np.full(16, 0.01)), zero=np.zeros(16), axis=0)
    return net.finish(net.op("Conv", net.quantize(net.input(IMAGE)), w))


@pattern
def conv_weight_in_constant_node() -> onnx.ModelProto:
    net = Net()
    tensor = onnx.numpy_helper.from_array(net.rng.integers(-127, 128, CONV).astype(np.int8), "w")
    w = net.op("DequantizeLinear", net.op("Constant", value=tensor), net.scale(np.full(16, 0.01)), axis=0)
    return net.finish(net.op("Conv", net.quantize(net.input(IMAGE)), w))


@pattern
def conv_transpose() -> onnx.ModelProto:
    net = Net()
    x = net.quantize(net.input(IMAGE))
    return net.finish(net.op("ConvTranspose", x, net.weight((8, 16, 3, 3), axis=1)))


@pattern
def conv_depthwise() -> onnx.ModelProto:
    net = Net()
    x = net.quantize(net.input(IMAGE))
    return net.finish(net.op("Conv", x, net.weight((8, 1, 3, 3)), group=8))


@pattern
def conv_1d() -> onnx.ModelProto:
    net = Net()
    return net.finish(net.op("Conv", net.quantize(net.input((1, 8, 32))), net.weight((16, 8, 3))))


@pattern
def residual_float_branch() -> onnx.ModelProto:
    """One input of the Add is quantized, the other not."""
    net = Net()
    x = net.input(IMAGE)
    y = net.op("Conv", net.quantize(x), net.weight((8, 8, 3, 3)), pads=[1, 1, 1, 1])
    return net.finish(net.op("Conv", net.quantize(net.op("Add", net.quantize(y), x)), net.weight(CONV)))


@pattern
def residual_quantized() -> onnx.ModelProto:
    net = Net()
    x = net.quantize(net.input(IMAGE))
    y = net.op("Conv", x, net.weight((8, 8, 3, 3)), pads=[1, 1, 1, 1])
    return net.finish(net.op("Conv", net.quantize(net.op("Add", net.quantize(y), x)), net.weight(CONV)))


@pattern
def concat_float_branch() -> onnx.ModelProto:
    net = Net()
    x, skip = net.input(IMAGE), net.input(IMAGE, "skip")
    both = net.quantize(net.op("Concat", net.quantize(x), skip, axis=1))
    return net.finish(net.op("Conv", both, net.weight((16, 16, 3, 3))))


@pattern
def shared_dequantize() -> onnx.ModelProto:
    """One DequantizeLinear read by two products, one an activation shared as q, k and v share theirs."""
    net = Net()
    x, w = net.quantize(net.input(ROWS)), net.weight((K, N), axis=1)
    return net.finish(net.op("Add", net.op("MatMul", x, w), net.op("MatMul", x, w)))


@pattern
def no_zero_point_input() -> onnx.ModelProto:
    """Without a zero-point and an output type, codes are uint8."""
    net = Net()
    scale = net.scale()
    x = net.op("DequantizeLinear", net.op("QuantizeLinear", net.input(IMAGE), scale), scale)
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def output_dtype_int8() -> onnx.ModelProto:
    """The codes' type is an attribute (opset 21)."""
    net = Net()
    scale = net.scale()
    x = net.op(
        "DequantizeLinear", net.op("QuantizeLinear", net.input(IMAGE), scale, output_dtype=INT8), scale
    )
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def int4_weight_gathered() -> onnx.ModelProto:
    """4-bit weights read by something else than a product: an embedding table."""
    net = Net()
    table = net.weight((64, K), kind=INT4, axis=1, block=64)
    return net.finish(net.op("Gather", table, net.input((1, 4), "ids", TensorProto.INT64)))


@pattern
def quantize_without_dequantize_uint8() -> onnx.ModelProto:
    net = Net()
    x = net.op("Conv", net.quantize(net.input(IMAGE)), net.weight(CONV))
    return net.finish(net.op("QuantizeLinear", x, net.scale(), net.constant(0, UINT8, "zero")), kind=UINT8)


@pattern
def scale_count_wrong() -> onnx.ModelProto:
    """Eight scales for sixteen channels."""
    net = Net()
    w = net.op("DequantizeLinear", net.codes(CONV), net.scale(np.full(8, 0.01)), axis=0)
    return net.finish(net.op("Conv", net.quantize(net.input(IMAGE)), w))


@pattern
def half_scale_of_float_data() -> onnx.ModelProto:
    """float16 scales around float32 data, before the operator set that allows it."""
    net = Net()
    x = net.quantize(net.input(IMAGE), scale=net.scale(kind=HALF))
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def double_scale() -> onnx.ModelProto:
    net = Net()
    x = net.quantize(net.input(IMAGE), scale=net.scale(kind=TensorProto.DOUBLE))
    return net.finish(net.op("Conv", x, net.weight(CONV)))


@pattern
def quantizers_without_product() -> onnx.ModelProto:
    """Q/DQ around an activation function alone."""
    net = Net()
    return net.finish(net.quantize(net.op("Sigmoid", net.quantize(net.input(IMAGE)))))


@pattern
def conv_fp8_both() -> onnx.ModelProto:
    net = Net()
    x = net.quantize(net.input(IMAGE), kind=FP8)
    w = net.quantize(
        net.floats(CONV), scale=net.scale(np.full(16, 0.01)), zero=np.zeros(16), kind=FP8, axis=0
    )
    return net.finish(net.op("Conv", x, w))


@pattern
def matmul_fp8_int8() -> onnx.ModelProto:
    net = Net()
    x = net.quantize(net.input(ROWS), kind=FP8)
    return net.finish(net.op("MatMul", x, net.weight((K, N), axis=1)))


@pattern
def product_in_a_branch() -> onnx.ModelProto:
    """A quantized product inside an If."""
    net, inner = Net(), Net()
    x, flag = net.quantize(net.input(IMAGE)), net.input((), "flag", TensorProto.BOOL)
    inner.op("Conv", x, inner.weight(CONV))
    branches = []
    for nodes in (inner.nodes, [helper.make_node("Constant", [], ["zeros"], value=zeros((1, 16, 6, 6)))]):
        name = nodes[-1].output[0]
        outputs = [helper.make_tensor_value_info(name, FLOAT, [1, 16, 6, 6])]
        stored = inner.initializers if nodes is inner.nodes else []
        branches.append(helper.make_graph(nodes, name, [], outputs, stored))
    # Names must be unique across the graph and what it contains.
    model = net.finish(net.op("If", flag, then_branch=branches[0], else_branch=branches[1]))
    return model


def zeros(shape: tuple[int, ...]) -> onnx.TensorProto:
    return onnx.numpy_helper.from_array(np.zeros(shape, np.float32), "zeros")


@pattern
def clip_before_int4() -> onnx.ModelProto:
    """A Clip of something that is computed, before a 4-bit quantizer."""
    net = Net()
    x = net.clipped(net.op("Sigmoid", net.input(IMAGE)), kind=INT4)
    return net.finish(net.op("Conv", x, net.floats(CONV)))


@pattern
def type_given_twice() -> onnx.ModelProto:
    """A zero-point and an attribute both say int8."""
    net = Net()
    scale, zero = net.scale(), net.constant(0, INT8, "zero")
    codes = net.op("QuantizeLinear", net.input(IMAGE), scale, zero, output_dtype=INT8)
    return net.finish(net.op("Conv", net.op("DequantizeLinear", codes, scale, zero), net.weight(CONV)))

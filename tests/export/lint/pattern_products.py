"""One product, its operands quantized in every way that exporters write and in a few that nobody should write."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx

from tests.export.lint.net import BFLOAT16, FP8, HALF, INT4, INT16, UINT4, UINT8, Net

IMAGE, CONV, ROWS, K, N = (1, 8, 8, 8), (16, 8, 3, 3), (1, 6, 128), 128, 32
Make = Callable[[], onnx.ModelProto]
PATTERNS: dict[str, Make] = {}


def pattern(make: Make) -> Make:
    """Register a pattern under its function's name."""
    PATTERNS[make.__name__] = make
    return make


def conv(
    net: Net | None = None,
    *,
    activation: dict[str, Any] | None = None,
    weight: dict[str, Any] | None = None,
    clip: bool = False,
    bias: bool = False,
) -> onnx.ModelProto:
    """A 3x3 convolution; `activation` and `weight` are options of their quantizers, None leaves them float."""
    net = net or Net()
    x = net.input(IMAGE)
    if activation is not None:
        x = net.clipped(x, **activation) if clip else net.quantize(x, **activation)
    w = net.floats(CONV) if weight is None else net.weight(CONV, **weight)
    more = [net.floats((CONV[0],))] if bias else []
    return net.finish(net.op("Conv", x, w, *more, pads=[1, 1, 1, 1]))


def matmul(
    net: Net | None = None,
    *,
    activation: dict[str, Any] | None = None,
    weight: dict[str, Any] | None = None,
    clip: bool = False,
    k: int = K,
) -> onnx.ModelProto:
    """[1, 6, k] times [k, 32]; options as in :func:`conv`."""
    net = net or Net()
    x = net.input((*ROWS[:2], k))
    if activation is not None:
        x = net.clipped(x, **activation) if clip else net.quantize(x, **activation)
    w = net.floats((k, N)) if weight is None else net.weight((k, N), **{"axis": 1, **weight})
    return net.finish(net.op("MatMul", x, w))


def gemm(
    *, activation: dict[str, Any] | None = None, weight: dict[str, Any] | None = None, transposed: bool = True
) -> onnx.ModelProto:
    """[6, 128] times [32, 128] transposed, or [128, 32]."""
    net = Net()
    x = net.input((6, K))
    if activation is not None:
        x = net.quantize(x, **activation)
    shape = (N, K) if transposed else (K, N)
    w = net.floats(shape) if weight is None else net.weight(shape, **{"axis": int(not transposed), **weight})
    return net.finish(net.op("Gemm", x, w, net.floats((N,)), transB=int(transposed)))


CONVOLUTIONS: dict[str, Make] = {
    "conv_float": conv,
    "conv_w8a8": lambda: conv(activation={}, weight={}),
    "conv_w8a8_bias": lambda: conv(activation={}, weight={}, bias=True),
    "conv_w8a8_clip": lambda: conv(activation={}, weight={}, clip=True),
    "conv_w8a8_opset13": lambda: conv(Net(opset=13), activation={}, weight={}),
    "conv_w8a8_opset17": lambda: conv(Net(opset=17), activation={}, weight={}),
    "conv_w8a8_opset19": lambda: conv(Net(opset=19), activation={}, weight={}),
    "conv_w8a8_opset22": lambda: conv(Net(opset=22), activation={}, weight={}),
    "conv_w8a8_opset23": lambda: conv(Net(opset=23), activation={}, weight={}),
    "conv_w8a8_opset24": lambda: conv(Net(opset=24), activation={}, weight={}),
    "conv_w8_tensor_a8": lambda: conv(activation={}, weight={"axis": None}),
    "conv_w8_axis1_a8": lambda: conv(activation={}, weight={"axis": 1}),
    "conv_w8_only": lambda: conv(weight={}),
    "conv_a8_only": lambda: conv(activation={}),
    "conv_w8a8_zero_point": lambda: conv(activation={"zero": 3}, weight={}),
    "conv_w8a8_weight_zero_point": lambda: conv(activation={}, weight={"zero": 3}),
    "conv_w8_uint8_zero": lambda: conv(activation={"kind": UINT8}, weight={}),
    "conv_w8_uint8_128": lambda: conv(activation={"kind": UINT8, "zero": 128}, weight={}),
    "conv_uint8_weight": lambda: conv(activation={}, weight={"kind": UINT8, "zero": 128}),
    "conv_w8_int16": lambda: conv(activation={"kind": INT16}, weight={}),
    "conv_w4a8": lambda: conv(activation={}, weight={"kind": INT4}),
    "conv_w4_only": lambda: conv(weight={"kind": INT4}),
    "conv_w8a4": lambda: conv(activation={"kind": INT4}, weight={}),
    "conv_w4a4": lambda: conv(activation={"kind": INT4}, weight={"kind": INT4}),
    "conv_w4_axis1_a8": lambda: conv(activation={}, weight={"kind": INT4, "axis": 1}),
    "conv_w4_block": lambda: conv(weight={"kind": INT4, "axis": 1, "block": 4}),
    "conv_w8_block_a8": lambda: conv(activation={}, weight={"axis": 1, "block": 4}),
    "conv_w8a8_opset10": lambda: conv(Net(opset=10), activation={}, weight={"axis": None}),
    "conv_w8a8_channel_opset12": lambda: conv(Net(opset=12), activation={}, weight={}),
    "conv_w8a8_opset25": lambda: conv(Net(opset=25), activation={}, weight={}),
    "conv_fp8_w8": lambda: conv(activation={"kind": FP8}, weight={}),
    "conv_fp8": lambda: conv(activation={"kind": FP8}),
    "conv_fp16": lambda: conv(Net(data=HALF), activation={}, weight={}),
    "conv_bf16": lambda: conv(Net(data=BFLOAT16), activation={}, weight={}),
}
PRODUCTS: dict[str, Make] = {
    "matmul_w8a8": lambda: matmul(activation={}, weight={}),
    "matmul_w8a8_clip": lambda: matmul(activation={}, weight={}, clip=True),
    "matmul_w8_tensor_a8": lambda: matmul(activation={}, weight={"axis": None}),
    "matmul_w8_axis0_a8": lambda: matmul(activation={}, weight={"axis": 0}),
    "matmul_w8_only": lambda: matmul(weight={}),
    "matmul_a8_only": lambda: matmul(activation={}),
    "matmul_w8_block64": lambda: matmul(weight={"axis": 0, "block": 64}),
    "matmul_w8_block64_a8": lambda: matmul(activation={}, weight={"axis": 0, "block": 64}),
    "matmul_w8a8_zero_point": lambda: matmul(activation={"zero": -7}, weight={}),
    "matmul_w8_uint8_128": lambda: matmul(activation={"kind": UINT8, "zero": 128}, weight={}),
    "matmul_w4_channel": lambda: matmul(weight={"kind": INT4}),
    "matmul_w4_tensor": lambda: matmul(weight={"kind": INT4, "axis": None}),
    "matmul_w4_block16": lambda: matmul(weight={"kind": INT4, "axis": 0, "block": 16}),
    "matmul_w4_block32": lambda: matmul(weight={"kind": INT4, "axis": 0, "block": 32}),
    "matmul_w4_block64": lambda: matmul(weight={"kind": INT4, "axis": 0, "block": 64}),
    "matmul_w4_block128": lambda: matmul(weight={"kind": INT4, "axis": 0, "block": 128}),
    "matmul_w4_block64_fp16": lambda: matmul(Net(data=HALF), weight={"kind": INT4, "axis": 0, "block": 64}),
    "matmul_w4_block64_bf16": lambda: matmul(
        Net(data=BFLOAT16), weight={"kind": INT4, "axis": 0, "block": 64}
    ),
    "matmul_w4_block64_n": lambda: matmul(weight={"kind": INT4, "axis": 1, "block": 16}),
    "matmul_w4_block64_k96": lambda: matmul(weight={"kind": INT4, "axis": 0, "block": 64}, k=96),
    "matmul_w4_block64_zero": lambda: matmul(weight={"kind": INT4, "axis": 0, "block": 64, "zero": 2}),
    "matmul_uint4_block64": lambda: matmul(weight={"kind": UINT4, "axis": 0, "block": 64, "zero": 8}),
    "matmul_w4_block64_a8": lambda: matmul(activation={}, weight={"kind": INT4, "axis": 0, "block": 64}),
    "matmul_w4_channel_a8": lambda: matmul(activation={}, weight={"kind": INT4}),
    "matmul_w8a4": lambda: matmul(activation={"kind": INT4}, weight={}),
    "matmul_w4_tensor_a8": lambda: matmul(activation={}, weight={"kind": INT4, "axis": None}),
    "matmul_w4a4": lambda: matmul(activation={"kind": INT4}, weight={"kind": INT4}),
    "matmul_w4_block64_a4": lambda: matmul(
        activation={"kind": INT4}, weight={"kind": INT4, "axis": 0, "block": 64}
    ),
    "matmul_a4_only": lambda: matmul(activation={"kind": INT4}),
    "matmul_w8_tensor_a4": lambda: matmul(activation={"kind": INT4}, weight={"axis": None}),
    "matmul_w4_tensor_a4": lambda: matmul(activation={"kind": INT4}, weight={"kind": INT4, "axis": None}),
    "matmul_uint4_activation": lambda: matmul(activation={"kind": UINT4}, weight={}),
    "matmul_w4_block32_k100": lambda: matmul(weight={"kind": INT4, "axis": 0, "block": 32}, k=100),
    "matmul_w4_axis0_a8": lambda: matmul(activation={}, weight={"kind": INT4, "axis": 0}),
    "matmul_w4_block128_a8": lambda: matmul(activation={}, weight={"kind": INT4, "axis": 0, "block": 128}),
    "matmul_w4_block48": lambda: matmul(weight={"kind": INT4, "axis": 0, "block": 48}),
    "matmul_w4_opset19": lambda: matmul(Net(opset=19), weight={"kind": INT4}),
    "matmul_fp16": lambda: matmul(Net(data=HALF), activation={}, weight={}),
    "gemm_w8a8": lambda: gemm(activation={}, weight={}),
    "gemm_w8a8_not_transposed": lambda: gemm(activation={}, weight={}, transposed=False),
    "gemm_w4_block64": lambda: gemm(weight={"kind": INT4, "axis": 1, "block": 64}),
    "gemm_w4_block64_not_transposed": lambda: gemm(
        weight={"kind": INT4, "axis": 0, "block": 64}, transposed=False
    ),
    "gemm_w4_block64_a8_not_transposed": lambda: gemm(
        activation={}, weight={"kind": INT4, "axis": 0, "block": 64}, transposed=False
    ),
    "gemm_w4_channel": lambda: gemm(weight={"kind": INT4}),
    "gemm_w4_channel_a8": lambda: gemm(activation={}, weight={"kind": INT4}),
    "gemm_w8a4": lambda: gemm(activation={"kind": INT4}, weight={}),
    "gemm_w4_block64_a8": lambda: gemm(activation={}, weight={"kind": INT4, "axis": 1, "block": 64}),
}
PATTERNS |= CONVOLUTIONS | PRODUCTS

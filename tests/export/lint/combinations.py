"""Random combinations of everything that a quantized product can be made of."""

from __future__ import annotations

import random
from typing import Any

import onnx

from tests.export.lint.net import BFLOAT16, FLOAT, FP8, HALF, INT4, INT8, INT16, INT32, UINT4, UINT8, Net

NAMES = {FLOAT: "fp32", HALF: "fp16", BFLOAT16: "bf16", INT8: "int8", UINT8: "uint8", INT4: "int4"}
NAMES |= {UINT4: "uint4", INT16: "int16", FP8: "fp8", None: "float"}
K, N = 64, 32

# Each choice with its weight: what exporters write most is drawn most.
CHOICES: dict[str, dict[Any, int]] = {
    "op": {"conv": 4, "matmul": 4, "gemm": 2, "gemm_t": 2, "left": 1, "qk": 1},
    "opset": {13: 1, 17: 2, 19: 1, 21: 6, 22: 1, 23: 2},
    "data": {FLOAT: 6, HALF: 3, BFLOAT16: 1},
    "activation": {INT8: 8, None: 6, INT4: 2, UINT8: 2, UINT4: 1, INT16: 1, FP8: 1},
    "weight": {INT8: 8, INT4: 5, None: 3, UINT8: 1},
    "granularity": {"channel": 6, "tensor": 3, "block": 4, "wrong": 1},
    "block": {16: 1, 32: 2, 64: 1, 24: 1},
    "zero": {0: 10, 5: 1},
    "weight_zero": {None: 10, 0: 2, 3: 1},
    "producer": {"": 6, "Sigmoid": 1, "Softmax": 1, "Mul": 1},
    "clip": {False: 3, True: 1},
    "bias": {"": 4, "float": 2, "int32": 1},
    "scale": {"constant": 10, "dynamic": 1},
    "output": {False: 3, True: 1},
}


def draw(seed: int) -> tuple[str, onnx.ModelProto]:
    """One combination: a name that says what it is, and its graph."""
    rng = random.Random(seed)
    chosen = {
        name: rng.choices(list(weights), list(weights.values()))[0] for name, weights in CHOICES.items()
    }
    return describe(seed, chosen), build(chosen)


def describe(seed: int, chosen: dict[str, Any]) -> str:
    """A name for tables."""
    words = [f"{chosen['op']} {NAMES[chosen['data']]} opset {chosen['opset']}"]
    words.append(f"a {NAMES[chosen['activation']]}" + ("" if chosen["scale"] == "constant" else " dynamic"))
    if chosen["op"] != "qk":
        words.append(f"w {NAMES[chosen['weight']]} by {chosen['granularity']}")
    if chosen["granularity"] == "block":
        words[-1] += f" {chosen['block']}"
    words += [f"zero {chosen['zero']}"] * bool(chosen["zero"])
    words += [f"behind {chosen['producer']}"] * bool(chosen["producer"])
    words += [f"{chosen['bias']} bias"] * (
        bool(chosen["bias"]) and chosen["op"] in ("conv", "gemm", "gemm_t")
    )
    words += ["output quantized"] * chosen["output"]
    return f"{seed}: " + ", ".join(words)


def build(chosen: dict[str, Any]) -> onnx.ModelProto:
    """The graph of a combination."""
    net = Net(opset=chosen["opset"], data=chosen["data"])
    op = chosen["op"]
    shape = {"conv": (1, 16, 8, 8), "left": (1, K, 6), "gemm": (6, K), "gemm_t": (6, K)}.get(op, (1, 6, K))
    x = activation(net, net.input(shape), chosen)
    if op == "qk":
        other = activation(net, net.input((1, K, 6), "k"), {**chosen, "producer": ""})
        y = net.op("MatMul", x, other)
    elif op == "conv":
        y = net.op(
            "Conv", x, weight(net, (32, 16, 3, 3), 0, 1, chosen), *bias(net, chosen), pads=[1, 1, 1, 1]
        )
    elif op == "matmul":
        y = net.op("MatMul", x, weight(net, (K, N), 1, 0, chosen))
    elif op == "left":
        y = net.op("MatMul", weight(net, (N, K), 0, 1, chosen), x)
    else:
        turned = op == "gemm_t"
        w = weight(net, (N, K) if turned else (K, N), int(not turned), int(turned), chosen)
        y = net.op("Gemm", x, w, *bias(net, chosen), transB=int(turned))
    return net.finish(net.quantize(y) if chosen["output"] else y)


def activation(net: Net, x: str, chosen: dict[str, Any]) -> str:
    """An activation behind its producer and its quantizer."""
    if chosen["producer"] == "Mul":
        x = net.op("Mul", x, net.scale(0.5))
    elif chosen["producer"]:
        x = net.op(chosen["producer"], x)
    kind = chosen["activation"]
    if kind is None:
        return x
    scale = (
        net.scale()
        if chosen["scale"] == "constant"
        else net.input((), f"step_{len(net.inputs)}", FLOAT if chosen["data"] == FLOAT else None)
    )
    zero = chosen["zero"] if kind in (INT8, UINT8, INT16) else 0
    make = net.clipped if chosen["clip"] else net.quantize
    return make(x, scale=scale, zero=zero, kind=kind)


def weight(
    net: Net, shape: tuple[int, ...], output_axis: int, summed_axis: int, chosen: dict[str, Any]
) -> str:
    """A weight as chosen; channels of the wrong axis are those that are summed."""
    kind, granularity = chosen["weight"], chosen["granularity"]
    if kind is None:
        return net.floats(shape)
    axis = {"tensor": None, "channel": output_axis}.get(granularity, summed_axis)
    block = chosen["block"] if granularity == "block" else None
    if block and shape[summed_axis] < block:
        block = shape[summed_axis]
    return net.weight(shape, kind=kind, axis=axis, block=block, zero=chosen["weight_zero"])


def bias(net: Net, chosen: dict[str, Any]) -> list[str]:
    """A bias of 32 elements, or none."""
    if chosen["bias"] == "float":
        return [net.floats((N,))]
    if chosen["bias"] == "int32":
        codes = net.constant(range(N), INT32, "bias")
        return [net.op("DequantizeLinear", codes, net.scale([1e-3] * N), axis=0)]
    return []

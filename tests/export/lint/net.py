"""A few words to write small quantized ONNX graphs with, well-formed or not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INT8, UINT8, INT4, UINT4 = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4, TensorProto.UINT4
INT16, INT32, FP8 = TensorProto.INT16, TensorProto.INT32, TensorProto.FLOAT8E4M3FN
FLOAT, HALF, BFLOAT16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
RANGES = {INT8: (-127, 128), UINT8: (0, 256), INT4: (-8, 8), UINT4: (0, 16), INT16: (-999, 999)}


class Net:
    """A graph under construction; every method returns the name of the value it made."""

    def __init__(self, *, opset: int = 21, data: int = FLOAT) -> None:
        self.opset, self.data = opset, data
        self.rng = np.random.default_rng(0)
        self.nodes: list[onnx.NodeProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def input(self, shape: Sequence[int | str], name: str = "x", kind: int | None = None) -> str:
        """An input of the graph."""
        self.inputs.append(helper.make_tensor_value_info(name, kind or self.data, list(shape)))
        return name

    def constant(self, values: Any, kind: int, name: str = "c") -> str:
        """An initializer of the given values."""
        array = np.asarray(values)
        name = f"{name}_{len(self.initializers)}"
        flat = array.ravel().tolist()
        self.initializers.append(helper.make_tensor(name, kind, array.shape, flat))
        return name

    def floats(self, shape: Sequence[int], kind: int | None = None) -> str:
        """An initializer of random numbers in the graph's float type."""
        return self.constant(self.rng.standard_normal(tuple(shape)) * 0.1, kind or self.data, "float")

    def op(self, op_type: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """A node with one output."""
        output = f"{op_type.lower()}_{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(op_type, list(inputs), [output], name=output, domain=domain, **attributes)
        )
        return output

    def scale(self, values: Any = 0.05, kind: int | None = None) -> str:
        """A constant scale."""
        return self.constant(values, kind or self.data, "scale")

    def quantize(
        self,
        x: str,
        *,
        scale: str | None = None,
        zero: Any = 0,
        kind: int = INT8,
        data: int | None = None,
        **attributes: Any,
    ) -> str:
        """QuantizeLinear then DequantizeLinear; `data` is the output's type where it is not the scale's (opset 23)."""
        scale = scale or self.scale()
        point = self.constant(zero, kind, "zero")
        codes = self.op("QuantizeLinear", x, scale, point, **attributes)
        more = attributes if data is None else {**attributes, "output_dtype": data}
        return self.op("DequantizeLinear", codes, scale, point, **more)

    def clipped(self, x: str, low: float = -0.35, high: float = 0.4, **options: Any) -> str:
        """Quantize behind a Clip, as 4-bit codes are."""
        low, high = (self.constant(bound, self.data, "bound") for bound in (low, high))
        return self.quantize(self.op("Clip", x, low, high), **options)

    def codes(self, shape: Sequence[int], kind: int = INT8) -> str:
        """An initializer of random codes."""
        return self.constant(self.rng.integers(*RANGES[kind], tuple(shape)), kind, "codes")

    def weight(
        self,
        shape: Sequence[int],
        *,
        kind: int = INT8,
        axis: int | None = 0,
        block: int | None = None,
        zero: int | None = None,
        scale_kind: int | None = None,
        **attributes: Any,
    ) -> str:
        """Stored codes behind DequantizeLinear: one scale a channel of `axis`, a block of it, or (None) in all."""
        scale_shape: tuple[int, ...] = ()
        options: dict[str, Any] = dict(attributes)
        if axis is not None:
            options["axis"] = axis
            scale_shape = (shape[axis],)
        if axis is not None and block:
            options["block_size"] = block
            scale_shape = tuple(-(-n // block) if i == axis else n for i, n in enumerate(shape))
        scale = self.scale(self.rng.uniform(0.001, 0.01, scale_shape), scale_kind)
        inputs = [self.codes(shape, kind), scale]
        if zero is not None:
            inputs.append(self.constant(np.full(scale_shape, zero), kind, "zero"))
        return self.op("DequantizeLinear", *inputs, **options)

    def finish(self, *outputs: str, kind: int | None = None) -> onnx.ModelProto:
        """The model; types and shapes of its outputs are inferred."""
        graph = helper.make_graph(
            self.nodes,
            "pattern",
            self.inputs,
            [helper.make_tensor_value_info(name, kind or self.data, None) for name in outputs],
            self.initializers,
        )
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", self.opset)], ir_version=10)


def initializer(model: onnx.ModelProto, prefix: str) -> onnx.TensorProto:
    """The first initializer whose name starts with `prefix`."""
    return next(tensor for tensor in model.graph.initializer if tensor.name.startswith(prefix))


def overwrite(tensor: onnx.TensorProto, values: Any) -> None:
    """Give an initializer other values of its own type."""
    array = np.broadcast_to(np.asarray(values, numpy_helper.to_array(tensor).dtype), tuple(tensor.dims))
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(array), tensor.name))

"""fp16 and bf16 graphs: what changes its type, what must not, and which operators are found to need float32."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from quest_deploy.export.fragile import fragile_nodes
from quest_deploy.export.graph import lower_precision
from quest_deploy.export.passes.lower_precision import narrowed, stays_float
from tests.export.passes.test_passes import graph, run

TYPES = {"fp16": (TensorProto.FLOAT16, np.float16), "bf16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16)}
QUANTIZED = """
unet (float[n, 4] sample, float[n] timestep) => (float[n, 3] y) {
    angle = Mul(timestep, frequency)
    late = Greater(angle, limit)
    group = Cast<to = 7>(late)
    ratio = Gather(table, group)
    column = Unsqueeze(ratio, axis)
    active = Sigmoid(sample)
    scaled = Mul(active, column)
    clipped = Clip(scaled, low, high)
    codes = QuantizeLinear(clipped, step, zero)
    x = DequantizeLinear(codes, step)
    w = DequantizeLinear<axis = 1>(weight, scale)
    product = MatMul(x, w)
    y = Add(product, bias)
}"""
CONSTANTS = {
    "frequency": np.array([0.5], dtype=np.float32),
    "limit": np.array([250.0], dtype=np.float32),
    "table": np.array([1.0, 0.3], dtype=np.float32),
    "axis": np.array([1]),
    "low": np.array(-0.1, dtype=np.float32),
    "high": np.array(0.9, dtype=np.float32),
    "step": np.array(0.0123456, dtype=np.float32),
    "zero": np.array(0, dtype=np.int8),
    "weight": np.arange(-6, 6, dtype=np.int8).reshape(4, 3),
    "scale": np.array([0.5, 0.25, 2.0], dtype=np.float32),
    "bias": np.array([0.1, 1e6, -3.0], dtype=np.float32),
}


def quantized() -> ir.Model:
    return typed(graph(QUANTIZED, **CONSTANTS))


def typed(model: ir.Model) -> ir.Model:
    """With names, and the type of every value, which the exporter knows."""
    kinds = {"Greater": ir.DataType.BOOL, "Cast": ir.DataType.INT64, "QuantizeLinear": ir.DataType.INT8}
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        value.dtype = value.const_value.dtype
    for index, node in enumerate(model.graph):
        node.name = f"{index}/{node.op_type}"
        for value in node.outputs:
            if value.dtype is None:
                value.dtype = kinds.get(node.op_type, ir.DataType.FLOAT)
    return model


def types(proto: onnx.ModelProto) -> dict[str, int]:
    found = onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
    values = (*found.graph.value_info, *found.graph.output, *found.graph.input)
    kinds = {value.name: value.type.tensor_type.elem_type for value in values}
    return kinds | {one.name: one.data_type for one in found.graph.initializer}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_products_are_narrow_and_what_decides_codes_is_not(dtype: str) -> None:
    proto = ir.to_proto(lower_precision(quantized(), dtype, ()))
    onnx.checker.check_model(proto, full_check=True)
    kinds, (narrow, _) = types(proto), TYPES[dtype]
    assert proto.opset_import[0].version == 23
    assert {kinds[name] for name in ("x", "w", "product")} == {narrow}
    exact = (
        "angle",
        "ratio",
        "scaled",
        "clipped",
        "table",
        "step",
        "scale",
        "low",
        "sample",
        "timestep",
        "y",
    )
    assert {name: kinds[name] for name in exact} == dict.fromkeys(exact, TensorProto.FLOAT)
    assert kinds["active"] == narrow


def test_a_scale_is_the_same_number_as_in_float32() -> None:
    proto = ir.to_proto(lower_precision(quantized(), "fp16", ()))
    stored = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
    for name in ("step", "scale", "table", "low", "high"):
        assert stored[name].dtype == np.float32
        assert np.array_equal(stored[name], CONSTANTS[name]), name


def test_named_nodes_stay_and_one_cast_serves_all_readers() -> None:
    text = """
    g (float[n] x) => (float[n] a, float[n] b, float[n] c) { a = Exp(x)  b = Sin(x)  c = Cos(x) }"""
    model = graph(text)
    for node in model.graph:
        node.name = node.op_type
    proto = ir.to_proto(lower_precision(model, "fp16", {"Exp"}))
    readers = {
        node.op_type: node.input[0] for node in proto.graph.node if node.op_type in ("Exp", "Sin", "Cos")
    }
    assert readers["Exp"] == "x"
    assert readers["Sin"] == readers["Cos"] == "x_float16"
    assert [value.name for value in proto.graph.output] == ["a", "b", "c"]
    assert {value.type.tensor_type.elem_type for value in proto.graph.output} == {TensorProto.FLOAT}
    # In, and two of the three outputs back.
    assert [node.op_type for node in proto.graph.node].count("Cast") == 3


def test_a_graph_without_quantizers_keeps_its_operator_set() -> None:
    model = lower_precision(graph("g (float[n] x) => (float[n] y) { y = Exp(x) }"), "fp16", ())
    assert model.graph.opset_imports[""] == 21


def test_scales_of_a_resize_stay() -> None:
    text = 'g (float[1, 1, n, m] x) => (float[1, 1, p, q] y) { y = Resize<mode = "nearest">(x, , factors) }'
    model = lower_precision(graph(text, factors=np.array([1, 1, 2, 2], dtype=np.float32)), "fp16", ())
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    assert types(proto)["factors"] == TensorProto.FLOAT


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_constants_beyond_the_range_become_the_largest_number(dtype: str) -> None:
    kind = TYPES[dtype][1]
    values = np.array([np.finfo(np.float32).min, 1.0, np.inf, np.nan], dtype=np.float32)
    got = narrowed(values, {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[dtype]).astype(
        np.float32
    )
    assert got[0] == -float(ml_dtypes.finfo(kind).max)
    assert got[1] == 1.0
    assert got[2] == np.inf
    assert np.isnan(got[3])


def test_what_decides_codes_is_told_from_what_does_not() -> None:
    model = quantized()
    exact = {str(node.name).split("/")[1] for node in stays_float(model.graph, ir.DataType.FLOAT16)}
    assert {"Mul", "Clip", "Greater", "Gather", "Unsqueeze"} <= exact
    assert not exact & {"Sigmoid", "MatMul", "Add", "DequantizeLinear"}


@pytest.mark.parametrize("name", ["timestep", "guidance", "time_ids", "resolution", "img_ids"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_sines_of_large_numbers_are_taken_in_float32(name: str, dtype: str) -> None:
    text = f"""
    g (float[n, 1] {name}) => (float[n, 4] y) {{
        angles = Mul({name}, frequencies)
        y = Sin(angles)
    }}"""
    frequencies = np.array([[1.0, 0.31, 0.1, 0.031]], dtype=np.float32)
    model = lower_precision(typed(graph(text, frequencies=frequencies)), dtype, ())
    numbers = np.array([[3501.0], [1023.0]], dtype=np.float32)
    (got,) = run(model, **{name: numbers})
    np.testing.assert_allclose(got, np.sin(numbers * frequencies), atol=1e-3)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_what_becomes_an_index_is_computed_in_float32(dtype: str) -> None:
    text = """
    g (float[n] x) => (int64[n] bucket, float[n] y) {
        scaled = Mul(x, factor)
        logs = Log(scaled)
        bucket = Cast<to = 7>(logs)
        y = Neg(x)
    }"""
    model = lower_precision(typed(graph(text, factor=np.array(8.0, dtype=np.float32))), dtype, ())
    kinds = {node.op_type: node.inputs[0].dtype for node in model.graph}
    assert kinds["Log"] == ir.DataType.FLOAT and kinds["Neg"] != ir.DataType.FLOAT
    # A bucket ends just above these; rounded to either type some are in the next.
    x = np.exp(np.arange(1, 9, dtype=np.float32)) / 8 * np.float32(1 - 1e-5)
    assert run(model, x=x)[0].tolist() == [*range(8)]


def test_a_product_ends_what_decides_an_index() -> None:
    text = """
    g (float[n, k] x, float[k] weight) => (int64[n] index) {
        early = Neg(x)
        product = MatMul(early, weight)
        scaled = Abs(product)
        index = Cast<to = 7>(scaled)
    }"""
    model = typed(graph(text))
    exact = {node.op_type for node in stays_float(model.graph, ir.DataType.FLOAT16)}
    assert exact == {"Abs", "MatMul"}


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_nearest_code_is_found_in_float32(dtype: str) -> None:
    text = """
    g (float[n, 2] x) => (int64[n] nearest) {
        scores = MatMul(x, codebook)
        nearest = ArgMax<axis = 1, keepdims = 0>(scores)
    }"""
    codebook = np.array([[1.0, 1.0001], [0.0, 0.0]], dtype=np.float32)
    model = lower_precision(typed(graph(text, codebook=codebook)), dtype, ())
    assert run(model, x=np.array([[1.0, 0.0]], dtype=np.float32))[0].tolist() == [1]


def test_a_quantized_product_stays_one_also_where_an_index_follows() -> None:
    text = """
    g (int8[n, 2] q) => (int64[n] nearest) {
        x = DequantizeLinear(q, step)
        w = DequantizeLinear(codes, step)
        scores = MatMul(x, w)
        nearest = ArgMax<axis = 1, keepdims = 0>(scores)
    }"""
    parts = {"step": np.array(0.5, np.float32), "codes": np.ones((2, 3), np.int8)}
    model = typed(graph(text, **parts))
    assert {node.op_type for node in stays_float(model.graph, ir.DataType.FLOAT16)} == {"ArgMax"}


@pytest.mark.parametrize(("dtype", "stays"), [("fp16", True), ("bf16", False)])
def test_a_sum_with_what_the_type_takes_for_zero_stays(dtype: str, stays: bool) -> None:
    text = """
    g (float[n] x) => (float[n] y) {
        positive = Relu(x)
        y = Add(positive, tiny)
    }"""
    model = typed(graph(text, tiny=np.array(1e-15, np.float32)))
    kind = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}[dtype]
    assert ({node.op_type for node in stays_float(model.graph, kind)} == {"Add"}) is stays


def test_a_sum_with_many_that_the_type_takes_for_zero_stays() -> None:
    """Sana's linear attention divides by such a sum; its 1e-15 may have any shape."""
    small = np.full((1, 3), 1e-15, dtype=np.float32)
    mixed = np.array([[1e-15, 1.0, 0.0]], dtype=np.float32)
    for added, stays in ((small, True), (mixed, False), (np.zeros_like(small), False)):
        model = typed(graph("unet (float[n, 3] x) => (float[n, 3] y) { y = Add(x, small) }", small=added))
        assert bool(stays_float(model.graph, ir.DataType.FLOAT16)) == stays


def test_a_timestep_times_ones_is_one() -> None:
    text = """
    g (float[n] timestep, int64[k] shape) => (float[n] y) {
        ones = ConstantOfShape<value = float[1] {1.0}>(shape)
        many = Mul(timestep, ones)
        y = Sin(many)
    }"""
    model = typed(graph(text))
    exact = {node.op_type for node in stays_float(model.graph, ir.DataType.FLOAT16)}
    assert exact == {"Mul", "Sin"}


class TestFragile:
    """x - mean(x) of numbers far from zero cancels; a plain product does not."""

    TEXT = """
    g (float[n, 64] x) => (float[n, 64] y) {
        mean = ReduceMean<keepdims = 1>(x, axes)
        centred = Sub(x, mean)
        y = Mul(centred, two)
    }"""

    def model(self) -> ir.Model:
        model = graph(self.TEXT, axes=np.array([1]), two=np.array(2.0, dtype=np.float32))
        for node in model.graph:
            node.name, node.outputs[0].dtype = node.op_type, ir.DataType.FLOAT
        return model

    def found(self, offset: float, dtype: str = "fp16", size: float = 1.0) -> set[str]:
        x = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32) * size + np.float32(offset)
        return set(fragile_nodes(self.model(), [{"x": x}], dtype))

    def test_cancellation_is_found(self) -> None:
        assert self.found(0.0) == set()
        assert "Sub" in self.found(500.0)

    def test_less_of_it_is_borne_where_the_type_is_coarse(self) -> None:
        assert "Sub" not in self.found(20.0, "fp16")
        assert "Sub" in self.found(500.0, "bf16")

    def test_overflow_is_found(self) -> None:
        assert {"Sub", "Mul"} <= self.found(0.0, "fp16", size=1e5)
        assert self.found(0.0, "bf16", size=1e5) == set()

    def test_the_worst_input_counts(self) -> None:
        noise = np.random.default_rng(0).normal(size=(8, 64)).astype(np.float32)
        found = fragile_nodes(self.model(), [{"x": noise}, {"x": noise + 500}], "fp16")
        assert "Sub" in found
        assert found["Sub"] < 42

"""Float operators in fp16 or bf16, with everything that decides codes left in float32."""

from __future__ import annotations

from collections.abc import Collection

import ml_dtypes
import numpy as np
import onnx_ir as ir

from quest_deploy.export.lazy import mapped, sizes_of
from quest_deploy.model.spec import TIMESTEP

# Inputs that are numbers, not features: sines of large multiples are taken of them before the first product.
NUMBERS = {TIMESTEP, "guidance", "time_ids", "resolution", "aspect_ratio", "img_ids", "txt_ids"}
# They make tensors of a constant, to be multiplied with a timestep for instance.
FILLING = ("ConstantOfShape", "Expand")
# What they choose among floats is a matter of their order.
CHOOSING = ("ArgMin", "ArgMax", "TopK")
FLOAT = ir.DataType.FLOAT
DTYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
MATRIX_PRODUCTS = ("MatMul", "Gemm")
PRODUCTS = ("Conv", *MATRIX_PRODUCTS)
# They take any type and give the one they are told, or no float.
POLYMORPHIC = ("Cast", "Shape", "Size")
# Inputs whose type the operator fixes: regions and scales of an image.
FIXED_INPUTS = {"Resize": (1, 2)}
GRID = ("Clip", "Mul")


class LowerPrecision(ir.passes.InPlacePass):
    """Convert the float32 graph of a component to `dtype`; its inputs and outputs stay float32.

    Runs after :class:`CanonicalNames`, whose names `keep` uses, on a graph of operator set 23 if it has quantizers.

    1. Every float operator takes and gives `dtype`, its constants too (those beyond its range become its largest
       number). A Cast goes in wherever a value is used in another type than it has, one for all its readers.
    2. These stay in float32: nodes called in `keep`; what follows from the timestep and other numbers alone (guidance,
       image sizes, positions), up to the first product (a timestep of 999 has no bfloat16, and comparisons choose the
       timestep group); what becomes an index, back to the last product and with it, unless that is quantized (T5's
       buckets of distances are logarithms, the nearest code of a VQ-VAE hangs on a small difference); a sum with a
       constant that the type does not tell from zero; the multiply and the Clip in front of a QuantizeLinear; every
       scale.
    3. DequantizeLinear gives `dtype` by its `output_dtype`, so that a scale is the same number as in float32. Scales of
       blocks of INT4 are the exception: products with such weights exist with scales of the product's type alone.
       Other weights that meet a float activation in a MatMul or Gemm get a Cast behind: ONNX Runtime fuses such a pair
       without a look at the types, and then refuses it.
    4. Must not touch integers, nor inputs that an operator wants in float32 (scales of Resize).

    Args:
        dtype: "fp16" or "bf16".
        keep: Names of nodes that stay in float32.
    """

    def __init__(self, dtype: str, keep: Collection[str] = ()) -> None:
        super().__init__()
        self.dtype = DTYPES[dtype]
        self.keep = frozenset(keep)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        graph = model.graph
        exact = stays_float(graph, self.dtype) | {node for node in graph if node.name in self.keep}
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        for node in list(graph):
            if node.attributes.get_int("block_size", 0) and node.op_type == "DequantizeLinear":
                self._convert_input(graph, node, 1, self.dtype, casts)
                node.outputs[0].dtype = self.dtype
            elif node.op_type == "DequantizeLinear" and is_weight_alone(node):
                continue
            elif node.op_type == "DequantizeLinear":
                node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", self.dtype)
                node.outputs[0].dtype = self.dtype
            elif node.op_type == "QuantizeLinear":
                self._convert_input(graph, node, 0, FLOAT, casts)
            elif node.op_type not in POLYMORPHIC:
                wanted = FLOAT if node in exact else self.dtype
                for index, value in enumerate(node.inputs):
                    if value is not None and index not in FIXED_INPUTS.get(node.op_type, ()):
                        self._convert_input(graph, node, index, wanted, casts)
                for value in node.outputs:
                    if value.dtype == FLOAT:
                        value.dtype = wanted
        self._restore_outputs(graph)
        return ir.passes.PassResult(model, modified=True)

    def _convert_input(
        self,
        graph: ir.Graph,
        node: ir.Node,
        index: int,
        wanted: ir.DataType,
        casts: dict[tuple[ir.Value, ir.DataType], ir.Value],
    ) -> None:
        value = node.inputs[index]
        assert value is not None
        if value.dtype not in (FLOAT, self.dtype) or value.dtype == wanted:
            return
        if (value, wanted) not in casts:
            constant = value.is_initializer() and value.const_value is not None
            casts[value, wanted] = (
                _constant(graph, value, wanted) if constant else _cast(graph, value, wanted)
            )
        node.replace_input_with(index, casts[value, wanted])

    def _restore_outputs(self, graph: ir.Graph) -> None:
        """Give the graph's outputs back their type, under their names."""
        for index, value in enumerate(graph.outputs):
            if value.dtype != self.dtype:
                continue
            name = value.name
            value.name = f"{name}_{self.dtype.name.lower()}"
            node = ir.node("Cast", [value], attributes={"to": FLOAT})
            output = node.outputs[0]
            output.name, output.dtype, output.shape = name, FLOAT, value.shape
            node.name = f"{name}/Cast"
            graph.append(node)
            graph.outputs[index] = output


def is_weight_alone(dequantize: ir.Node) -> bool:
    """Whether stored codes are for matrix products with float activations."""
    codes = dequantize.inputs[0]
    producer = None if codes is None else codes.producer()
    if producer is not None and producer.op_type == "Cast":
        codes = producer.inputs[0]
    uses = list(dequantize.outputs[0].uses())
    if codes is None or not codes.is_initializer() or not uses:
        return False
    return all(
        use.node.op_type in MATRIX_PRODUCTS and not _other_has_codes(use.node, use.idx) for use in uses
    )


def _other_has_codes(product: ir.Node, operand: int) -> bool:
    others = [value for index, value in enumerate(product.inputs[:2]) if index != operand]
    producers = [None if value is None else value.producer() for value in others]
    return any(producer is not None and producer.op_type == "DequantizeLinear" for producer in producers)


def stays_float(graph: ir.Graph, dtype: ir.DataType) -> set[ir.Node]:
    """The nodes that decide codes and indices, and sums with tiny constants: rule 2, without those that are named."""
    timed = timed_values(graph)
    exact = {node for node in graph if node.outputs[0] in timed} | index_nodes(graph)
    exact |= {node for node in graph if node.op_type == "Add" and _adds_what_vanishes(node, dtype)}
    for node in graph:
        if node.op_type == "QuantizeLinear":
            exact.update(grid_nodes(node, timed))
    return exact


def timed_values(graph: ir.Graph) -> set[ir.Value]:
    """What follows from the timestep and the like (and constants and shapes) without a product."""
    timed = {value for value in graph.inputs if value.name in NUMBERS}
    filled: set[ir.Value] = set()
    for node in graph:
        given = [value for value in node.inputs if value is not None and not value.is_initializer()]
        known = [value for value in given if value.dtype not in (ir.DataType.INT64, None) or value in timed]
        known = [value for value in known if value not in filled]
        if not known and node.op_type in FILLING:
            filled |= set(node.outputs)
        if known and all(value in timed for value in known) and node.op_type not in PRODUCTS:
            timed |= set(node.outputs)
    return timed


def index_nodes(graph: ir.Graph) -> set[ir.Node]:
    """The float nodes behind which something makes integers, back to products and with those of floats."""
    choosing = {node for node in graph if node.op_type in CHOOSING or _makes_integers(node)}
    found = {node for node in choosing if node.op_type in CHOOSING}
    waiting = [value for node in choosing for value in node.inputs]
    while waiting:
        value = waiting.pop()
        node = None if value is None or value.dtype != FLOAT else value.producer()
        if node is None or node in found:
            continue
        if node.op_type not in PRODUCTS:
            found.add(node)
            waiting += node.inputs
        elif not any(_other_has_codes(node, operand) for operand in (0, 1)):
            found.add(node)
    return found


def _adds_what_vanishes(node: ir.Node, dtype: ir.DataType) -> bool:
    for value in node.inputs:
        if value is None or not value.is_initializer() or value.const_value is None or value.dtype != FLOAT:
            continue
        numbers = value.const_value.numpy()
        if numbers.any() and not narrowed(numbers, dtype).any():
            return True
    return False


def _makes_integers(node: ir.Node) -> bool:
    if node.op_type != "Cast":
        return False
    source, kind = node.inputs[0], node.outputs[0].dtype
    return source is not None and source.dtype == FLOAT and kind is not None and kind.is_integer()


def grid_nodes(quantize: ir.Node, timed: Collection[ir.Value]) -> list[ir.Node]:
    """The multiply and the Clip in front of a QuantizeLinear."""
    found: list[ir.Node] = []
    value = quantize.inputs[0]
    while value is not None:
        node = value.producer()
        if node is None or node.op_type not in GRID:
            break
        data = [
            one for one in node.inputs if one is not None and not one.is_initializer() and one not in timed
        ]
        if len(data) != 1 or (node.op_type == "Mul" and value in timed):
            break
        found.append(node)
        if node.op_type == "Mul":
            break
        value = data[0]
    return found


def _cast(graph: ir.Graph, value: ir.Value, wanted: ir.DataType) -> ir.Value:
    node = ir.node("Cast", [value], attributes={"to": wanted})
    output = node.outputs[0]
    output.dtype, output.shape, output.name = wanted, value.shape, f"{value.name}_{wanted.name.lower()}"
    node.name = f"{value.name}/Cast_{wanted.name.lower()}"
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], node)
    else:
        graph.insert_after(producer, node)
    return output


def _constant(graph: ir.Graph, value: ir.Value, wanted: ir.DataType) -> ir.Value:
    """An initializer in another type, computed when it is written."""
    source = value.const_value
    assert source is not None
    name = f"{value.name}_{wanted.name.lower()}"

    shape = sizes_of(source)
    tensor = mapped(source, lambda values: narrowed(values, wanted), shape=shape, dtype=wanted, name=name)
    output = ir.Value(name=name, type=ir.TensorType(wanted), shape=ir.Shape(shape), const_value=tensor)
    graph.register_initializer(output)
    return output


def narrowed(values: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """float32 values rounded to `dtype`; finite ones stay finite."""
    kind = dtype.numpy()
    limit = float(ml_dtypes.finfo(kind).max)
    return np.where(np.isfinite(values), values.clip(-limit, limit), values).astype(kind)

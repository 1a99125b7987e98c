"""Take products out of low precision: floats on both sides, on the weights that the codes stand for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from quest_deploy.export.lazy import sizes_of
from quest_deploy.export.lint.view import (
    MOVES,
    Dequantizer,
    Operand,
    Product,
    constant,
    integer,
    look_at,
    walk_up,
)

_LOW, _HIGH = -128, 127


class RemoveQuantizers(ir.passes.InPlacePass):
    """Let the named products multiply unquantized activations by dequantized weights, in the graph's float type.

    1. Fires on a product that is named, where every operand that comes from a DequantizeLinear can be taken from there.
    2. An activation is what QuantizeLinear reads, before the Clip that keeps it on the quantizer's grid. It is cast to
       the type that DequantizeLinear gave, where it has another or its type is unknown; a Cast from that very type is
       skipped instead. What only moves values between quantizer and product is repeated for this product, so that
       others, which read the same codes, stay as they are.
    3. A weight becomes an initializer of the type that DequantizeLinear gave; codes in blocks and of four bits, too.
       Products that shared a DequantizeLinear share it.
    4. Must not fire on other products, nor inside nested graphs, nor where an operand's codes are inputs of the graph,
       computed or gathered. A Clip stays whose bounds are no codes of the quantizer: it is the model's own.

    Multiplications in front of QuantizeLinear and behind the product (scales by timestep) stay: they cancel out.

    Args:
        products: Names of nodes, as :func:`quest_deploy.export.lint.view.look_at` gives them.
    """

    def __init__(self, products: Collection[str]) -> None:
        super().__init__()
        self.products = frozenset(products)

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        modified = False
        folded: dict[ir.Node, ir.Value] = {}
        for product in look_at(str(model.graph.name), model).products:
            if product.node.name in self.products and is_removable(product, model.graph):
                for operand in product.operands:
                    if operand.dequantizer is not None:
                        _replace(product.node, operand, operand.dequantizer, folded)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def is_removable(product: Product, graph: ir.Graph) -> bool:
    """Whether rules 1 and 4 let the quantizers of a product of `graph` go."""
    return (
        product.node.graph is graph and bool(product.dequantizers) and all(map(_can_go, product.dequantizers))
    )


def _can_go(dequantizer: Dequantizer) -> bool:
    if float_type(dequantizer.node) is None:
        return False
    if dequantizer.origin == "quantized":
        return all(op_type in MOVES for op_type in dequantizer.codes_through)
    if dequantizer.origin != "stored" or not set(dequantizer.codes_through) <= {"Cast"}:
        return False
    scale = dequantizer.node.inputs[1]
    return _stored(dequantizer) is not None and scale is not None and scale.const_value is not None


def float_type(dequantize: ir.Node) -> ir.DataType | None:
    """The type that a DequantizeLinear gives: its attribute, or its scale's."""
    chosen, scale = integer(dequantize, "output_dtype", 0), dequantize.inputs[1]
    return ir.DataType(chosen) if chosen else None if scale is None else scale.dtype


def _replace(
    node: ir.Node, operand: Operand, dequantizer: Dequantizer, folded: dict[ir.Node, ir.Value]
) -> None:
    """Give `node` the operand before it was quantized."""
    places = [index for index, read in enumerate(node.inputs) if read is operand.value]
    prefix = f"{node.name}/float/{places[0]}" if places else ""
    if dequantizer.quantizer is None:
        if dequantizer.node not in folded:
            folded[dequantizer.node] = _fold(node, dequantizer)
        value, moves = folded[dequantizer.node], operand.through
    else:
        codes = dequantizer.node.inputs[0]
        assert codes is not None
        value = _as_type(node, _unclipped(dequantizer.quantizer), dequantizer.node, f"{prefix}/cast")
        moves = (*operand.through, *walk_up(codes)[1])
    for step, move in enumerate(reversed(moves)):
        dtype = move.outputs[0].dtype if move.op_type == "Cast" else value.dtype
        inputs = [value, *move.inputs[1:]]
        value = _insert(node, move.op_type, inputs, move.attributes, f"{prefix}/{step}", dtype)
    for index in places:
        node.replace_input_with(index, value)


def _unclipped(quantize: ir.Node) -> ir.Value:
    """What a quantizer is about: its input, or that of the Clip that bounds it to whole codes of its scale."""
    value = quantize.inputs[0]
    assert value is not None
    clip, scale = value.producer(), constant(quantize.inputs[1])
    if clip is None or clip.op_type != "Clip" or clip.inputs[0] is None or scale is None or scale.size != 1:
        return value
    bounds = [constant(bound) for bound in clip.inputs[1:]]
    codes = [None if bound is None else float(bound) / float(scale.item()) for bound in bounds]
    own = len(codes) == 2 and all(
        code is not None and _LOW <= round(code) <= _HIGH and abs(code - round(code)) < 1e-4 for code in codes
    )
    return clip.inputs[0] if own else value


def _as_type(node: ir.Node, value: ir.Value, dequantize: ir.Node, name: str) -> ir.Value:
    """`value` in the type that `dequantize` gives."""
    wanted = float_type(dequantize)
    assert wanted is not None
    if value.dtype == wanted:
        return value
    producer = value.producer()
    if producer is not None and producer.op_type == "Cast" and value.dtype == ir.DataType.FLOAT:
        source = producer.inputs[0]
        if source is not None and source.dtype == wanted:
            return source
    return _insert(node, "Cast", [value], {"to": ir.AttrInt64("to", wanted)}, name, wanted)


def _insert(
    node: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, ir.Attr],
    name: str,
    dtype: ir.DataType | None,
) -> ir.Value:
    """The output of a new operator in front of `node`."""
    assert isinstance(node.graph, ir.Graph)
    new = ir.node(op_type, inputs, attributes=attributes, name=name)
    new.outputs[0].name = f"{name}/out"
    if dtype is not None:
        new.outputs[0].dtype = dtype
    node.graph.insert_before(node, new)
    return new.outputs[0]


def _stored(dequantizer: Dequantizer) -> ir.Value | None:
    """The initializer that holds the codes of a weight, before a Cast unpacks them."""
    codes = dequantizer.node.inputs[0]
    source = None if codes is None else walk_up(codes, ("Cast",))[0]
    return source if source is not None and source.const_value is not None else None


def _fold(node: ir.Node, dequantizer: Dequantizer) -> ir.Value:
    """The weight that codes stand for, as an initializer that is computed when it is written."""
    wanted, codes, scale = float_type(dequantizer.node), _stored(dequantizer), dequantizer.node.inputs[1]
    assert wanted is not None and codes is not None and codes.const_value is not None and scale is not None
    assert isinstance(node.graph, ir.Graph)
    points = dequantizer.node.inputs[2] if len(dequantizer.node.inputs) > 2 else None
    name, stored = f"{dequantizer.node.name}/float", codes.const_value
    shape = ir.Shape(sizes_of(stored))
    scales, point = constant(scale), constant(points)
    assert scales is not None

    def compute() -> ir.Tensor:
        values = stored.numpy().astype(np.float32)
        if point is not None:
            values = values - _spread(point, values.shape, dequantizer)
        values = values * _spread(scales, values.shape, dequantizer)
        return ir.Tensor(values.astype(wanted.numpy()), dtype=wanted, shape=shape, name=name)

    weight = ir.Value(
        name=name,
        type=ir.TensorType(wanted),
        shape=shape,
        const_value=ir.LazyTensor(compute, dtype=wanted, shape=shape, name=name),
    )
    node.graph.register_initializer(weight)
    return weight


def _spread(numbers: np.ndarray, shape: tuple[int, ...], dequantizer: Dequantizer) -> np.ndarray:
    """One number for each element of `shape`, from one in all, one a channel or one a block."""
    numbers = numbers.astype(np.float32)
    if numbers.size == 1:
        return numbers.reshape(())
    assert dequantizer.axis is not None
    if dequantizer.block_size:
        repeated = np.repeat(numbers, dequantizer.block_size, axis=dequantizer.axis)
        return repeated.take(range(shape[dequantizer.axis]), axis=dequantizer.axis)
    return numbers.reshape([-1 if axis == dequantizer.axis else 1 for axis in range(len(shape))])

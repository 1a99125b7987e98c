"""Move the channel rows that multiply a product's input into what makes that input."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quest_deploy.export.lazy import mapped, sizes_of
from quest_deploy.export.nodes import is_alone, is_constant

# What the product of an input and its row goes to.
READERS = {"Clip", "QuantizeLinear", "MatMul", "Gemm", "Conv"}
BY_TOKEN = [0, 2, 1, 3]


@dataclass(frozen=True)
class _Row:
    """One factor for each channel.

    Attributes:
        values: float32 [c].
        last: Whether the channels are the last axis; otherwise they are the second.
    """

    values: np.ndarray
    last: bool


@dataclass(frozen=True)
class _Scaled:
    """A constant input of a node, times `factor` along `axis`."""

    node: ir.Node
    index: int
    factor: np.ndarray
    axis: int


class FoldRows(ir.passes.InPlacePass):
    """Drop ``Mul(x, row)`` in front of a product, with `row` one constant for each channel, where `x` can take it over.

    1. ``x = LayerNormalization`` (channels last) or ``GroupNormalization`` (channels second): into its scale and bias.
    2. ``x = Mul(value, gate)`` (GEGLU), with `value` a part of a ``Split`` of a quantized linear layer's output: into
       that part of the layer's weight scale and bias.
    3. ``x`` the heads of ``MatMul(probabilities, values)`` put together: into the weight scale of the layer that makes
       the values.
    4. Factors for each sample (1/r of time-aware layers) may lie between; they stay.
    5. Must not fire where anything reads the unscaled value, or any value on the way, besides; where two readers have
       different rows; where the weight is no integer behind DequantizeLinear, or has another reader.

    The product's operands are the same numbers as before up to a rounding of float32.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        modified = False
        for node in list(model.graph):
            if node.graph is None or (found := _row_of(node)) is None:
                continue
            source, row = found
            readers = [use.node for use in source.uses()]
            if source.is_graph_output() or not all(_same(reader, source, row) for reader in readers):
                continue
            changes = _takes(source, row)
            if changes is None:
                continue
            for change in changes:
                _scale(model.graph, change)
            for reader in readers:
                reader.outputs[0].replace_all_uses_with(source)
                model.graph.remove(reader, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _row_of(node: ir.Node) -> tuple[ir.Value, _Row] | None:
    """What a `Mul` multiplies, and its row."""
    if node.op_type != "Mul" or node.outputs[0].is_graph_output():
        return None
    if not all(use.node.op_type in READERS and use.idx == 0 for use in node.outputs[0].uses()):
        return None
    for source, factor in (node.inputs, reversed(node.inputs)):
        if source is None or factor is None or not is_constant(factor) or is_constant(source):
            continue
        shape = sizes_of(factor.const_value)  # type: ignore[arg-type]
        axes = [axis for axis, size in enumerate(shape) if size != 1]
        if len(axes) == 1 and (axes[0] == len(shape) - 1 or (axes[0] == 1 and len(shape) > 2)):
            values = factor.const_value.numpy().reshape(-1)  # type: ignore[union-attr]
            return source, _Row(values, last=axes[0] == len(shape) - 1)
    return None


def _same(reader: ir.Node, source: ir.Value, row: _Row) -> bool:
    found = _row_of(reader)
    if found is None or found[0] is not source:
        return False
    return found[1].last == row.last and np.array_equal(found[1].values, row.values)


def _takes(value: ir.Value, row: _Row) -> list[_Scaled] | None:
    """The constants whose change multiplies `value` by `row`; None if it cannot be done so."""
    node = value.producer()
    rule = None if node is None else RULES.get(node.op_type)
    return None if rule is None or node is None else rule(node, value, row)


def _operand(value: ir.Value | None, row: _Row) -> list[_Scaled] | None:
    return _takes(value, row) if value is not None and is_alone(value) else None


def _constants(node: ir.Node, indices: tuple[int, ...], row: _Row) -> list[_Scaled] | None:
    """Changes of inputs [c] of a node; those that are missing are left out."""
    changes = []
    for index in indices:
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            continue
        if not is_constant(value) or sizes_of(value.const_value) != row.values.shape:  # type: ignore[arg-type]
            return None
        changes.append(_Scaled(node, index, row.values, 0))
    return changes or None


def _layer_norm(node: ir.Node, value: ir.Value, row: _Row) -> list[_Scaled] | None:
    last = node.attributes.get_int("axis", -1) == -1
    return _constants(node, (1, 2), row) if last and row.last and value is node.outputs[0] else None


def _group_norm(node: ir.Node, value: ir.Value, row: _Row) -> list[_Scaled] | None:
    return None if row.last else _constants(node, (1, 2), row)


def _mul(node: ir.Node, value: ir.Value, row: _Row) -> list[_Scaled] | None:
    for operand in node.inputs:
        if (changes := _operand(operand, row)) is not None:
            return changes
    return None


def _add(node: ir.Node, value: ir.Value, row: _Row) -> list[_Scaled] | None:
    for index, bias in enumerate(node.inputs):
        if not is_constant(bias):
            continue
        shape = sizes_of(bias.const_value)  # type: ignore[union-attr, arg-type]
        axis = max(0, len(shape) - 1) if row.last else 1
        if len(shape) <= axis or shape[axis] != row.values.size or math.prod(shape) != row.values.size:
            return None
        changes = _operand(node.inputs[1 - index], row)
        return None if changes is None else [*changes, _Scaled(node, index, row.values, axis)]
    return None


def _split(node: ir.Node, value: ir.Value, row: _Row) -> list[_Scaled] | None:
    """A row of ones but for this part, for what is split; the other parts stay as they are."""
    parts = node.attributes.get_int("num_outputs", 0)
    rank = None if node.inputs[0] is None or node.inputs[0].shape is None else len(node.inputs[0].shape)
    axis = node.attributes.get_int("axis", 0)
    last = axis == -1 or (rank is not None and axis == rank - 1)
    if not (parts and len(node.inputs) == 1 and last and row.last):
        return None
    size, start = row.values.size, node.outputs.index(value) * row.values.size
    whole = np.ones(parts * size, dtype=row.values.dtype)
    whole[start : start + size] = row.values
    return _operand(node.inputs[0], _Row(whole, last=True))


def _product(node: ir.Node, value: ir.Value, row: _Row) -> list[_Scaled] | None:
    """A linear layer without bias, its integer weight behind DequantizeLinear(codes [k, n], scale [n])."""
    weight = node.inputs[1]
    dequantize = None if weight is None else weight.producer()
    if not row.last or not is_alone(weight) or dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    codes = dequantize.inputs[0]
    by_output = dequantize.attributes.get_int("axis", 1) in (1, -1)
    plain = dequantize.attributes.get_int("block_size", 0) == 0
    if not (by_output and plain and is_constant(codes)):
        return None
    if sizes_of(codes.const_value)[1:] != row.values.shape:  # type: ignore[union-attr, arg-type]
        return None
    return _constants(dequantize, (1,), row)


def _reshape(node: ir.Node, value: ir.Value, row: _Row) -> list[_Scaled] | None:
    """Heads [n, h, tokens, d] put together, of a product with values that a layer made as [n, tokens, h * d]."""
    width = row.values.size
    together = _producer(node.inputs[0], "Transpose")
    if not row.last or _last_sizes(node.inputs[1], 1) != [width] or not _by_token(together):
        return None
    attended = _producer(together.inputs[0], "MatMul")  # type: ignore[union-attr]
    apart = None if attended is None else _producer(attended.inputs[1], "Transpose")
    heads = _producer(apart.inputs[0], "Reshape") if apart is not None and _by_token(apart) else None
    if heads is None:
        return None
    sizes = _last_sizes(heads.inputs[1], 2)
    return _operand(heads.inputs[0], row) if sizes and math.prod(sizes) == width else None


def _producer(value: ir.Value | None, operator: str) -> ir.Node | None:
    node = value.producer() if value is not None and is_alone(value) else None
    return node if node is not None and node.op_type == operator else None


def _by_token(node: ir.Node | None) -> bool:
    return node is not None and list(node.attributes.get_ints("perm", ())) == BY_TOKEN


def _last_sizes(shape: ir.Value | None, count: int) -> list[int] | None:
    """The last sizes of a shape that is constant there."""
    if shape is None:
        return None
    if is_constant(shape):
        sizes = [int(size) for size in shape.const_value.numpy()]  # type: ignore[union-attr]
        return sizes[-count:] if len(sizes) >= count and min(sizes[-count:]) > 0 else None
    node = shape.producer()
    if node is None or node.op_type != "Concat" or len(node.inputs) < count:
        return None
    if not all(is_constant(part) for part in node.inputs[-count:]):
        return None
    known = [part.const_value.numpy().reshape(-1) for part in node.inputs[-count:]]  # type: ignore[union-attr]
    return [int(part[0]) for part in known] if all(part.size == 1 and part[0] > 0 for part in known) else None


RULES: dict[str, Callable[[ir.Node, ir.Value, _Row], list[_Scaled] | None]] = {
    "LayerNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "Mul": _mul,
    "Add": _add,
    "Split": _split,
    "MatMul": _product,
    "Reshape": _reshape,
}


def _scale(graph: ir.Graph, change: _Scaled) -> None:
    value = change.node.inputs[change.index]
    assert value is not None and value.const_value is not None
    tensor = value.const_value
    sizes = sizes_of(tensor)
    factor = change.factor.reshape([-1 if axis == change.axis else 1 for axis in range(len(sizes))])
    name = value.name if len(value.uses()) == 1 else f"{value.name}/{change.node.outputs[0].name}/rows"
    scaled = mapped(tensor, lambda values: values * factor, shape=sizes, name=name)
    if name == value.name:
        value.const_value = scaled
        return
    own = ir.Value(name=name, type=value.type, shape=value.shape, const_value=scaled)
    graph.register_initializer(own)
    change.node.replace_input_with(change.index, own)

"""Attention in float as one operator, which never writes its scores out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from quest_deploy.export.nodes import is_alone, is_constant
from quest_deploy.export.passes.transpose_keys import SWAP_LAST, permutation

# ONNX Runtime's. The standard's Attention (opset 23) writes the scores out in ONNX Runtime 1.32.
DOMAIN, OPERATOR = "com.microsoft", "MultiHeadAttention"
SWAP = [0, 2, 1, 3]
# What may stand between an operand and its DequantizeLinear.
ROUTES = ("Mul", "Reshape", "Transpose")


@dataclass(frozen=True)
class _Attention:
    """``softmax(scale * q kᵀ) v``, heads apart.

    Attributes:
        queries: [b, heads, tokens, d].
        keys: [b, heads, keys, d], before they are transposed.
        values: [b, heads, keys, d].
        scale: What scores are multiplied by.
        softmax: The node.
        product: The second MatMul, [b, heads, tokens, d].
    """

    queries: ir.Value
    keys: ir.Value
    values: ir.Value
    scale: float
    softmax: ir.Node
    product: ir.Node

    @property
    def heads(self) -> int:
        return _size(self.queries, 1)

    @property
    def features(self) -> int:
        return self.heads * _size(self.queries, 3)


class FuseAttention(ir.passes.InPlacePass):
    """``MatMul(Softmax(MatMul(q · c, kᵀ · c)), v)`` becomes ``com.microsoft.MultiHeadAttention(q, k, v)``.

    ONNX Runtime then works through the scores block by block (flash attention); else it keeps all of them, and their
    softmax: 2 GB at 8 heads, 64 x 64 latents and both branches of guidance. OpenVINO reads the operator, too.

    Runs after :class:`TransposeKeys`.

    1. Fires where q, k and v are [b, heads, tokens, d] with known heads and d, a ``Transpose`` of k is in front of the
       product, and q, k and scores are multiplied by nothing but constants: those become the operator's ``scale``.
    2. The operator takes [b, tokens, heads * d]. A ``Transpose(Reshape(x))`` that parted the heads goes, as does the
       ``Reshape(Transpose)`` that joins them; where there is none, one comes.
    3. Must not fire where q, k, v or the probabilities are quantized (ONNX Runtime has integer products for them), with
       a mask (its blocks are not worked through with one), where anything else reads the scores or probabilities, on a
       softmax of another axis, nor where heads have different sizes.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        found = [
            one
            for node in model.graph
            if node.op_type == "Softmax" and (one := _attention_of(node)) is not None
        ]
        for one in found:
            _fuse(model.graph, one)
        if found:
            model.graph.opset_imports.setdefault(DOMAIN, 1)
        return ir.passes.PassResult(model, modified=bool(found))


def _attention_of(softmax: ir.Node) -> _Attention | None:
    probabilities, scores = softmax.outputs[0], softmax.inputs[0]
    if softmax.attributes.get_int("axis", -1) not in (-1, 3) or not is_alone(probabilities):
        return None
    product = next(iter(probabilities.uses())).node
    scaled = _unscaled(scores)
    first = None if scaled is None else scaled[0].producer()
    if product.op_type != "MatMul" or product.inputs[0] is not probabilities:
        return None
    if first is None or first.op_type != "MatMul" or not is_alone(scaled[0]):  # type: ignore[index]
        return None
    queries, transposed = _unscaled(first.inputs[0]), _unscaled(first.inputs[1])
    keys = None if transposed is None else _before_transpose(transposed[0])
    values = product.inputs[1]
    if queries is None or transposed is None or keys is None or values is None:
        return None
    scale = scaled[1] * queries[1] * transposed[1]  # type: ignore[index]
    found = _Attention(queries[0], keys, values, scale, softmax, product)
    parts = (found.queries, found.keys, found.values)
    if any(_size(part, axis) != _size(found.queries, axis) for part in parts for axis in (1, 3)):
        return None
    known = all(size > 0 for size in (_size(found.queries, 1), _size(found.queries, 3)))
    return found if known and not any(_is_quantized(part) for part in parts) else None


def _size(value: ir.Value, axis: int) -> int:
    """The size of an axis of four; 0 where it is not known."""
    shape = value.shape
    size = None if shape is None or len(shape) != 4 else shape[axis]
    return size if isinstance(size, int) else 0


def _unscaled(value: ir.Value | None) -> tuple[ir.Value, float] | None:
    """What a value is before it is multiplied by constants of one element, and their product."""
    factor = 1.0
    while value is not None and (node := value.producer()) is not None and node.op_type in ("Mul", "Div"):
        constants = [one for one in node.inputs if is_constant(one) and one.const_value.size == 1]  # type: ignore[union-attr]
        if len(constants) != 1 or (node.op_type == "Div" and node.inputs[1] is not constants[0]):
            break
        number = float(constants[0].const_value.numpy().item())  # type: ignore[union-attr]
        factor *= number if node.op_type == "Mul" else 1 / number
        value = node.inputs[1 - node.inputs.index(constants[0])]
    return None if value is None else (value, factor)


def _before_transpose(value: ir.Value) -> ir.Value | None:
    """k of [b, heads, keys, d], from kᵀ; None where it is no such transpose."""
    node = value.producer()
    swaps = node is not None and node.op_type == "Transpose" and permutation(node) == SWAP_LAST
    return node.inputs[0] if node is not None and swaps else None


def _is_quantized(value: ir.Value) -> bool:
    node = value.producer()
    while node is not None and node.op_type in ROUTES:
        value = next((one for one in node.inputs if one is not None and not is_constant(one)), value)
        node = None if value.producer() is node else value.producer()
    return node is not None and node.op_type == "DequantizeLinear"


def _fuse(graph: ir.Graph, one: _Attention) -> None:
    shape = _constant(graph, f"quest_deploy.joined.{one.features}", [0, 0, one.features])
    inputs = [_joined(graph, part, one, shape) for part in (one.queries, one.keys, one.values)]
    attributes = {"num_heads": one.heads, "scale": float(np.float32(one.scale))}
    node = _insert(graph, one, OPERATOR, inputs, attributes, domain=DOMAIN)
    result = node.outputs[0]
    result.shape, result.type = inputs[0].shape, one.product.outputs[0].type
    output = one.product.outputs[0]
    reshape = _joins(output, one)
    if reshape is not None:
        result.shape = reshape.outputs[0].shape
        _replace(reshape.outputs[0], result)
        return
    size = one.features // one.heads
    apart = _constant(graph, f"quest_deploy.parted.{one.heads}.{size}", [0, 0, one.heads, size])
    parted = _insert(graph, one, "Reshape", [result, apart], {}).outputs[0]
    batch, heads, tokens, _ = output.shape  # type: ignore[misc]
    parted.shape, parted.type = ir.Shape([batch, tokens, heads, size]), result.type
    swapped = _insert(graph, one, "Transpose", [parted], {"perm": SWAP}).outputs[0]
    swapped.shape, swapped.type = output.shape, result.type
    _replace(output, swapped)


def _replace(old: ir.Value, new: ir.Value) -> None:
    """Let `new` be read in place of `old`; an output of the graph keeps its name."""
    if old.is_graph_output():
        new.name, old.name = old.name, f"{old.name}.before"
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _joined(graph: ir.Graph, part: ir.Value, one: _Attention, shape: ir.Value) -> ir.Value:
    """[b, heads, tokens, d] as [b, tokens, heads * d]."""
    node = part.producer()
    if node is not None and node.op_type == "Transpose" and permutation(node) == SWAP:
        parted = node.inputs[0].producer()  # type: ignore[union-attr]
        source = parted.inputs[0] if parted is not None and parted.op_type == "Reshape" else None
        wanted = [*part.shape[:1], part.shape[2], one.features]  # type: ignore[index]
        if source is not None and source.shape is not None and list(source.shape) == wanted:
            return source
    batch, heads, tokens, size = part.shape  # type: ignore[misc]
    swapped = _insert(graph, one, "Transpose", [part], {"perm": SWAP}).outputs[0]
    swapped.shape, swapped.type = ir.Shape([batch, tokens, heads, size]), part.type
    joined = _insert(graph, one, "Reshape", [swapped, shape], {}).outputs[0]
    joined.shape, joined.type = ir.Shape([batch, tokens, one.features]), part.type
    return joined


def _joins(output: ir.Value, one: _Attention) -> ir.Node | None:
    """The Reshape behind a Transpose that joins the heads of `output`, which nothing else reads."""
    value = output
    for kind in ("Transpose", "Reshape"):
        node = next(iter(value.uses())).node if is_alone(value) else None
        if node is None or node.op_type != kind or (kind == "Transpose" and permutation(node) != SWAP):
            return None
        value = node.outputs[0]
    batch, _, tokens, _ = output.shape  # type: ignore[misc]
    return node if value.shape is not None and list(value.shape) == [batch, tokens, one.features] else None


def _insert(
    graph: ir.Graph,
    one: _Attention,
    kind: str,
    inputs: list[ir.Value],
    attributes: Mapping[str, object],
    *,
    domain: str = "",
) -> ir.Node:
    node = ir.node(kind, inputs, attributes=attributes, domain=domain)  # type: ignore[arg-type]
    node.metadata_props.update(one.softmax.metadata_props)
    graph.insert_before(one.product, node)
    return node


def _constant(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        kind, shape = ir.TensorType(tensor.dtype), ir.Shape([len(numbers)])
        graph.register_initializer(ir.Value(name=name, type=kind, shape=shape, const_value=tensor))
    return graph.initializers[name]

"""Transpose the keys of an attention by one Transpose."""

from __future__ import annotations

import onnx_ir as ir

from quest_deploy.export.nodes import is_alone, is_constant, replace_by_transpose

SWAP_LAST = [0, 1, 3, 2]


class TransposeKeys(ir.passes.InPlacePass):
    """``Reshape(Transpose(Reshape(k, [-1, n, d]), [0, 2, 1]), [b, heads, d, n])`` is ``Transpose(k, [0, 1, 3, 2])``.

    The exporter writes the former for scaled_dot_product_attention, with shapes that are computed. TensorRT and ONNX
    Runtime know attention, and a product with a transposed operand, by the latter.

    1. Fires on k [b, heads, n, d] whose last two axes are swapped between two Reshapes that merge and part the others.
    2. Must not fire where anything else reads what lies between, on another order of axes, nor where a shape is not
       put together from the sizes of k.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        modified = False
        for node in list(model.graph):
            keys = _keys_of(node)
            if keys is None:
                continue
            replace_by_transpose(model.graph, node, keys, SWAP_LAST)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def permutation(transpose: ir.Node) -> list[int]:
    """The order of axes of a Transpose; empty where it reverses them."""
    return list(transpose.attributes.get_ints("perm", ()))


def _keys_of(parting: ir.Node) -> ir.Value | None:
    """k, from the Reshape that gives kᵀ; None where it is another one."""
    swapping = _made_by(parting, "Reshape", "Transpose")
    merging = None if swapping is None else _made_by(swapping, "Transpose", "Reshape")
    if swapping is None or merging is None or permutation(swapping) != [0, 2, 1]:
        return None
    keys = merging.inputs[0]
    if keys is None or keys.shape is None or len(keys.shape) != 4:
        return None
    sizes = _sizes(keys)
    merged, parted = _extents(merging.inputs[1], keys), _extents(parting.inputs[1], keys)
    fits = merged is not None and len(merged) == 3 and merged[1:] == sizes[2:]
    return keys if fits and parted == [*sizes[:2], sizes[3], sizes[2]] else None


def _made_by(node: ir.Node, operator: str, before: str) -> ir.Node | None:
    """What makes the input of an `operator`, if that is a `before` which nothing else reads."""
    source = node.inputs[0] if node.op_type == operator else None
    producer = source.producer() if source is not None and is_alone(source) else None
    return producer if producer is not None and producer.op_type == before else None


def _sizes(value: ir.Value) -> list[object]:
    """Of each axis its number or name; an axis of neither is equal to itself alone."""
    shape = value.shape or ()
    return [
        size if isinstance(size, int) or size.value is not None else (axis, "unknown")
        for axis, size in enumerate(shape)
    ]


def _extents(shape: ir.Value | None, value: ir.Value) -> list[object] | None:
    """A shape that is put together from sizes of `value` and constants, in the sizes that `value` is known to have."""
    node = None if shape is None else shape.producer()
    if is_constant(shape):
        return [int(size) for size in shape.const_value.numpy()]  # type: ignore[union-attr]
    if node is None:
        return None
    if node.op_type == "Concat":
        parts = [_extents(one, value) for one in node.inputs]
        return None if None in parts else [size for part in parts for size in part]  # type: ignore[union-attr]
    source = node.inputs[0].producer() if node.op_type == "Slice" and node.inputs[0] is not None else node
    if source is None or source.op_type != "Shape" or source.inputs[0] is not value:
        return None
    if source.attributes.get_int("start", 0) or "end" in source.attributes:
        return None
    bounds = node.inputs[1:3] if node is not source else ()
    if not all(is_constant(one) for one in bounds) or len(node.inputs) > 4:
        return None
    numbers = [int(one.const_value.numpy().item()) for one in bounds]  # type: ignore[union-attr]
    return _sizes(value)[slice(*numbers)] if numbers else _sizes(value)

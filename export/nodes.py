"""Questions that several passes ask of a graph's values, copies of its nodes, and what takes the place of others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir


def is_alone(value: ir.Value | None) -> bool:
    """Whether one node reads `value`, and nothing else."""
    return value is not None and not value.is_graph_output() and len(value.uses()) == 1


def is_constant(value: ir.Value | None) -> bool:
    """Whether `value` is an initializer whose tensor is known."""
    return value is not None and value.is_initializer() and value.const_value is not None


def twin(
    node: ir.Node,
    *,
    inputs: Sequence[ir.Value | None] | None = None,
    attributes: Mapping[str, ir.Attr] | None = None,
) -> ir.Node:
    """A node like `node`, of one output, for the caller to put into the graph.

    Args:
        node: With its metadata, and its output's shape and type.
        inputs: None for those of `node`.
        attributes: In place of those that `node` has under these names.
    """
    made = ir.node(
        node.op_type,
        node.inputs if inputs is None else inputs,
        attributes={**node.attributes, **(attributes or {})},
    )
    made.metadata_props.update(node.metadata_props)
    made.outputs[0].shape, made.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
    return made


def replace_by_transpose(
    graph: ir.Graph, node: ir.Node, source: ir.Value | None, perm: Sequence[int]
) -> None:
    """Put a Transpose of `source` where `node`, of one output, stands; its name, shape and type stay."""
    made = ir.node("Transpose", [source], attributes={"perm": list(perm)})
    made.metadata_props.update(node.metadata_props)
    old, new = node.outputs[0], made.outputs[0]
    new.name, new.shape, new.type = old.name, old.shape, old.type
    graph.insert_before(node, made)
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(node, safe=True)

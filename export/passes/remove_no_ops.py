"""Remove operators that change nothing."""

from __future__ import annotations

import onnx_ir as ir


class RemoveNoOps(ir.passes.InPlacePass):
    """Remove Identity and Casts to the type that a value has.

    1. ``Identity(x)`` -> x.
    2. ``Cast(x)`` to the element type of x -> x.
    3. Must not fire on a Cast whose input type is unknown, nor where the node joins a graph input or initializer to a
       graph output (the output would lose its name).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        modified = False
        for node in list(model.graph):
            if not _is_no_op(node):
                continue
            source, output = node.inputs[0], node.outputs[0]
            assert source is not None
            if output.is_graph_output():
                if source.producer() is None or source.is_graph_output():
                    continue
                source.name, source.shape, source.type = output.name, output.shape, output.type
            output.replace_all_uses_with(source, replace_graph_outputs=True)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _is_no_op(node: ir.Node) -> bool:
    if node.domain not in ("", "ai.onnx") or node.inputs[:1] in ((), (None,)):
        return False
    if node.op_type == "Identity":
        return True
    if node.op_type != "Cast" or node.inputs[0] is None:
        return False
    return node.inputs[0].dtype is not None and node.attributes.get_int("to") == node.inputs[0].dtype

"""Remove operators that change nothing."""

from __future__ import annotations

import onnx_ir as ir

from quest_deploy.export.lazy import sizes_of


class RemoveNoOps(ir.passes.InPlacePass):
    """Remove Identity, and Casts and Reshapes to the type and shape that a value has.

    1. ``Identity(x)`` -> x.
    2. ``Cast(x)`` to the element type of x -> x.
    3. ``Reshape(x)`` of an initializer to the shape of x -> x: the exporter leaves it at biases too large to compute.
    4. Must not fire on a Cast whose input type is unknown, nor where the node joins a graph input or initializer to a
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
    if node.op_type == "Reshape":
        return _keeps_shape(node)
    if node.op_type != "Cast" or node.inputs[0] is None:
        return False
    return node.inputs[0].dtype is not None and node.attributes.get_int("to") == node.inputs[0].dtype


def _keeps_shape(reshape: ir.Node) -> bool:
    source, wanted = reshape.inputs[:2]
    if source is None or wanted is None or source.const_value is None or wanted.const_value is None:
        return False
    sizes = sizes_of(source.const_value)
    shape = wanted.const_value.numpy().tolist()
    return len(shape) == len(sizes) and all(
        new in (old, -1) or (new == 0 and reshape.attributes.get_int("allowzero", 0) == 0)
        for new, old in zip(shape, sizes, strict=True)
    )

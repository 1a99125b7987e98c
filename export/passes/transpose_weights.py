"""Transpose float weights ahead of time, without reading them."""

from __future__ import annotations

import onnx_ir as ir

from quest_deploy.export.lazy import transposed


class TransposeWeights(ir.passes.InPlacePass):
    """Leave ``MatMul(x, W')`` where the exporter writes ``MatMul(x, Transpose(W))``.

    The exporter's own optimizer does the same, but computes every transpose at once: a second copy of the model.

    1. ``Transpose(W, perm)`` of an initializer that nothing else reads becomes an initializer of that name, which is
       transposed when it is written.
    2. Must not fire where `W` has another reader or is a graph output.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        modified = False
        for node in list(model.graph):
            weight = node.inputs[0] if node.op_type == "Transpose" else None
            if weight is None or weight.const_value is None or not weight.is_initializer():
                continue
            if len(weight.uses()) != 1 or weight.is_graph_output() or node.outputs[0].is_graph_output():
                continue
            rank = len(weight.const_value.shape)
            perm = list(node.attributes.get_ints("perm", tuple(reversed(range(rank)))))
            weight.const_value = transposed(weight.const_value, perm)
            weight.shape = ir.Shape(weight.const_value.shape.numpy())
            node.outputs[0].replace_all_uses_with(weight)
            model.graph.remove(node, safe=True)
            modified = True
        return ir.passes.PassResult(model, modified=modified)

"""Give each product its own DequantizeLinear."""

from __future__ import annotations

import onnx_ir as ir

from quest_deploy.export.nodes import twin


class UnshareDequantize(ir.passes.InPlacePass):
    """One DequantizeLinear for each reader.

    ONNX Runtime fuses a DequantizeLinear into a product only where nobody else reads it; the queries, keys and
    values of one attention share theirs.

    1. A DequantizeLinear with n > 1 readers becomes n of them, over the same codes. Codes stay shared.
    2. Must not fire on one that is a graph output, nor on other operators.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "DequantizeLinear" or node.outputs[0].is_graph_output():
                continue
            for use in list(node.outputs[0].uses())[1:]:
                own = twin(node)
                model.graph.insert_after(node, own)
                use.node.replace_input_with(use.idx, own.outputs[0])
                modified = True
        return ir.passes.PassResult(model, modified=modified)

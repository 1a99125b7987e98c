"""Give each matrix product its own QuantizeLinear."""

from __future__ import annotations

import onnx_ir as ir

from quest_deploy.export.nodes import is_constant, twin

DEFAULT_AXIS = 1


class UnshareQuantize(ir.passes.InPlacePass):
    """One QuantizeLinear for each DequantizeLinear that goes to a MatMul, with the same inputs.

    ONNX Runtime fuses a product of integers only where nobody else reads its codes (it makes them unsigned there), and
    unites nodes that are equal in every attribute. So these differ in the one that has no meaning for a scale of the
    whole tensor: their axis. OpenVINO has no such attribute and quantizes once.

    Runs after :class:`UnshareDequantize`.

    1. ``QuantizeLinear(x, scale)`` with one scale for all of x [r dimensions], read by n > 1 DequantizeLinear that each
       go to a MatMul, becomes n of them. Past 2 r, the rest keeps the first.
    2. Must not fire on a scale of channels, where the rank of `x` is unknown, where the codes are a graph output, or go
       to anything else (a convolution: ONNX Runtime computes it in float here).
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        modified = False
        for node in list(model.graph):
            if node.op_type != "QuantizeLinear" or not _is_shared(node):
                continue
            rank = len(node.inputs[0].shape)  # type: ignore[union-attr, arg-type]
            first = node.attributes.get_int("axis", DEFAULT_AXIS)
            axes = [axis for axis in range(-rank, rank) if axis != first]
            for use, axis in zip(list(node.outputs[0].uses())[1:], axes, strict=False):
                own = twin(node, attributes={"axis": ir.AttrInt64("axis", axis)})
                model.graph.insert_after(node, own)
                use.node.replace_input_with(use.idx, own.outputs[0])
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _is_shared(quantize: ir.Node) -> bool:
    x, scale = quantize.inputs[:2]
    codes = quantize.outputs[0]
    if x is None or x.shape is None or not is_constant(scale) or scale.const_value.size != 1:  # type: ignore[union-attr]
        return False
    if codes.is_graph_output() or len(codes.uses()) < 2:
        return False
    return all(
        use.node.op_type == "DequantizeLinear" and _goes_to_a_product(use.node.outputs[0])
        for use in codes.uses()
    )


def _goes_to_a_product(value: ir.Value) -> bool:
    return not value.is_graph_output() and all(use.node.op_type == "MatMul" for use in value.uses())

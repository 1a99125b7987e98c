"""Write a permutation of axes as one."""

from __future__ import annotations

import onnx_ir as ir

from quest_deploy.export.nodes import replace_by_transpose


class PermuteEinsum(ir.passes.InPlacePass):
    """``Einsum(x, "nhwpqc->nchpwq")`` becomes ``Transpose(x, [0, 5, 1, 3, 2, 4])``.

    Transformers put patches together by it. The standard has no Einsum in bfloat16.

    1. Fires on an Einsum of one operand whose output has the same axes, each once.
    2. Must not fire on sums and diagonals, more operands, nor axes that are not named.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        modified = False
        for node in list(model.graph):
            perm = _permutation(node)
            if perm is None:
                continue
            replace_by_transpose(model.graph, node, node.inputs[0], perm)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _permutation(node: ir.Node) -> list[int] | None:
    if node.op_type != "Einsum" or len(node.inputs) != 1:
        return None
    before, arrow, after = node.attributes.get_string("equation", "").replace(" ", "").partition("->")
    if not arrow or "." in before or len(set(before)) != len(before) or sorted(before) != sorted(after):
        return None
    return [before.index(axis) for axis in after]

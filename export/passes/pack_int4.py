"""Store 4-bit weights in 4 bits."""

from __future__ import annotations

import onnx_ir as ir

from quest_deploy.export.lazy import mapped, sizes_of

INT4_MIN, INT4_MAX = -8, 7


class PackInt4(ir.passes.InPlacePass):
    """``DequantizeLinear(int8 codes)`` -> ``DequantizeLinear(Cast<int8>(int4 codes))``.

    ONNX Runtime folds the Cast when it loads the model and then runs the integer kernels that it has for int8; an INT4
    initializer right behind DequantizeLinear would keep the product in float (DESIGN §4).

    1. Fires on an int8 initializer whose every use is input 0 of a DequantizeLinear and whose values all lie in
       [-8, 7]: packing then loses nothing.
    2. Must not fire where one code needs more than 4 bits (8-bit layers), nor on other uses (zero-points, indices).
    3. Codes shared by several DequantizeLinear are packed once.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        modified = False
        for codes in list(model.graph.initializers.values()):
            if is_packable(codes):
                _pack(model.graph, codes)
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def is_packable(codes: ir.Value) -> bool:
    """Whether rules 1 and 2 hold for an initializer."""
    if codes.const_value is None or codes.const_value.dtype != ir.DataType.INT8 or codes.is_graph_output():
        return False
    uses = codes.uses()
    if not uses or any(use.node.op_type != "DequantizeLinear" or use.idx != 0 for use in uses):
        return False
    values = codes.const_value.numpy()
    return values.size > 1 and bool(values.min() >= INT4_MIN and values.max() <= INT4_MAX)


def as_int4(codes: ir.Value) -> ir.TensorProtocol:
    """The codes of an int8 initializer, stored two to a byte."""
    assert codes.const_value is not None
    return mapped(
        codes.const_value,
        lambda values: values,
        shape=sizes_of(codes.const_value),
        dtype=ir.DataType.INT4,
        name=codes.name,
    )


def _pack(graph: ir.Graph, codes: ir.Value) -> None:
    assert codes.const_value is not None
    users = codes.uses()
    # Copied, since adding the Cast below adds a use.
    nodes = [use.node for use in users]
    codes.const_value = as_int4(codes)
    codes.dtype = ir.DataType.INT4
    cast = ir.node("Cast", [codes], attributes={"to": ir.DataType.INT8})
    # Types stay known: lower precision is measured node by node.
    cast.outputs[0].dtype, cast.outputs[0].shape = ir.DataType.INT8, codes.shape
    cast.metadata_props.update(nodes[0].metadata_props)
    graph.insert_before(_first_of(graph, nodes), cast)
    for node in nodes:
        node.replace_input_with(0, cast.outputs[0])


def _first_of(graph: ir.Graph, nodes: list[ir.Node]) -> ir.Node:
    """The node of `nodes` that comes first in `graph`."""
    if len(nodes) == 1:
        return nodes[0]
    wanted = set(nodes)
    return next(node for node in graph if node in wanted)

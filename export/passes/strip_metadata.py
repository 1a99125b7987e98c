"""Remove what a reader of the file does not need: provenance, documentation and redundant shapes."""

from __future__ import annotations

import onnx_ir as ir

# A function operator whose body reshapes by computed sizes, and one that is not in the standard.
# The outputs of both have the shape of their first input.
WITHOUT_INFERENCE = frozenset({"GroupNormalization", "MultiHeadAttention"})


class StripMetadata(ir.passes.InPlacePass):
    """Drop metadata, doc strings and inferable types.

    1. Metadata and doc strings of the model, its graph, nodes and values go. The exporter puts stack traces with
       absolute paths there, which leak and make equal models differ.
    2. Types and shapes of intermediate values go: they carry the exporter's private symbols, and shape inference gives
       them back. Those of inputs, outputs and initializers stay.
    3. The outputs of operators that ONNX infers no shape for keep type, rank and numbers, without the symbols.
    4. The producer's name and version stay.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        graph = model.graph
        described: list[ir.Model | ir.Graph | ir.Node | ir.Value] = [
            model,
            graph,
            *graph.inputs,
            *graph.initializers.values(),
        ]
        modified = False
        for node in graph:
            described.extend((node, *node.outputs))
            for value in node.outputs:
                modified |= not value.is_graph_output() and _forget_shape(node, value)
        for holder in described:
            if holder.metadata_props or holder.doc_string:
                holder.metadata_props.clear()
                holder.doc_string = None
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _forget_shape(node: ir.Node, value: ir.Value) -> bool:
    before = (value.shape, value.type)
    if node.op_type not in WITHOUT_INFERENCE:
        value.shape, value.type = None, None
    elif value.shape is not None:
        value.shape = ir.Shape([size if isinstance(size, int) else None for size in value.shape.dims])
    return before != (value.shape, value.type)

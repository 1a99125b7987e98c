"""Names that say where a node comes from, and are the same on every export."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

SCOPES_KEY = "pkg.torch.onnx.name_scopes"
CODES_SUFFIX = "/codes"


class CanonicalNames(ir.passes.InPlacePass):
    """Rename nodes and values by place instead of by the exporter's counters.

    Runs after every pass that adds or removes nodes, and before :class:`StripMetadata`, which removes the scopes.

    1. A node is called ``<module path>/<operator>`` (``_2``, ``_3`` ... when that is taken), or after its operator
       alone when the exporter gave it no module.
    2. The output of a QuantizeLinear is called ``<module path>/codes``: parity finds a layer's codes by it.
    3. Other intermediate values are called v0, v1, ... in graph order.
    4. Constants that are no parameter (``val_12``) are called c0, c1, ... in order of first use; parameters and buffers
       keep their names. Initializers are ordered by first use, and unused ones removed.
    5. Inputs and outputs of the graph must not be renamed.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        graph = model.graph
        before = [*_names(graph)]
        kept = {value.name for value in (*graph.inputs, *graph.outputs)}
        taken: Counter[str] = Counter()
        index = 0
        # All values take a private name first: a final name may still belong to a later value.
        for number, value in enumerate(value for node in graph for value in node.outputs):
            if value.name not in kept:
                value.name = f"quest_deploy.temporary.{number}"
        for node in graph:
            scope = scope_of(node)
            node.name = _unique(taken, f"{scope}/{node.op_type}" if scope else node.op_type)
            for value in node.outputs:
                if value.name in kept:
                    continue
                if node.op_type == "QuantizeLinear":
                    value.name = _unique(taken, f"{scope}{CODES_SUFFIX}")
                else:
                    value.name = f"v{index}"
                    index += 1
        _order_initializers(graph)
        return ir.passes.PassResult(model, modified=before != [*_names(graph)])


def scope_of(node: ir.Node) -> str:
    """The path of the module that a node was traced in, or ''."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES_KEY, "[]"))
    # The first is the root, the last the traced node itself.
    return str(scopes[-2]) if len(scopes) > 2 else ""


def _names(graph: ir.Graph) -> list[str | None]:
    nodes = [name for node in graph for name in (node.name, *(value.name for value in node.outputs))]
    return [*nodes, *graph.initializers]


def _unique(taken: Counter[str], name: str) -> str:
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}_{taken[name]}"


def _order_initializers(graph: ir.Graph) -> None:
    used: dict[ir.Value, None] = {}
    for node in graph:
        for value in node.inputs:
            if value is not None and value.is_initializer():
                used.setdefault(value)
    for value in graph.outputs:
        if value.is_initializer():
            used.setdefault(value)
    graph.initializers.clear()
    constants = 0
    for value in used:
        if value.name is None or "." not in value.name:
            value.name = f"c{constants}"
            constants += 1
        if value.const_value is not None:
            value.const_value.name = value.name
        graph.initializers[value.name] = value

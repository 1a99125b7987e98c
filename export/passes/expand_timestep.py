"""Let one timestep serve a whole batch."""

from __future__ import annotations

import onnx_ir as ir

from quest_deploy.model.spec import TIMESTEP


class ExpandTimestep(ir.passes.InPlacePass):
    """Accept `timestep` of one value or of one value a sample.

    torch's exporter gives a rank-1 `timestep` the batch's dimension for good, since a size of 1 would broadcast where
    the batch's does not.

    1. In a graph whose second input is `timestep` [batch], every reader of it reads
       ``Expand(timestep, Shape(latents)[0:1])`` instead, where the latents are the first input, and the input's
       dimension is called `steps`.
    2. Must not fire where the second input is another one, where `timestep` is not rank 1, where nothing reads it, or
       where the rule has been applied.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        graph = model.graph
        if len(graph.inputs) < 2 or graph.inputs[1].name != TIMESTEP:
            return ir.passes.PassResult(model, modified=False)
        sample, timestep = graph.inputs[:2]
        if timestep.shape is None or len(timestep.shape) != 1:
            return ir.passes.PassResult(model, modified=False)
        uses = list(timestep.uses())
        if not uses or all(use.node.op_type == "Expand" for use in uses):
            return ir.passes.PassResult(model, modified=False)
        batch = ir.node("Shape", [sample], attributes={"start": 0, "end": 1})
        batch.outputs[0].dtype = ir.DataType.INT64
        batch.outputs[0].shape = ir.Shape([1])
        expand = ir.node("Expand", [timestep, batch.outputs[0]])
        if timestep.dtype is not None:
            expand.outputs[0].dtype = timestep.dtype
        for use in uses:
            use.node.replace_input_with(use.idx, expand.outputs[0])
        graph.insert_before(graph[0], [batch, expand])
        timestep.shape = ir.Shape(["steps"])
        return ir.passes.PassResult(model, modified=True)

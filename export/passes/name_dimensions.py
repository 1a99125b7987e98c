"""Call dynamic dimensions what the component's specification calls them."""

from __future__ import annotations

import onnx_ir as ir

from quest_deploy.errors import ExportError
from quest_deploy.model.spec import ComponentSpec, TensorSpec


class NameDimensions(ir.passes.InPlacePass):
    """Replace the exporter's symbols (``s53``, ``4*s34``) in inputs and outputs.

    1. A symbolic dimension of an input or output takes the name, or the number, that the specification has there.
    2. Must not fire on a dimension that already has it.
    3. A number that the specification does not have there, an input or output of another rank or name, is an
       ExportError: the model was specialized while tracing.
    """

    def __init__(self, spec: ComponentSpec) -> None:
        super().__init__()
        self.spec = spec

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Apply the rules to `model`."""
        modified = False
        for kind, values, tensors in (
            ("input", model.graph.inputs, self.spec.inputs),
            ("output", model.graph.outputs, self.spec.outputs),
        ):
            names, expected = [value.name for value in values], [tensor.name for tensor in tensors]
            if names != expected:
                raise ExportError(
                    f"{self.spec.name}: got {kind}s {names}, expected {expected}; "
                    "report this, with the model's configuration"
                )
            for value, tensor in zip(values, tensors, strict=True):
                modified |= self._rename(value, tensor)
        return ir.passes.PassResult(model, modified=modified)

    def _rename(self, value: ir.Value, tensor: TensorSpec) -> bool:
        got = None if value.shape is None else list(value.shape.dims)
        fits = got is not None and len(got) == len(tensor.shape)
        if fits and got is not None:
            fits = all(
                not isinstance(have, int) or have == want
                for have, want in zip(got, tensor.shape, strict=True)
            )
        if not fits:
            shown = None if got is None else [str(dimension) for dimension in got]
            raise ExportError(
                f"{self.spec.name} '{tensor.name}': got shape {shown}, expected {list(tensor.shape)}; "
                "the exporter specialized a dimension: report this, with the model's configuration"
            )
        renamed = ir.Shape(tensor.shape)
        if value.shape == renamed:
            return False
        value.shape = renamed
        return True

"""An engine around a graph that another tool exported: it takes and gives what the pipeline knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from quest_deploy.engines.base import Closing, Engine, batched, device_of
from quest_deploy.engines.foreign import AGAIN, Fitted
from quest_deploy.errors import EngineInputError
from quest_deploy.model.spec import TIMESTEP, TensorSpec


class AdaptedEngine(Closing):
    """An engine around a graph of another tool, with the types and shapes that the pipeline knows."""

    def __init__(self, fitted: Fitted, engine: Any) -> None:
        self.spec = fitted.spec
        self.graph = fitted.graph
        self.engine: Engine = engine
        self.device = device_of(self.engine)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once, with inputs as the graph takes them; floats that come out are float32.

        Raises:
            EngineInputError: a name, type or shape that the component does not take.
        """
        given = {
            tensor.name: as_graph_takes(self.spec.name, tensor, inputs[tensor.name])
            for tensor in self.graph.inputs
            if tensor.name in inputs
        }
        unknown = {name: value for name, value in inputs.items() if name not in given}
        outputs = self.engine(**given, **unknown)
        return {
            name: value.float() if value.is_floating_point() else value for name, value in outputs.items()
        }

    def batch_ranges(self, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[tuple[int, int]]:
        """Those of the engine, for the shapes that its graph takes; none where it takes any batch."""
        inner = batched(self.engine)
        if inner is None:
            return []
        # A timestep may be a scalar there.
        taken = {t.name: shapes[t.name][: len(t.shape)] for t in self.graph.inputs if t.name in shapes}
        return inner.batch_ranges(taken)

    def close(self) -> None:
        self.engine.close()


def as_graph_takes(component: str, tensor: TensorSpec, value: Tensor) -> Tensor:
    """`value` in the type and rank of a graph's input; a fractional timestep becomes the nearest whole one.

    Raises:
        EngineInputError: several timesteps for a graph that takes one.
    """
    if tensor.name == TIMESTEP and len(tensor.shape) < value.ndim:
        if value.numel() > 1 and bool((value != value[0]).any()):
            raise EngineInputError(
                f"{component} input '{TIMESTEP}': got {value.numel()} values, the graph takes one for the whole batch; "
                f"{AGAIN}"
            )
        value = value[0]
    dtype = getattr(torch, tensor.dtype)
    if value.is_floating_point() and not dtype.is_floating_point:
        value = value.round()
    return value.to(dtype)

"""Running an engine on more samples than it takes at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quest_deploy.engines.base import Engine


def run_in_parts(engine: Engine, **inputs: Tensor) -> dict[str, Tensor]:
    """Run `engine`, in parts of about equal size where the batch is larger than its profile allows.

    Guidance doubles the batch of the denoiser, so that a request can exceed a profile that fits the other components.
    """
    batched = [tensor.name for tensor in engine.spec.inputs if tensor.shape[0] == "batch"]
    batch = inputs[batched[0]].shape[0]
    # Only engines with optimization profiles have limits.
    _, largest = getattr(engine, "limits", {}).get("batch", (1, batch))
    if batch <= largest:
        return engine(**inputs)
    count = math.ceil(batch / largest)
    # A timestep of one value belongs to every part.
    along = {tensor.name for tensor in engine.spec.inputs if tensor.shape[0] in ("batch", "steps")}
    split = {
        name: value.tensor_split(count)
        for name, value in inputs.items()
        if name in along and value.shape[0] == batch
    }
    parts = [
        engine(**{name: split[name][index] if name in split else value for name, value in inputs.items()})
        for index in range(count)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

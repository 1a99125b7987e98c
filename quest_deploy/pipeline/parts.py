"""Running an engine on more samples than it takes at once, or fewer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quest_deploy.engines.base import Engine, batched


def run_in_parts(engine: Engine, **inputs: Tensor) -> dict[str, Tensor]:
    """Run `engine`, in parts of about equal size where no profile of its holds the batch.

    Guidance doubles the batch of the denoiser, so that a request can exceed a profile that fits the other components.
    Where a part is smaller than the profile allows, as the last images are for an engine of one batch size, its last
    sample is repeated, and what comes of the repetitions is dropped. Of several profiles, the one serves that has the
    fewest samples run, and of those the one of the fewest parts.
    """
    along_batch = [tensor.name for tensor in engine.spec.inputs if tensor.shape[0] == "batch"]
    batch = inputs[along_batch[0]].shape[0]
    shapes = {name: tuple(value.shape) for name, value in inputs.items()}
    profiled = batched(engine)
    ranges = () if profiled is None else profiled.batch_ranges(shapes)
    # Where no profile holds the other sizes, the engine says so.
    if not ranges or any(least <= batch <= largest for least, largest in ranges):
        return engine(**inputs)
    least, largest = min(ranges, key=lambda one: _work(batch, *one))
    count = math.ceil(batch / largest)
    # A timestep of one value belongs to every part.
    along = {t.name for t in engine.spec.inputs if t.shape[0] == "steps" and len(inputs[t.name]) > 1}
    split = {name: inputs[name].tensor_split(count) for name in (*along_batch, *along)}
    sizes = [len(part) for part in split[along_batch[0]]]
    parts = [
        engine(**{name: _filled(split[name][i], least) if name in split else inputs[name] for name in inputs})
        for i in range(count)
    ]
    return {
        name: torch.cat([part[name][:size] for part, size in zip(parts, sizes, strict=True)])
        for name in parts[0]
    }


def _work(batch: int, least: int, largest: int) -> tuple[int, int]:
    """How many samples run, and in how many parts, where an engine takes `least` to `largest` at once."""
    count = math.ceil(batch / largest)
    size, longer = divmod(batch, count)
    return longer * max(size + 1, least) + (count - longer) * max(size, least), count


def _filled(samples: Tensor, least: int) -> Tensor:
    """`samples` [n, ...], the last of them repeated where n is less than `least`."""
    missing = least - len(samples)
    return samples if missing <= 0 else torch.cat([samples, samples[-1:].expand(missing, *samples.shape[1:])])

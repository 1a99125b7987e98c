"""What the layers that carry time are given at every timestep, beside what they are given at the recorded ones.

One recorded timestep stands for each group, and prompts make no difference to these layers, or little: all rows of a
group would be one. What they are given between follows without the rest of the network.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import pairwise

import torch
from torch import Tensor, nn

from quest_deploy.quantize.calibrate import EXTREME_ROWS, CalibrationSet
from quest_deploy.quantize.insert import channel_axis, quantizable_layers
from quest_deploy.quantize.losses import temporal_conditioning
from quest_deploy.quantize.recomputed import CPU
from quest_deploy.quantize.trace import Trace


@torch.no_grad()
def inputs_over_time(
    denoiser: nn.Module,
    trace: Trace,
    data: CalibrationSet,
    names: Collection[str],
    *,
    last_time: float,
    positions: int,
    seed: int,
) -> dict[str, Tensor]:
    """The inputs of the temporal layers among `names`, from the first timestep of each group to its last.

    Args:
        denoiser: Full precision.
        trace: Its.
        data: Recorded trajectories: the groups, and what these layers depend on besides the timestep.
        names: Layers.
        last_time: The largest timestep of the noise schedule, as the denoiser is told it.
        positions: Rows of each group.
        seed: For the choice of what else these layers are given.

    Returns:
        By layer name, float32 [G, positions + 2, c_in], as :func:`quest_deploy.quantize.calibrate.collect_inputs` has
        them.
    """
    every = quantizable_layers(denoiser)
    layers = {name: every[name] for name in names if trace.roles[name] == "temporal"}
    if not layers or not trace.ends:
        return {}
    generator = torch.Generator().manual_seed(seed)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    groups: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, axis: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: seen[name].append(args[0].movedim(axis, -1).flatten(0, -2))

    handles = [
        layer.register_forward_pre_hook(keep(name, channel_axis(layer))) for name, layer in layers.items()
    ]
    edges = [0.0, *data.boundaries().tolist(), max(last_time, float(data.timesteps.max()))]
    try:
        for first, last in pairwise(edges):
            timestep = torch.linspace(first, last, positions)
            conditioning = temporal_conditioning(trace, data, positions, generator)
            trace.temporal_outputs(denoiser, timestep.to(data.device), conditioning, None)
            for name, runs in seen.items():
                if runs:
                    groups[name].append(_sample(torch.cat(runs), positions).to(CPU, torch.float32))
                    runs.clear()
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.stack(rows) for name, rows in groups.items() if rows}


def joined(recorded: Tensor, over_time: Tensor) -> Tensor:
    """Half of the rows of either, and the extremes of both: [G, s + 2, c] each, and the result.

    What was recorded is what drawing visits, and beside the timestep it has the texts and classes that go together.
    """
    rows = [one[:, :-EXTREME_ROWS] for one in (recorded, over_time)]
    count = rows[0].shape[1]
    kept = torch.cat([rows[0][:, : count - count // 2], rows[1][:, 1::2]], dim=1)
    low = torch.minimum(recorded[:, -2], over_time[:, -2])
    high = torch.maximum(recorded[:, -1], over_time[:, -1])
    return torch.cat([kept, low[:, None], high[:, None]], dim=1)


def _sample(rows: Tensor, count: int) -> Tensor:
    """`count` of the rows [n, c], spread evenly, and each channel's least and largest value of all: [count + 2, c]."""
    chosen = torch.linspace(0, rows.shape[0] - 1, count).round().long().to(rows.device)
    return torch.cat([rows[chosen], rows.amin(dim=0)[None], rows.amax(dim=0)[None]])

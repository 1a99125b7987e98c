"""Time-embedding tables: what the layers that carry time answer, stored instead of computed (`temporal_path: table`).

The time path depends on the timestep alone, and a sampler visits few timesteps. With knots t_0 < ... < t_{K-1}, the
recorded timesteps, an outlet of the path (a layer whose output meets the latents, such as the `time_emb_proj` of every
residual block) becomes a float32 table e [K, c_out] of its full-precision outputs there, which is linear in between::

    e(t) = (1 - u) e_i + u e_{i+1},    u = (t - t_i) / (t_{i+1} - t_i),    t_i <= t < t_{i+1}

and constant outside. Nothing reads the other layers that carry time, so that no part of the path is exported. The
tables learn in phase 1, against the layers' outputs at any timestep and the network's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from quest_deploy.config import Recipe
from quest_deploy.errors import ConfigError
from quest_deploy.quantize.context import Knots, TimestepContext
from quest_deploy.quantize.insert import channel_axis, quantizable_layers, replace_module
from quest_deploy.quantize.trace import Trace


class TimeTable(nn.Module):
    """Stands where an outlet of the time path was, and ignores what that was given.

    Args:
        table: float32 [K, ...]: the outlet's output at each knot.
        context: Its knots, and where between them each sample is.
    """

    def __init__(self, table: Tensor, context: TimestepContext) -> None:
        super().__init__()
        self.table = nn.Parameter(table.detach().to(torch.float32).clone())
        self.context = context

    def forward(self, x: Tensor) -> Tensor:
        """Any `x` -> float32 [1 or n, ...]."""
        between = self.context.between
        assert between is not None
        shape = (-1, *[1] * (self.table.ndim - 1))
        lower = self.table.index_select(0, between.lower) * between.lower_share.reshape(shape)
        upper = self.table.index_select(0, between.upper) * between.upper_share.reshape(shape)
        return lower + upper


class UnusedLayer(nn.Module):
    """Stands where a layer was whose output reaches tables alone: zeros of that shape, which nothing reads.

    Args:
        channels: Of the output.
        channel_axis: Of input and output.
    """

    def __init__(self, channels: int, channel_axis: int) -> None:
        super().__init__()
        self.channels, self.channel_axis = channels, channel_axis

    def forward(self, x: Tensor) -> Tensor:
        """`x` [n, ...] -> the same shape with `channels`, without memory of its own."""
        shape = list(x.shape)
        shape[self.channel_axis] = self.channels
        return x.new_zeros(()).expand(shape)


def time_tables(denoiser: nn.Module) -> dict[str, TimeTable]:
    """Every table, by name, in module order."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, TimeTable)}


def unused_layers(denoiser: nn.Module) -> list[str]:
    """Every layer that tables made useless, in module order."""
    return [name for name, module in denoiser.named_modules() if isinstance(module, UnusedLayer)]


def check_tables(trace: Trace, recipe: Recipe) -> None:
    """See that the recipe's time path can be that of this model.

    Raises:
        ConfigError: it asks for tables, and the model's time path has other inputs, or there is none.
    """
    if recipe.temporal_path != "table":
        return
    if trace.conditions:
        others = ", ".join(sorted(trace.conditions))
        raise ConfigError(
            f"temporal_path is table, and the layers of this model that carry time depend on {others} as well, "
            "expected the timestep alone; leave temporal_path out"
        )
    if not trace.outlets:
        raise ConfigError(
            "temporal_path is table, and no layer of this model carries time; leave temporal_path out"
        )


def make_context(boundaries: Tensor, timesteps: Tensor, recipe: Recipe) -> TimestepContext:
    """The context of a student.

    Args:
        boundaries: Of the timestep groups.
        timesteps: float32 [T], descending: the recorded ones.
        recipe: Whether there are tables.
    """
    knots = Knots(timesteps.flip(0)) if recipe.temporal_path == "table" else None
    return TimestepContext(boundaries, knots)


@torch.no_grad()
def outlet_outputs(denoiser: nn.Module, trace: Trace, timesteps: Tensor) -> dict[str, Tensor]:
    """What each outlet answers at `timesteps` float32 [K]: [K, ...] by name."""
    outlets = trace.at_outlets()
    found = outlets.temporal_outputs(denoiser, timesteps, {}, None)
    return dict(zip(outlets.ends, found, strict=True))


def insert_tables(
    student: nn.Module, teacher: nn.Module, trace: Trace, context: TimestepContext, device: torch.device
) -> Trace:
    """Replace the time path of `student` by tables, if `context` has knots for them.

    Args:
        student: A copy of `teacher`, whose layers that carry time are not quantized.
        teacher: The full-precision denoiser, which is on `device`.
        trace: Its.
        context: The student's.
        device: Where the teacher is.

    Returns:
        The trace to train with: its ends are those that the student still has.
    """
    if context.knots is None:
        return trace
    tables = outlet_outputs(teacher, trace, context.knots.timesteps.to(device))
    temporal = [name for name, role in trace.roles.items() if role == "temporal"]
    place_tables(student, tables, [name for name in temporal if name not in tables], context)
    return trace.at_outlets()


def place_tables(
    denoiser: nn.Module, tables: Mapping[str, Tensor], unused: Sequence[str], context: TimestepContext
) -> None:
    """Put tables [K, ...] where the layers of these names are, and nothing where the `unused` are."""
    layers = quantizable_layers(denoiser)
    for name, table in tables.items():
        replace_module(denoiser, name, TimeTable(table.cpu(), context))
    for name in unused:
        layer = layers[name]
        replace_module(denoiser, name, UnusedLayer(layer.weight.shape[0], channel_axis(layer)))

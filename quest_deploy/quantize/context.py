"""Where in time each sample of the running batch is; set by the denoiser, read by its layers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Between(NamedTuple):
    """The two knots around each timestep, and the share of either; n = 1 or the batch.

    Attributes:
        lower: int64 [n].
        upper: int64 [n], `lower` + 1.
        lower_share: float32 [n].
        upper_share: float32 [n]; 0 or 1 outside the knots, so that nothing is extrapolated.
    """

    lower: Tensor
    upper: Tensor
    lower_share: Tensor
    upper_share: Tensor


class Knots:
    """Timesteps between which tables are linear.

    Args:
        timesteps: float32 [K], ascending, K at least 2.
    """

    def __init__(self, timesteps: Tensor) -> None:
        self.timesteps = timesteps
        self.widths = timesteps.diff()
        # Not an empty tensor for two knots: runtimes are not sure about those.
        self.inner = timesteps[1:-1] if timesteps.numel() > 2 else torch.tensor([math.inf])

    def between(self, timestep: Tensor) -> Between:
        """Where `timestep`, float32 [n, 1], lies. At a knot one share is 1 and the other 0, exactly."""
        device = timestep.device
        lower = (timestep >= self.inner.to(device)).sum(dim=1)
        start = self.timesteps.to(device).index_select(0, lower)
        width = self.widths.to(device).index_select(0, lower)
        share = ((timestep.reshape(-1) - start) / width).clamp(0.0, 1.0)
        return Between(lower, lower + 1, 1.0 - share, share)


@dataclass
class TimestepContext:
    """Where each sample of the running batch is in time; shared by all layers of one denoiser.

    Attributes:
        boundaries: float32 [G - 1], ascending: group = number of boundaries that are <= t.
        knots: Of time-embedding tables; None where the denoiser has none.
        group: int64 [n], n = 1 or the batch: timestep groups; set by the denoiser's pre-hook.
        between: The knots around each timestep, set with it.
    """

    boundaries: Tensor
    knots: Knots | None = None
    group: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    between: Between | None = None

    @property
    def num_groups(self) -> int:
        return self.boundaries.numel() + 1

    @property
    def now(self) -> tuple[Tensor, Between | None]:
        """What was set last; may be assigned, to go back in time."""
        return self.group, self.between

    @now.setter
    def now(self, value: tuple[Tensor, Between | None]) -> None:
        self.group, self.between = value

    def set_timestep(self, timestep: Tensor) -> None:
        """Find the groups and knots of `timestep` (0-d or [n])."""
        column = timestep.reshape(-1, 1).to(torch.float32)
        self.group = (column >= self.boundaries.to(timestep.device)).sum(dim=1)
        if self.knots is not None:
            self.between = self.knots.between(column)

"""Targets that are computed again whenever they are asked for, instead of kept."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quest_deploy.model.components import (
    Conditioning,
    ControlNet,
    join_conditioning,
    predict,
    with_residuals,
)
from quest_deploy.model.denoisers import CONTROL

CPU = torch.device("cpu")
RECOMPUTED_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class Recomputed:
    """Targets that are not kept: the teacher answers again whenever they are asked for.

    Attributes:
        teacher: The full-precision denoiser, on `device`.
        timesteps: As those of :class:`CalibrationSet`, like all that follow.
        latents: As there.
        positive: As there.
        negative: As there.
        device: As there.
        control: As there.
    """

    teacher: nn.Module
    timesteps: Tensor
    latents: Tensor
    positive: Conditioning
    negative: Conditioning
    device: torch.device = CPU
    control: ControlNet | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """That the targets would have, [P, T, B, c, h, w]."""
        prompts, steps, *rest = self.latents.shape
        return (prompts, steps, 2 if self.negative else 1, *rest)

    @torch.no_grad()
    def __getitem__(self, at: tuple[Tensor, Tensor]) -> Tensor:
        """Of (prompt, step) pairs int64 [n]: [n, B, c, h, w]."""
        prompt, step = at
        branches = self.shape[2]
        latents = torch.cat([self.latents[prompt, step]] * branches).to(self.device)
        timestep = self.timesteps[step].repeat(branches).to(self.device)
        told: Conditioning = conditioning_of(self.positive, self.negative, prompt, self.device)
        with exactly(latents):
            told = controlled(self.control, latents, timestep, told)
            output = predict(self.teacher, latents, timestep, told)
        return torch.stack(output.chunk(branches), dim=1)


def exactly(x: Tensor) -> AbstractContextManager[object]:
    """The teacher's answers, where `x` is, are exact whatever the student's float operations run in."""
    # PyTorch has no autocast where nothing is computed.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def conditioning_of(
    positive: Conditioning, negative: Conditioning, prompt: Tensor, device: torch.device
) -> dict[str, Tensor]:
    """What the denoiser is told for the prompts int64 [n], of all branches, on `device`."""
    chosen = {name: value[prompt].to(device) for name, value in positive.items()}
    if not negative:
        return chosen
    n = prompt.numel()
    other = chosen | {name: value.expand(n, *value.shape[1:]).to(device) for name, value in negative.items()}
    return join_conditioning([other, chosen])


def controlled(
    control: ControlNet | None, sample: Tensor, timestep: Tensor, conditioning: Conditioning
) -> Conditioning:
    """What a denoiser is told after a ControlNet looked at the picture, if there are both."""
    if control is None or CONTROL not in conditioning:
        return conditioning
    with exactly(sample):
        return with_residuals(control, sample, timestep, conditioning)

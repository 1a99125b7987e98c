"""What finetuning minimises: errors on recorded latents, errors that walks end in, and the temporal layers' own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quest_deploy.model.components import Conditioning, predict
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.trace import Trace
from quest_deploy.quantize.walk import Steps, walk_errors

LEAST_ERROR = 1e-12


@dataclass(frozen=True)
class Objective:
    """How errors of the network are weighed: both terms cost 1 for the weights and scales that training starts from.

    Attributes:
        raw: float32 [T], in the order of the calibration set's steps: one over the error that rounding left there.
        walks: float32 [starts], the same for walks from each step; empty where there are none.
        steps: Of the sampler; None where there are no walks.
        walk_length: Steps of a walk.
        walk_share: Weight of the walks; the raw errors have 1.
        guidance_scale: That the trajectories were recorded with.
    """

    raw: Tensor
    walks: Tensor
    steps: Steps | None
    walk_length: int
    walk_share: float
    guidance_scale: float

    @property
    def walking(self) -> bool:
        """Whether walks are part of the loss."""
        return self.walks.numel() > 0 and self.walk_share > 0


def raw_errors(denoiser: nn.Module, data: CalibrationSet, prompt: Tensor, step: Tensor) -> Tensor:
    """float32 [n]: mean squared error of the output, over all branches, for (prompt, step) pairs int64 [n]."""
    sample, timestep, conditioning, target = data.batch(prompt, step)
    error = predict(denoiser, sample, timestep, conditioning) - target
    branches = torch.stack(error.square().flatten(1).mean(dim=1).chunk(data.targets.shape[2]))
    return branches.mean(dim=0)


def walks(
    denoiser: nn.Module, data: CalibrationSet, objective: Objective, prompt: Tensor, start: Tensor
) -> Tensor:
    """float32 [n]: what walks end in, for (prompt, step) pairs int64 [n]."""
    assert objective.steps is not None
    return walk_errors(
        denoiser,
        data,
        objective.steps,
        prompt,
        start,
        length=objective.walk_length,
        guidance_scale=objective.guidance_scale,
    )


@torch.no_grad()
def make_objective(
    denoiser: nn.Module,
    data: CalibrationSet,
    prompts: Tensor,
    steps: Steps | None,
    *,
    walk_length: int,
    walk_share: float,
    guidance_scale: float,
) -> Objective:
    """The objective under which `denoiser` costs 1 on the given prompts in both terms."""
    count = data.timesteps.numel()
    everything = torch.stack(
        [raw_errors(denoiser, data, p.expand(count), torch.arange(count)) for p in prompts]
    )
    bare = Objective(
        raw=1 / everything.mean(dim=0).clamp_min(LEAST_ERROR),
        walks=torch.empty(0),
        steps=steps,
        walk_length=walk_length,
        walk_share=walk_share,
        guidance_scale=guidance_scale,
    )
    starts = 0 if steps is None or not walk_share else steps.starts(walk_length)
    if not starts:
        return bare
    ends = torch.stack([walks(denoiser, data, bare, p.expand(starts), torch.arange(starts)) for p in prompts])
    return Objective(**{**vars(bare), "walks": 1 / ends.mean(dim=0).clamp_min(LEAST_ERROR)})


@torch.no_grad()
def validation_loss(
    denoiser: nn.Module, data: CalibrationSet, prompts: Tensor, objective: Objective
) -> float:
    """The loss over whole trajectories: every step, and walks that follow one another."""
    step = torch.arange(data.timesteps.numel())
    start = torch.arange(0, objective.walks.numel(), objective.walk_length)
    total = 0.0
    for prompt in prompts:
        raw = (objective.raw * raw_errors(denoiser, data, prompt.expand(step.numel()), step)).mean()
        if objective.walking:
            ends = walks(denoiser, data, objective, prompt.expand(start.numel()), start)
            raw = combine(objective, raw, (objective.walks[start] * ends).mean())
        total += float(raw)
    return total / prompts.numel()


def combine(objective: Objective, raw: Tensor, walked: Tensor) -> Tensor:
    """Both terms as one loss."""
    return (raw + objective.walk_share * walked) / (1 + objective.walk_share)


def network_loss(
    denoiser: nn.Module,
    data: CalibrationSet,
    prompts: Tensor,
    objective: Objective,
    *,
    batch_size: int,
    num_walks: int,
    generator: torch.Generator,
) -> Tensor:
    """The loss of one update, a scalar: `batch_size` (prompt, step) pairs and `num_walks` walks, all at random."""
    prompt, step = draw_pairs(prompts, data.timesteps.numel(), batch_size, generator)
    raw = (objective.raw[step] * raw_errors(denoiser, data, prompt, step)).mean()
    if not objective.walking or not num_walks:
        return raw
    prompt, start = draw_pairs(prompts, objective.walks.numel(), num_walks, generator)
    ends = walks(denoiser, data, objective, prompt, start)
    return combine(objective, raw, (objective.walks[start] * ends).mean())


def draw_pairs(prompts: Tensor, steps: int, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` random prompts and steps, int64 [count]; no step twice before all of them were drawn."""
    prompt = prompts[torch.randint(prompts.numel(), (count,), generator=generator)]
    return prompt, torch.randperm(max(count, steps), generator=generator)[:count] % steps


def temporal_loss(
    student: nn.Module,
    teacher: nn.Module,
    trace: Trace,
    timestep: Tensor,
    conditioning: Conditioning,
    context: TimestepContext,
) -> Tensor:
    """Mean over the temporal layers of their outputs' squared error, each relative to its output's power."""
    with torch.no_grad():
        targets = trace.temporal_outputs(teacher, timestep, conditioning, None)
    outputs = trace.temporal_outputs(student, timestep, conditioning, context)
    losses = [
        (output - target).square().mean() / target.square().mean()
        for output, target in zip(outputs, targets, strict=True)
    ]
    return torch.stack(losses).mean()


def temporal_conditioning(
    trace: Trace, data: CalibrationSet, count: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """`count` random choices of what the temporal layers depend on besides the timestep, from either branch."""
    if not trace.conditions:
        return {}
    prompt = torch.randint(data.num_prompts, (count,), generator=generator)
    rows = data.conditioning(prompt)
    if data.guided:
        # As in training, one in two is told nothing: that branch is half of what the network is asked.
        negative = torch.randint(2, (count,), generator=generator).bool()
        rows = {name: pick(negative, *value.chunk(2)) for name, value in rows.items()}
    return {name: rows[name] for name in trace.conditions}


def pick(first: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows of `a` where `first` [n] says so, else of `b`; both [n, ...]."""
    return torch.where(first.reshape(-1, *[1] * (a.ndim - 1)), a, b)

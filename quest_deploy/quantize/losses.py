"""What finetuning minimises: errors on recorded latents, errors that walks end in, and the temporal layers' own."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quest_deploy.model.components import Conditioning, predict
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.recomputed import conditioning_of, exactly
from quest_deploy.quantize.trace import Trace
from quest_deploy.quantize.walk import Steps, walk_errors

LEAST_ERROR = 1e-12
Errors = Callable[[Tensor, Tensor], Tensor]
"""Of pairs (prompt, step), int64 [n] each: float32 [n]."""


@dataclass(frozen=True)
class Objective:
    """How errors of the network are weighed: relative to the weights and scales that training starts from.

    Squared errors differ by orders of magnitude between prompts, and a walk may end anywhere: few decide their mean.
    The mean of their logarithms is a signal-to-noise ratio in dB.

    Attributes:
        raw: float32 [T], in the order of the calibration set's steps: one over the error that rounding left there.
        walks: float32 [starts], the same for walks from each step; empty where there are none.
        steps: Of the sampler; None where there are no walks.
        walk_length: Steps of a walk.
        walk_share: Weight of the walks; the raw errors have 1.
        guidance_scale: That the trajectories were recorded with.
        max_pairs: How many pairs the denoiser is given at once; None for all.
        max_walks: How many walks it is taken on at once; None for all.
        geometric: Whether the logarithms of errors are averaged.
    """

    raw: Tensor
    walks: Tensor
    steps: Steps | None
    walk_length: int
    walk_share: float
    guidance_scale: float
    max_pairs: int | None = None
    max_walks: int | None = None
    geometric: bool = False

    def term(self, errors: Tensor) -> Tensor:
        """What relative errors, float32 [n], contribute to a mean."""
        return errors.clamp_min(LEAST_ERROR).log() if self.geometric else errors

    def mean(self, loss: float) -> float:
        """The mean of errors that a mean of terms stands for: 1 at the start."""
        return math.exp(loss) if self.geometric else loss

    @property
    def walking(self) -> bool:
        """Whether walks are part of the loss."""
        return self.walks.numel() > 0 and self.walk_share > 0


@dataclass(frozen=True)
class Draw:
    """What one update learns from, or a slice of it.

    Attributes:
        prompt: int64 [n], of the pairs.
        step: int64 [n], of the pairs.
        walk_prompt: int64 [m].
        walk_start: int64 [m], steps at which the walks start.
        num_pairs: Pairs of the whole update, over whose number errors are averaged.
        num_walks: Walks of the whole update.
    """

    prompt: Tensor
    step: Tensor
    walk_prompt: Tensor
    walk_start: Tensor
    num_pairs: int
    num_walks: int

    def share(self, index: int, count: int) -> Draw:
        """What one of `count` processes takes of it."""
        part = slice(index, None, count)
        return dataclasses.replace(
            self,
            prompt=self.prompt[part],
            step=self.step[part],
            walk_prompt=self.walk_prompt[part],
            walk_start=self.walk_start[part],
        )

    def slices(self, objective: Objective) -> list[Draw]:
        """Parts that fit into memory; itself, if all of it fits. The sum of their losses is the loss of the whole."""
        if objective.max_pairs is None or objective.max_walks is None:
            return [self]
        pairs, walks = self.prompt.numel(), self.walk_prompt.numel()
        # Both kinds of errors keep what backpropagation needs, side by side.
        if pairs / objective.max_pairs + walks / objective.max_walks <= 1:
            return [self]
        none = self.prompt[:0]
        alone = [
            dataclasses.replace(self, prompt=prompt, step=step, walk_prompt=none, walk_start=none)
            for prompt, step in _split(self.prompt, self.step, objective.max_pairs)
        ]
        return alone + [
            dataclasses.replace(self, prompt=none, step=none, walk_prompt=prompt, walk_start=start)
            for prompt, start in _split(self.walk_prompt, self.walk_start, objective.max_walks)
        ]


def _split(a: Tensor, b: Tensor, size: int) -> Iterable[tuple[Tensor, Tensor]]:
    return zip(a.split(size), b.split(size), strict=True) if a.numel() else ()


def raw_errors(
    denoiser: nn.Module, data: CalibrationSet, prompt: Tensor, step: Tensor, output: Tensor | None = None
) -> Tensor:
    """float32 [n]: mean squared error of the output, over all branches, for (prompt, step) pairs int64 [n].

    `output`, [B n, c, h, w], is what the denoiser answers; None asks it.
    """
    if output is None:
        output = predict(denoiser, *data.inputs(prompt, step))
    error = output - data.answers(prompt, step)
    branches = torch.stack(error.square().flatten(1).mean(dim=1).chunk(data.targets.shape[2]))
    return branches.mean(dim=0)


def weighed_pairs(
    denoiser: nn.Module,
    data: CalibrationSet,
    objective: Objective,
    prompt: Tensor,
    step: Tensor,
    output: Tensor | None = None,
) -> Tensor:
    """float32 [n]: terms of the errors of pairs, relative to those at the start."""
    errors = raw_errors(denoiser, data, prompt, step, output)
    return objective.term(objective.raw[step].to(errors.device) * errors)


def weighed_walks(
    denoiser: nn.Module,
    data: CalibrationSet,
    objective: Objective,
    prompt: Tensor,
    start: Tensor,
    first: Tensor | None = None,
) -> Tensor:
    """float32 [n]: terms of what walks end in, relative to the start of training."""
    errors = walks(denoiser, data, objective, prompt, start, first)
    return objective.term(objective.walks[start].to(errors.device) * errors)


def in_slices(errors: Errors, prompt: Tensor, step: Tensor, size: int | None) -> Tensor:
    """`errors(prompt, step)`, float32 [n], at most `size` of them at a time."""
    if size is None or prompt.numel() <= size:
        return errors(prompt, step)
    return torch.cat([errors(p, s) for p, s in _split(prompt, step, size)])


def walks(
    denoiser: nn.Module,
    data: CalibrationSet,
    objective: Objective,
    prompt: Tensor,
    start: Tensor,
    first: Tensor | None = None,
) -> Tensor:
    """float32 [n]: what walks end in, for (prompt, step) pairs int64 [n]; `first` as :func:`walk_errors` has it."""
    assert objective.steps is not None
    return walk_errors(
        denoiser,
        data,
        objective.steps,
        prompt,
        start,
        length=objective.walk_length,
        guidance_scale=objective.guidance_scale,
        first=first,
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
    max_pairs: int | None = None,
    max_walks: int | None = None,
    geometric: bool = False,
) -> Objective:
    """The objective under which the mean of errors is 1 in both terms for `denoiser` on the given prompts."""
    count = data.timesteps.numel()
    bare = Objective(
        raw=torch.ones(count),
        walks=torch.empty(0),
        steps=steps,
        walk_length=walk_length,
        walk_share=walk_share,
        guidance_scale=guidance_scale,
        max_pairs=max_pairs,
        max_walks=max_walks,
        geometric=geometric,
    )
    raw_of = functools.partial(raw_errors, denoiser, data)
    everything = torch.stack(
        [in_slices(raw_of, p.expand(count), torch.arange(count), max_pairs) for p in prompts]
    )
    raw = one_over(everything, geometric=geometric)
    objective = dataclasses.replace(bare, raw=raw)
    starts = 0 if steps is None or not walk_share else steps.starts(walk_length)
    if not starts:
        return objective
    walks_of = functools.partial(walks, denoiser, data, bare)
    ends = torch.stack(
        [in_slices(walks_of, p.expand(starts), torch.arange(starts), max_walks) for p in prompts]
    )
    return dataclasses.replace(objective, walks=one_over(ends, geometric=geometric))


def one_over(errors: Tensor, *, geometric: bool) -> Tensor:
    """float32 [T]: one over the mean over prompts of errors [P, T]."""
    if geometric:
        return 1 / errors.clamp_min(LEAST_ERROR).log().mean(dim=0).exp().cpu()
    return 1 / errors.mean(dim=0).clamp_min(LEAST_ERROR).cpu()


@torch.no_grad()
def total_loss(denoiser: nn.Module, data: CalibrationSet, prompts: Tensor, objective: Objective) -> float:
    """The sum over prompts of the loss over whole trajectories: every step, and walks that follow one another.

    :meth:`Objective.mean` of it over prompts is 1 for the denoiser of the objective.
    """
    step = torch.arange(data.timesteps.numel())
    start = torch.arange(0, objective.walks.numel(), objective.walk_length)
    pairs_of = functools.partial(weighed_pairs, denoiser, data, objective)
    walks_of = functools.partial(weighed_walks, denoiser, data, objective)
    total = 0.0
    for prompt in prompts:
        raw = in_slices(pairs_of, prompt.expand(step.numel()), step, objective.max_pairs).mean()
        if objective.walking:
            ends = in_slices(walks_of, prompt.expand(start.numel()), start, objective.max_walks)
            raw = combine(objective, raw, ends.mean())
        total += float(raw)
    return total


def combine(objective: Objective, raw: Tensor, walked: Tensor) -> Tensor:
    """Both terms as one loss."""
    return (raw + objective.walk_share * walked) / (1 + objective.walk_share)


def draw(
    data: CalibrationSet,
    prompts: Tensor,
    objective: Objective,
    *,
    batch_size: int,
    num_walks: int,
    generator: torch.Generator,
    own: Tensor | None = None,
) -> Draw:
    """`batch_size` (prompt, step) pairs and `num_walks` walks, all at random; half of the pairs of `own`, int64 [m]."""
    prompt, step = draw_pairs(prompts, data.timesteps.numel(), batch_size, generator)
    if own is not None:
        half = batch_size // 2
        prompt[batch_size - half :] = own[torch.randint(own.numel(), (half,), generator=generator)]
    walk_prompt = walk_start = prompt[:0]
    if objective.walking and num_walks:
        walk_prompt, walk_start = draw_pairs(prompts, objective.walks.numel(), num_walks, generator)
    return Draw(prompt, step, walk_prompt, walk_start, batch_size, walk_prompt.numel())


def network_loss(denoiser: nn.Module, data: CalibrationSet, objective: Objective, drawn: Draw) -> Tensor:
    """The part that `drawn` has in the loss of its update, a scalar."""
    raw = walked = torch.zeros((), device=data.device)
    pairs, starts = _first_outputs(denoiser, data, drawn)
    if drawn.prompt.numel():
        terms = weighed_pairs(denoiser, data, objective, drawn.prompt, drawn.step, pairs)
        raw = terms.sum() / drawn.num_pairs
    if not drawn.num_walks:
        return raw
    if drawn.walk_prompt.numel():
        ends = weighed_walks(denoiser, data, objective, drawn.walk_prompt, drawn.walk_start, starts)
        walked = ends.sum() / drawn.num_walks
    return combine(objective, raw, walked)


def _first_outputs(
    denoiser: nn.Module, data: CalibrationSet, drawn: Draw
) -> tuple[Tensor | None, Tensor | None]:
    """What the denoiser answers to pairs and at the start of walks, asked once; None where there is only one kind.

    Few samples at a time cost the network more for each.
    """
    count, walking = drawn.prompt.numel(), drawn.walk_prompt.numel()
    if not count or not walking:
        return None, None
    prompt = torch.cat([drawn.prompt, drawn.walk_prompt])
    output = predict(denoiser, *data.inputs(prompt, torch.cat([drawn.step, drawn.walk_start])))
    by_branch = output.unflatten(0, (-1, count + walking))
    return by_branch[:, :count].flatten(0, 1), by_branch[:, count:].flatten(0, 1)


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
    """Mean over the temporal layers of their outputs' squared error, each relative to its output's power.

    A layer that answers zero, as one that was never trained, has no power.
    """
    with torch.no_grad(), exactly(timestep):
        targets = trace.temporal_outputs(teacher, timestep, conditioning, None)
    outputs = trace.temporal_outputs(student, timestep, conditioning, context)
    losses = [
        (output - target).square().mean() / target.square().mean().clamp_min(LEAST_ERROR)
        for output, target in zip(outputs, targets, strict=True)
    ]
    return torch.stack(losses).mean()


def temporal_conditioning(
    trace: Trace,
    data: CalibrationSet,
    count: int,
    generator: torch.Generator,
    prompts: Tensor | None = None,
) -> dict[str, Tensor]:
    """`count` random choices of what the temporal layers depend on besides the timestep, from either branch.

    Of the `prompts` int64 [n]; None means all.
    """
    if not trace.conditions:
        return {}
    among = torch.arange(data.num_prompts) if prompts is None else prompts
    prompt = among[torch.randint(among.numel(), (count,), generator=generator)]
    # Of many draws; what these layers do not read is large: text tokens, for one.
    positive, negative = (
        {name: value for name, value in branch.items() if name in trace.conditions}
        for branch in (data.positive, data.negative)
    )
    rows = conditioning_of(positive, negative, prompt, data.device)
    if negative:
        # As in training, one in two is told nothing: that branch is half of what the network is asked.
        told_nothing = torch.randint(2, (count,), generator=generator).bool().to(data.device)
        rows = {name: pick(told_nothing, *value.chunk(2)) for name, value in rows.items()}
    return rows


def pick(first: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Rows of `a` where `first` [n] says so, else of `b`; both [n, ...]."""
    return torch.where(first.reshape(-1, *[1] * (a.ndim - 1)), a, b)

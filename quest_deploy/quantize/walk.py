"""Short walks of the quantized denoiser, away from a recorded trajectory by steps of its own.

Errors on recorded latents do not tell what becomes of an image: a sampler adds up what all steps leave, and every step
answers to what the ones before it did. A walk starts at a recorded latent, lets the student take `length` steps, and
ends in the squared distance to where the full-precision model was then.

The sampler's step is read off the trajectories themselves: a deterministic first-order sampler (DDIM, Euler, flow
matching) moves the latents by ``x' = keep x + move guided_prediction`` with two numbers for each step, which least
squares finds exactly, whatever the schedule and the kind of prediction. For other samplers there are no walks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from quest_deploy import sampling
from quest_deploy.config import Recipe
from quest_deploy.model.components import Conditioning, predict
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.schedule import flow_of, recording_config
from quest_deploy.sampling import guide

MAX_RESIDUAL = 1e-3


@dataclass(frozen=True)
class Steps:
    """The sampler's steps between recorded latents.

    Attributes:
        keep: float32 [T - 1].
        move: float32 [T - 1].
    """

    keep: Tensor
    move: Tensor

    def starts(self, length: int) -> int:
        """From how many of the recorded latents a walk of `length` steps ends at a recorded one."""
        return max(0, self.keep.numel() + 1 - length)


def guided_target(targets: Tensor, guidance_scale: float) -> Tensor:
    """What the sampler followed, [P, c, h, w], where the branches' outputs were `targets` [P, B, c, h, w]."""
    return targets[:, 0] if targets.shape[1] == 1 else guide(torch.cat(targets.unbind(1)), guidance_scale)


def fit_steps(data: CalibrationSet, guidance_scale: float) -> Steps | None:
    """The steps that `data` was recorded with; None where they are not of the module's form.

    Args:
        data: Recorded trajectories.
        guidance_scale: That they were recorded with.
    """
    keep, move = [], []
    # Step by step: the trajectories may be larger than memory.
    prompt = torch.arange(data.num_prompts)[: data.targets_at_once]
    for step in range(data.timesteps.numel() - 1):
        at = torch.full_like(prompt, step)
        target = guided_target(data.targets[prompt, at], guidance_scale).to(torch.float64)
        latents, following = data.latents[prompt, at], data.latents[prompt, at + 1]
        known = torch.stack([latents.to(torch.float64).flatten(), target.flatten()], dim=1)
        wanted = following.to(torch.float64).flatten()
        solution = torch.linalg.lstsq(known, wanted[:, None]).solution.flatten()
        moved = known[:, 1] * solution[1]
        if not float((known @ solution - wanted).norm()) <= MAX_RESIDUAL * float(moved.norm()):
            return None
        keep.append(float(solution[0]))
        move.append(float(solution[1]))
    return Steps(keep=torch.tensor(keep), move=torch.tensor(move)) if keep else None


def has_steps(model: LoadedModel, count: int) -> bool:
    """Whether trajectories of `count` steps will have steps of the module's form: found on noise for predictions."""
    config = recording_config(model, count)
    # Where latents are clipped depends on the predictions, and those of a model hardly are.
    config = {**config, **{name: False for name in ("clip_sample", "thresholding") if name in config}}
    generators = sampling.generators_of([0])
    latents: list[Tensor] = []
    targets: list[Tensor] = []

    def denoise(sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        targets.append(sampling.draw_noise(generators, model.latent_shape))
        return targets[-1]

    sampling.denoise(
        denoise,
        sampling.make_scheduler(None, config),
        sampling.draw_noise(generators, model.latent_shape),
        {},
        None,
        steps=count,
        guidance_scale=1.0,
        flow=flow_of(model),
        generators=generators,
        callback=lambda step: latents.append(step.latents),
    )
    recorded = CalibrationSet(
        timesteps=torch.zeros(count),
        latents=torch.stack(latents, dim=1),
        targets=torch.stack(targets, dim=1)[:, :, None],
        positive={},
        negative={},
    )
    return fit_steps(recorded, 1.0) is not None


def any_steps(model: LoadedModel, recipe: Recipe) -> Steps | None:
    """As many as `fit_steps` will find for the recipe's walks, of any values: for estimates."""
    count = recipe.calibration_steps
    if not recipe.walk_share or not has_steps(model, count):
        return None
    return Steps(keep=torch.ones(count - 1), move=torch.ones(count - 1))


def walk_errors(
    denoiser: nn.Module,
    data: CalibrationSet,
    steps: Steps,
    prompt: Tensor,
    start: Tensor,
    *,
    length: int,
    guidance_scale: float,
    first: Tensor | None = None,
) -> Tensor:
    """Mean squared distance, in the latents as the denoiser is given them, after a walk: float32 [n].

    Args:
        denoiser: The quantized one.
        data: Recorded trajectories.
        steps: Of :func:`fit_steps`.
        prompt: int64 [n].
        start: int64 [n], below ``steps.starts(length)``.
        length: Steps.
        guidance_scale: That the trajectories were recorded with.
        first: What the denoiser answers at the start, [B n, c, h, w]; None asks it.
    """
    branches = data.targets.shape[2]
    conditioning = data.conditioning(prompt)
    latents = data.latents[prompt, start].to(data.device)
    shape = (-1, *[1] * (latents.ndim - 1))
    for step in range(length):
        at = start + step
        if first is None or step:
            sample = torch.cat([latents] * branches)
            timestep = data.timesteps[at].repeat(branches).to(data.device)
            output = predict(denoiser, sample, timestep, data.told(sample, timestep, conditioning))
        else:
            output = first
        output = output.to(torch.float32)
        prediction = guide(output, guidance_scale) if data.guided else output
        keep, move = (factor[at].reshape(shape).to(data.device) for factor in (steps.keep, steps.move))
        latents = keep * latents + move * prediction
    return (latents - data.latents[prompt, start + length].to(data.device)).square().flatten(1).mean(dim=1)

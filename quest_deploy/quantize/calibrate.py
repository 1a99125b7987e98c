"""Calibration: the full-precision loop over prompts, classes or seeds, and what its layers saw.

No training images: the model's own trajectories are the data (QuEST, arXiv 2402.03666, section 4.4).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy import sampling
from quest_deploy.errors import CalibrationError
from quest_deploy.model.components import Conditioning, ControlNet, first_device, join_conditioning, predict
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.insert import channel_axis, quantizable_layers
from quest_deploy.quantize.pictures import pictures, sees_pictures, without_pictures
from quest_deploy.quantize.recomputed import (
    CPU,
    RECOMPUTED_AT_ONCE,
    Recomputed,
    conditioning_of,
    controlled,
)
from quest_deploy.quantize.resume import GENERATOR, Throttle, WorkDirectory
from quest_deploy.quantize.rows import EXTREME_ROWS as EXTREME_ROWS
from quest_deploy.quantize.rows import RowChoice, by_group
from quest_deploy.quantize.schedule import flow_of, recording_config

BRANCHES = ("positive", "negative")
PIECES = "inputs-"
Report = Callable[[int, int], None]
"""(completed, total) of the running stage."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Trajectories of the full-precision model, both guidance branches where it has two.

    Attributes:
        timesteps: float32 [T], descending, as the denoiser is told them.
        latents: float32 [P, T, c, h, w], scaled for the denoiser.
        targets: float32 [P, T, B, c, h, w]: its output for the negative and the positive branch (B = 2), or its only
            one (B = 1).
        positive: What the denoiser was told for each prompt, [P, ...] by input name.
        negative: What it was told for the negative branch, [1, ...] by input name; what is missing is the same as for
            the positive one. Empty where B = 1.
        device: Where batches are put; the tensors above stay where they are.
        control: The ControlNet that looks at pictures before each call of the denoiser, on `device`; None without one.
    """

    timesteps: Tensor
    latents: Tensor
    targets: Tensor | Recomputed
    positive: Conditioning
    negative: Conditioning
    device: torch.device = CPU
    control: ControlNet | None = None

    @property
    def guided(self) -> bool:
        """Whether there are two branches."""
        return self.targets.shape[2] == 2

    @property
    def num_prompts(self) -> int:
        return self.latents.shape[0]

    @property
    def targets_at_once(self) -> int:
        """Of how many prompts the targets of one step can be asked for at once."""
        return self.num_prompts if isinstance(self.targets, Tensor) else RECOMPUTED_AT_ONCE

    def boundaries(self) -> Tensor:
        """float32 [T - 1], ascending: midpoints between calibrated timesteps, so that any t has a nearest one."""
        ordered = self.timesteps.flip(0)
        return (ordered[1:] + ordered[:-1]) / 2

    def conditioning(self, prompt: Tensor) -> dict[str, Tensor]:
        """What denoiser and ControlNet are told for the prompts int64 [n], of both branches, negative ones first."""
        return conditioning_of(self.positive, self.negative, prompt, self.device)

    def told(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Conditioning:
        """What the denoiser is told at `sample` [Bn, c, h, w] and `timestep` [Bn], of :meth:`conditioning`."""
        return controlled(self.control, sample, timestep, conditioning)

    def inputs(self, prompt: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Conditioning]:
        """What the denoiser is given on all branches of (prompt, step) pairs int64 [n], negative branches first.

        Returns:
            sample [Bn, c, h, w], timestep [Bn], conditioning [Bn, ...] by name.
        """
        branches = self.targets.shape[2]
        sample = torch.cat([self.latents[prompt, step]] * branches).to(self.device)
        timestep = self.timesteps[step].repeat(branches).to(self.device)
        return sample, timestep, self.told(sample, timestep, self.conditioning(prompt))

    def batch(self, prompt: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Conditioning, Tensor]:
        """As :meth:`inputs`, and what the full-precision denoiser answered, [Bn, c, h, w]."""
        return (*self.inputs(prompt, step), self.answers(prompt, step))

    def answers(self, prompt: Tensor, step: Tensor) -> Tensor:
        """What the full-precision denoiser answered to :meth:`inputs`, [Bn, c, h, w]."""
        return torch.cat(self.targets[prompt, step].unbind(1)).to(self.device)

    def tensors(self) -> dict[str, Tensor]:
        """Everything as one mapping, for files; :func:`from_tensors` reads it."""
        result = {"timesteps": self.timesteps, "latents": self.latents}
        if isinstance(self.targets, Tensor):
            result["targets"] = self.targets
        for branch in BRANCHES:
            result |= {f"{branch}/{name}": value for name, value in getattr(self, branch).items()}
        return result


def from_tensors(
    tensors: dict[str, Tensor],
    *,
    teacher: nn.Module | None = None,
    device: torch.device = CPU,
    control: ControlNet | None = None,
) -> CalibrationSet:
    """The inverse of :meth:`CalibrationSet.tensors`.

    Args:
        tensors: By name.
        teacher: The full-precision denoiser, which answers again where the targets are missing.
        device: Where batches are put.
        control: The model's ControlNet, if it has one.
    """
    branches: dict[str, dict[str, Tensor]] = {branch: {} for branch in BRANCHES}
    for key, value in tensors.items():
        branch, _, name = key.partition("/")
        if branch in branches:
            branches[branch][name] = value
    targets = tensors.get("targets")
    kept: dict[str, Any] = {"timesteps": tensors["timesteps"], "latents": tensors["latents"]}
    kept |= {**branches, "device": device, "control": control}
    if targets is not None:
        return CalibrationSet(**kept, targets=targets)
    assert teacher is not None
    return CalibrationSet(**kept, targets=Recomputed(teacher=teacher, **kept))


def told_to(
    model: LoadedModel,
    prompts: Sequence[str],
    guidance_scale: float,
    latent_shape: tuple[int, int, int] | None = None,
) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """What the denoiser is told.

    Args:
        model: Full precision.
        prompts: n texts or classes.
        guidance_scale: For models with an input for it.
        latent_shape: Channels, height and width of the latents; None for those of the model's own size.

    Returns:
        [n, ...] by input name; and [1, ...] for the negative branch, None where the model has none.

    Raises:
        ConfigError: a prompt is no class of a class-conditional model.
    """
    conditioner, latents = (
        model.conditioner,
        torch.empty(1, *(latent_shape or model.latent_shape), device="meta"),
    )
    positive = conditioner.complete(conditioner.encode(prompts), latents, guidance_scale)
    negative = conditioner.encode_negative(1)
    if negative is not None:
        negative = conditioner.complete(negative, latents, guidance_scale, negative=True)
    return positive, negative


@torch.no_grad()
def record_trajectories(
    model: LoadedModel,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    latent_shape: tuple[int, int, int] | None = None,
    schedule: Mapping[str, Any] | None = None,
    follow: nn.Module | None = None,
    report: Report = lambda completed, total: None,
) -> CalibrationSet:
    """Run the full-precision loop and keep what the denoiser was given and what it answered.

    Args:
        model: The full-precision model.
        prompts: P prompts; of an unconditional model only their number counts.
        steps: T, denoising steps.
        guidance_scale: At least 1; both branches are recorded in any case, where the model has two.
        seed: Prompt `i` starts from the noise of seed `seed + i`.
        batch_size: Prompts at a time.
        latent_shape: Channels, height and width of the latents; None for those of the model's own size.
        schedule: The scheduler's configuration; None takes that of `recording_config`, and tells which if it must.
        follow: The denoiser whose answers the sampler follows, in place of the full-precision one's, which are kept.
        report: Called after each batch.

    Raises:
        CalibrationError: no scheduler visits every timestep once, or a NaN or infinity appears.
        ConfigError: a prompt is no class of a class-conditional model.
    """
    device, control = first_device(model.denoiser), model.control
    config = schedule or recording_config(model, steps, latent_shape=latent_shape, tell=True)
    parts = []
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        positive, negative = told_to(model, chunk, guidance_scale, latent_shape)
        branches = 1 if negative is None else 2
        seeds = range(seed + start, seed + start + len(chunk))
        seen, answered, visited = [], [], []

        def run(
            sample: Tensor, timestep: Tensor, conditioning: Conditioning, denoiser: nn.Module = model.denoiser
        ) -> Tensor:
            time = model.denoiser_time(timestep)
            return predict(denoiser, sample, time, controlled(control, sample, time, conditioning))

        def all_branches(sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
            output = run(sample, timestep, conditioning)
            answered.append(torch.stack(output.chunk(branches), dim=1).to(CPU))  # noqa: B023
            return output if follow is None else run(sample, timestep, conditioning, follow)

        def keep(step: sampling.Step) -> None:
            seen.append(step.latents.to(CPU))  # noqa: B023
            visited.append(float(model.denoiser_time(step.timestep)))  # noqa: B023

        def draw(denoise: sampling.Denoise, callback: Callable[[sampling.Step], None] | None) -> Tensor:
            generators = sampling.generators_of(seeds)  # noqa: B023
            told = conditioning_of(positive, negative or {}, torch.arange(len(chunk)), device)  # noqa: B023
            either = {name: value.chunk(branches) for name, value in told.items()}  # noqa: B023
            return sampling.denoise(
                denoise,
                sampling.make_scheduler(None, config),
                sampling.draw_noise(generators, latent_shape or model.latent_shape).to(device),
                {name: value[-1] for name, value in either.items()},
                {name: value[0] for name, value in either.items()} if branches == 2 else None,  # noqa: B023
                steps=steps,
                # A guidance scale of 1 or less would skip the negative branch, whose answers are needed as well.
                guidance_scale=max(guidance_scale, 1.0 + 1e-6),
                flow=flow_of(model),
                generators=generators,
                callback=callback,
            )

        if sees_pictures(model):
            positive |= pictures(model, draw(run, None).to(CPU), seeds)
            negative = None if negative is None else without_pictures(negative)
        draw(all_branches, keep)
        parts.append(
            CalibrationSet(
                timesteps=torch.tensor(visited),
                latents=torch.stack(seen, dim=1),
                targets=torch.stack(answered, dim=1),
                positive=positive,
                negative=negative or {},
                device=device,
                control=control,
            )
        )
        report(min(start + batch_size, len(prompts)), len(prompts))
    result = join(parts)
    _check(result)
    return result


def join(parts: Sequence[CalibrationSet]) -> CalibrationSet:
    """Sets recorded with the same settings, as one."""
    kept: dict[str, Any] = {
        "timesteps": parts[0].timesteps,
        "latents": torch.cat([part.latents for part in parts]),
        "positive": join_conditioning([part.positive for part in parts]),
        "negative": parts[0].negative,
        "device": parts[0].device,
        "control": parts[0].control,
    }
    first = parts[0].targets
    if isinstance(first, Recomputed):
        return CalibrationSet(**kept, targets=Recomputed(teacher=first.teacher, **kept))
    targets = [part.targets for part in parts if isinstance(part.targets, Tensor)]
    return CalibrationSet(**kept, targets=torch.cat(targets))


def _check(data: CalibrationSet) -> None:
    for name, values in data.tensors().items():
        if not torch.isfinite(values).all():
            raise CalibrationError(
                f"calibration {name} hold NaN or infinity; does the model draw images in fp32, and does its scheduler "
                "suit what it predicts (a zero-SNR schedule has no epsilon prediction)?"
            )


@torch.no_grad()
def collect_inputs(
    denoiser: nn.Module,
    data: CalibrationSet,
    *,
    prompts_per_step: int,
    positions: int,
    seed: int,
    report: Report = lambda completed, total: None,
    work: WorkDirectory | None = None,
    names: Collection[str] | None = None,
    at_once: int | None = None,
) -> dict[str, Tensor]:
    """What every quantizable layer is given, timestep by timestep.

    Args:
        denoiser: Full-precision diffusers module.
        data: Recorded trajectories.
        prompts_per_step: How many prompts are run at each timestep.
        positions: How many tokens or pixels of each layer's input are kept per timestep.
        seed: For the choice of positions.
        report: Called after each timestep.
        work: Where to keep what was seen, to go on from after an interruption.
        names: The layers that are looked at; None means all.
        at_once: The most prompts that are run together; None means all. The result is the same.

    Returns:
        By layer name, float32 [G, positions + 2, c_in]; the last two hold each channel's least and largest value
        over all positions. Groups ascend with the timestep, unlike the steps of `data`.

    Raises:
        CalibrationError: a layer was not run, or not equally often, in each call of the denoiser.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = quantizable_layers(denoiser)
    kept: dict[str, list[Tensor]] = {name: [] for name in layers if names is None or name in names}

    choice = RowChoice(generator, data.targets.shape[2])

    def keep(name: str, axis: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].movedim(axis, -1).flatten(0, -2)
            run, places, chosen = choice.of(name, rows.shape[0], positions)
            low, high = rows.amin(dim=0).to(CPU), rows.amax(dim=0).to(CPU)
            if choice.first == 0:
                seen = torch.empty(positions + EXTREME_ROWS, rows.shape[1])
                seen[-2], seen[-1] = low, high
                kept[name].append(seen)
            seen = kept[name][choice.place(name, run)]
            seen[places] = rows[chosen].to(CPU)
            seen[-2], seen[-1] = torch.minimum(seen[-2], low), torch.maximum(seen[-1], high)

        return hook

    handles = [
        layers[name].register_forward_pre_hook(keep(name, channel_axis(layers[name]))) for name in kept
    ]
    steps, throttle = data.timesteps.numel(), Throttle(work)
    first, saved = _go_on(work, kept, generator)
    try:
        for step in range(first, steps):
            prompt = torch.randperm(data.num_prompts, generator=generator)[:prompts_per_step]
            for chunk in choice.chunks(prompt, at_once or prompts_per_step):
                predict(denoiser, *data.inputs(chunk, torch.full_like(chunk, step)))
            if work is not None and throttle.due() and step + 1 < steps:
                # Only what is new: all of it may be gigabytes.
                new = {name: torch.stack(rows[saved[name] :]) for name, rows in kept.items() if rows}
                work.save(f"{PIECES}{step:06d}", new | {GENERATOR: generator.get_state()}, steps=step + 1)
                saved = {name: len(rows) for name, rows in kept.items()}
            report(step + 1, steps)
    finally:
        for handle in handles:
            handle.remove()
    for name, rows in kept.items():
        if not rows or len(rows) % steps:
            raise CalibrationError(
                f"layer {name!r}: got {len(rows)} runs in {steps} calls of the denoiser, expected as many in each; "
                "a denoiser with unused layers is not supported"
            )
    return {name: torch.stack(by_group(rows, steps)) for name, rows in kept.items()}


def _go_on(
    work: WorkDirectory | None, kept: dict[str, list[Tensor]], generator: torch.Generator
) -> tuple[int, dict[str, int]]:
    """Put an interrupted run's state in place. Returns the first step to do, and how many rows each layer has."""
    first = 0
    for tensors, facts in [] if work is None else filter(None, map(work.load, work.names(PIECES))):
        generator.set_state(tensors.pop(GENERATOR))
        for layer, rows in tensors.items():
            kept[layer] += rows.unbind(0)
        first = facts["steps"]
    return first, {name: len(rows) for name, rows in kept.items()}

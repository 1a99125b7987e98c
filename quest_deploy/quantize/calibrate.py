"""Calibration: the full-precision loop over prompts, and scales from what its layers saw.

No training images: the model's own trajectories are the data (QuEST, arXiv 2402.03666, section 4.4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy import sampling
from quest_deploy.errors import CalibrationError
from quest_deploy.model.components import Denoiser, TextEncoder
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.insert import channel_axis, quantizable_layers

EXTREME_ROWS = 2
Report = Callable[[int, int], None]
"""(completed, total) of the running stage."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSet:
    """Trajectories of the full-precision model, both guidance branches.

    Attributes:
        timesteps: float32 [T], descending, as the scheduler visits them.
        latents: float32 [P, T, c, h, w], scaled for the denoiser.
        targets: float32 [P, T, 2, c, h, w]: its output for the negative and the positive prompt.
        positive: float32 [P, l, d].
        negative: float32 [1, l, d].
    """

    timesteps: Tensor
    latents: Tensor
    targets: Tensor
    positive: Tensor
    negative: Tensor

    @property
    def num_prompts(self) -> int:
        return self.latents.shape[0]

    def boundaries(self) -> Tensor:
        """float32 [T - 1], ascending: midpoints between calibrated timesteps, so that any t has a nearest one."""
        ordered = self.timesteps.flip(0)
        return (ordered[1:] + ordered[:-1]) / 2

    def batch(self, prompt: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Both branches of the given (prompt, step) pairs, negative branches first.

        Args:
            prompt: int64 [n].
            step: int64 [n].

        Returns:
            sample [2n, c, h, w], timestep [2n], encoder_hidden_states [2n, l, d], target [2n, c, h, w].
        """
        n = prompt.numel()
        latents, target = self.latents[prompt, step], self.targets[prompt, step]
        text = torch.cat([self.negative.expand(n, -1, -1), self.positive[prompt]])
        return (
            torch.cat([latents, latents]),
            self.timesteps[step].repeat(2),
            text,
            torch.cat([target[:, 0], target[:, 1]]),
        )


def tokenize(tokenizer: Any, prompts: Sequence[str]) -> Tensor:
    """int64 [n, l] token ids, padded and truncated to the model's length."""
    encoded = tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=tokenizer.model_max_length,
        return_tensors="pt",
    )
    return torch.as_tensor(encoded.input_ids)


@torch.no_grad()
def record_trajectories(
    model: LoadedModel,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    report: Report = lambda completed, total: None,
) -> CalibrationSet:
    """Run the full-precision loop and keep what the denoiser was given and what it answered.

    Args:
        model: The full-precision model.
        prompts: P prompts.
        steps: T, denoising steps of the model's own scheduler.
        guidance_scale: At least 1; both branches are recorded in any case.
        seed: Prompt `i` starts from the noise of seed `seed + i`.
        batch_size: Prompts at a time.
        report: Called after each batch.

    Raises:
        CalibrationError: the scheduler visits a timestep twice, or a NaN or infinity appears.
    """
    encoder, denoiser = TextEncoder(model.text_encoder), Denoiser(model.unet)
    config: Any = model.unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    negative = encoder(tokenize(model.tokenizer, [""]))[0]
    positive, latents, targets = [], [], []
    timesteps = torch.empty(0)
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        text = encoder(tokenize(model.tokenizer, chunk))[0]
        noise = sampling.initial_noise(range(seed + start, seed + start + len(chunk)), shape)
        seen, answered, visited = [], [], []

        def both_branches(sample: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
            output: Tensor = denoiser(sample, timestep.to(torch.float32), hidden)[0]
            answered.append(torch.stack(output.chunk(2), dim=1))  # noqa: B023
            return output

        def keep(step: sampling.Step) -> None:
            seen.append(step.latents)  # noqa: B023
            visited.append(float(step.timestep))  # noqa: B023

        scheduler = sampling.make_scheduler(None, model.scheduler.config)
        # A guidance scale of 1 or less would skip the negative branch, whose answers are needed as well.
        sampling.denoise(
            both_branches,
            scheduler,
            noise,
            text,
            negative.expand(len(chunk), -1, -1),
            steps=steps,
            guidance_scale=max(guidance_scale, 1.0 + 1e-6),
            callback=keep,
        )
        timesteps = torch.tensor(visited)
        positive.append(text)
        latents.append(torch.stack(seen, dim=1))
        targets.append(torch.stack(answered, dim=1))
        report(min(start + batch_size, len(prompts)), len(prompts))
    result = CalibrationSet(
        timesteps=timesteps,
        latents=torch.cat(latents),
        targets=torch.cat(targets),
        positive=torch.cat(positive),
        negative=negative,
    )
    _check(result)
    return result


def join(parts: Sequence[CalibrationSet]) -> CalibrationSet:
    """Sets recorded with the same settings, as one."""
    return CalibrationSet(
        timesteps=parts[0].timesteps,
        latents=torch.cat([part.latents for part in parts]),
        targets=torch.cat([part.targets for part in parts]),
        positive=torch.cat([part.positive for part in parts]),
        negative=parts[0].negative,
    )


def _check(data: CalibrationSet) -> None:
    if (data.timesteps.diff() >= 0).any():
        raise CalibrationError(
            "the model's scheduler visits a timestep twice, so timestep groups are not defined; "
            "set a first-order scheduler (for example DDIM) in the model's scheduler_config.json"
        )
    for name in ("positive", "latents", "targets"):
        if not torch.isfinite(getattr(data, name)).all():
            raise CalibrationError(
                f"calibration {name} hold NaN or infinity; does the model draw images in fp32?"
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
) -> dict[str, Tensor]:
    """What every quantizable layer is given, timestep by timestep.

    Args:
        denoiser: Full-precision diffusers module.
        data: Recorded trajectories.
        prompts_per_step: How many prompts are run at each timestep.
        positions: How many tokens or pixels of each layer's input are kept per timestep.
        seed: For the choice of positions.
        report: Called after each timestep.

    Returns:
        By layer name, float32 [G, positions + 2, c_in]; the last two hold each channel's least and largest value
        over all positions. Groups ascend with the timestep, unlike the steps of `data`.

    Raises:
        CalibrationError: a layer was not run exactly once in each call of the denoiser.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[Tensor]] = {name: [] for name in quantizable_layers(denoiser)}

    def keep(name: str, axis: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].movedim(axis, -1).flatten(0, -2)
            chosen = torch.randint(rows.shape[0], (positions,), generator=generator)
            kept[name].append(torch.cat([rows[chosen], rows.amin(dim=0)[None], rows.amax(dim=0)[None]]))

        return hook

    handles = [
        layer.register_forward_pre_hook(keep(name, channel_axis(layer)))
        for name, layer in quantizable_layers(denoiser).items()
    ]
    try:
        steps = data.timesteps.numel()
        for step in range(steps):
            prompt = torch.randperm(data.num_prompts, generator=generator)[:prompts_per_step]
            sample, timestep, text, _ = data.batch(prompt, torch.full_like(prompt, step))
            denoiser(sample, timestep, text)
            report(step + 1, steps)
    finally:
        for handle in handles:
            handle.remove()
    for name, rows in kept.items():
        if len(rows) != steps:
            raise CalibrationError(
                f"layer {name!r}: got {len(rows)} runs in {steps} calls of the denoiser, expected one in each; "
                "a denoiser with unused or repeated layers is not supported"
            )
    return {name: torch.stack(rows[::-1]) for name, rows in kept.items()}

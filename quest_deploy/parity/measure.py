"""Run one rung of the ladder: freely from the common noise, and teacher-forced on another rung's trajectory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from quest_deploy.config import ParityConfig
from quest_deploy.metrics import cosine, snr_db
from quest_deploy.model.components import Conditioning, join_conditioning
from quest_deploy.model.denoisers import CONTROL
from quest_deploy.model.families import VAE_ENCODER
from quest_deploy.pipeline.control import black_picture
from quest_deploy.sampling import draw_noise, generators_of

if TYPE_CHECKING:
    from quest_deploy.pipeline import Pipeline
    from quest_deploy.sampling import Step

Tick = Callable[[str], None]
"""Called once for each step of each batch, with what is being done."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What every rung is asked to draw.

    Attributes:
        prompts: n prompts.
        noise: float32 [n, c, h, w], the same for every rung.
        config: Steps, guidance scale, scheduler and batch size.
    """

    prompts: tuple[str, ...]
    noise: Tensor
    config: ParityConfig

    def batches(self) -> Iterator[slice]:
        """Slices of the prompts, `batch_size` at a time."""
        size = self.config.batch_size
        return (slice(start, start + size) for start in range(0, len(self.prompts), size))

    def generators(self, batch: slice) -> list[torch.Generator]:
        """For schedulers that draw noise at every step: each image's own, as its seed goes on after the first noise."""
        seeds = [self.config.seed + number for number in range(len(self.prompts))[batch]]
        generators = generators_of(seeds)
        _, channels, height, width = self.noise.shape
        draw_noise(generators, (channels, height, width))
        return generators


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Everything a rung computed when it ran freely, on the CPU.

    Attributes:
        positive: What the denoiser was told for the prompts, [n, ...] by input name.
        negative: What it was told for the empty prompt; None for a model without guidance.
        timesteps: One 0-d tensor a step.
        latents: The denoiser's input at each step, [n, c, h, w].
        noise_pred: The guided prediction at each step, [n, c, h, w].
        guidance_scale: That the images were drawn with.
        final: Latents after the last step, [n, c, h, w].
        images: float32 [n, 3, H, W] in [0, 1].
        encoded: The images as latents, [n, c, h, w]; None for a model that reads none.
        problem: Names the first tensor with a NaN or Inf; None if all are finite.
    """

    positive: Conditioning
    negative: Conditioning | None
    timesteps: tuple[Tensor, ...]
    latents: tuple[Tensor, ...]
    noise_pred: tuple[Tensor, ...]
    guidance_scale: float
    final: Tensor
    images: Tensor
    encoded: Tensor | None
    problem: str | None


@dataclass(frozen=True, kw_only=True)
class Forced:
    """The noise prediction on a given trajectory against the one made there.

    Attributes:
        snr_db: float64 [steps, n].
        cosine: float64 [steps, n].
        problem: Names the first tensor with a NaN or Inf; None if all are finite.
    """

    snr_db: Tensor
    cosine: Tensor
    problem: str | None


@dataclass
class _Recording:
    timesteps: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    noise_pred: list[Tensor] = field(default_factory=list)


def draw(pipeline: Pipeline, request: Request, tick: Tick) -> Trace:
    """Draw all images freely and keep the whole trajectory."""
    config = request.config
    recordings, embeddings, finals, images = [], [], [], []
    for batch in request.batches():
        prompts = request.prompts[batch]
        positive, negative = pipeline.encode(prompts), pipeline.encode_negative(len(prompts))
        if (seen := picture(pipeline, request, batch, positive)) is not None:
            positive = {**positive, CONTROL: seen}
            negative = None if negative is None else {**negative, CONTROL: seen}
        recording = _Recording()

        def record(step: Step, recording: _Recording = recording) -> None:
            recording.timesteps.append(step.timestep.cpu())
            recording.latents.append(step.latents.cpu())
            recording.noise_pred.append(step.noise_pred.cpu())
            tick("drawing freely")

        final = pipeline.denoise(
            request.noise[batch],
            positive,
            negative,
            steps=config.steps,
            guidance_scale=config.guidance_scale,
            scheduler=config.scheduler,
            generators=request.generators(batch),
            callback=record,
        )
        recordings.append(recording)
        embeddings.append((_on_cpu(positive), None if negative is None else _on_cpu(negative)))
        finals.append(final.cpu())
        images.append(pipeline.decode(final).cpu())
    positives, negatives = zip(*embeddings, strict=True)
    trace = Trace(
        guidance_scale=config.guidance_scale,
        positive=join_conditioning(positives),
        negative=None if None in negatives else join_conditioning(negatives),
        timesteps=tuple(recordings[0].timesteps),
        latents=_by_step([recording.latents for recording in recordings]),
        noise_pred=_by_step([recording.noise_pred for recording in recordings]),
        final=torch.cat(finals),
        images=torch.cat(images),
        encoded=encode_images(pipeline, torch.cat(images), request)
        if VAE_ENCODER in pipeline.engines
        else None,
        problem=None,
    )
    return _with_problem(trace, request.prompts)


def teacher_forced(pipeline: Pipeline, trace: Trace, request: Request, tick: Tick) -> Forced:
    """Predict the noise on the latents and embeddings of `trace`, step by step, and compare with its predictions."""
    ratios, cosines, problem = [], [], None
    for index, (timestep, latents, expected) in enumerate(
        zip(trace.timesteps, trace.latents, trace.noise_pred, strict=True)
    ):
        predictions = []
        for batch in request.batches():
            prediction = pipeline.predict_noise(
                latents[batch],
                timestep,
                _rows(trace.positive, batch),
                None if trace.negative is None else _rows(trace.negative, batch),
                guidance_scale=request.config.guidance_scale,
            )
            predictions.append(prediction.cpu())
            tick("on the other rung's trajectory")
        prediction = torch.cat(predictions)
        ratios.append(snr_db(expected, prediction))
        cosines.append(cosine(expected, prediction))
        where = f"{_at_step(index, timestep)}, teacher-forced"
        problem = problem or first_non_finite(f"noise prediction {where}", prediction, request.prompts)
    return Forced(snr_db=torch.stack(ratios), cosine=torch.stack(cosines), problem=problem)


def decode_again(pipeline: Pipeline, trace: Trace, request: Request) -> Tensor:
    """The final latents of `trace` decoded by this rung, [n, 3, H, W]."""
    return torch.cat([pipeline.decode(trace.final[batch]).cpu() for batch in request.batches()])


def encode_images(pipeline: Pipeline, images: Tensor, request: Request) -> Tensor:
    """Images [n, 3, H, W] as this rung's latents, [n, c, h, w]."""
    return torch.cat([pipeline.encode_images(images[batch]).cpu() for batch in request.batches()])


def picture(pipeline: Pipeline, request: Request, batch: slice, told: Conditioning) -> Tensor | None:
    """What a ControlNet looks at: a picture with something in it, made of each image's own noise; None without one.

    The pipeline's own, for who gives none, is black: nothing of what the network makes of pictures would be seen.
    """
    controlnet = pipeline.engines.get(str(pipeline.family.controlnet))
    if controlnet is None:
        return None
    noise = request.noise[batch]
    black = black_picture(controlnet.spec, noise, told)
    grey = noise.mean(dim=1, keepdim=True).expand(-1, black.shape[1], -1, -1)
    return F.interpolate(grey, size=black.shape[-2:], mode="nearest").sigmoid()


def first_non_finite(name: str, values: Tensor, prompts: Sequence[str]) -> str | None:
    """Describe the NaN and Inf in `values` [n, ...], one sample a prompt; None if there are none."""
    bad = ~torch.isfinite(values)
    if not bool(bad.any()):
        return None
    nans = int(torch.isnan(values).sum())
    prompt = prompts[int(bad.flatten(1).any(1).nonzero()[0])]
    return (
        f"{name}: {nans} NaN and {int(bad.sum()) - nans} Inf of {values.numel()} values, first for {prompt!r}"
    )


def _on_cpu(conditioning: Conditioning) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in conditioning.items()}


def _rows(conditioning: Conditioning, batch: slice) -> dict[str, Tensor]:
    return {name: value[batch] for name, value in conditioning.items()}


def _by_step(batches: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    return tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def _at_step(index: int, timestep: Tensor) -> str:
    return f"at step {index + 1} (timestep {timestep.item():g})"


def _with_problem(trace: Trace, prompts: Sequence[str]) -> Trace:
    # In the order of computation, so that the first one found is where it began.
    tensors = [(f"{name} of the prompts", value) for name, value in trace.positive.items()]
    tensors += [(f"{name} of the empty prompt", value) for name, value in (trace.negative or {}).items()]
    for index, timestep in enumerate(trace.timesteps):
        where = _at_step(index, timestep)
        tensors.append((f"latents {where}", trace.latents[index]))
        tensors.append((f"noise prediction {where}", trace.noise_pred[index]))
    tensors += [("final latents", trace.final), ("images", trace.images)]
    tensors += [] if trace.encoded is None else [("encoded images", trace.encoded)]
    for name, values in tensors:
        problem = first_non_finite(name, values, prompts)
        if problem is not None:
            return replace(trace, problem=problem)
    return trace

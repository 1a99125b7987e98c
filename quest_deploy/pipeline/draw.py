"""Drawing the images of a request batch by batch, and finding out what gave the first NaN."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from quest_deploy import sampling
from quest_deploy.config import GenerateConfig, ProgressEvent
from quest_deploy.errors import QuestDeployError
from quest_deploy.pipeline.images import to_pil
from quest_deploy.pipeline.safety import SafetyChecker
from quest_deploy.pipeline.text_to_image import Pipeline
from quest_deploy.sampling import Step

Progress = Callable[[ProgressEvent], None]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image to draw."""

    index: int
    prompt: str
    seed: int

    @property
    def file_name(self) -> str:
        return f"image-{self.index:05}.png"


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """One image, and its share of the seconds that its batch took.

    Attributes:
        job: What was asked for.
        image: What was drawn; black where the safety checker flagged it.
        seconds: Its share.
        flagged: What the safety checker said; None where none was asked.
    """

    job: Job
    image: Image.Image
    seconds: float
    flagged: bool | None = None


def make_jobs(config: GenerateConfig) -> list[Job]:
    """All images of a request, prompt by prompt, each with a seed of its own."""
    prompts = config.prompts or ("",)
    return [
        Job(index=index, prompt=prompts[index // config.num_images], seed=config.seed + index)
        for index in range(len(prompts) * config.num_images)
    ]


def draw_images(
    pipeline: Pipeline,
    config: GenerateConfig,
    scheduler: Any,
    progress: Progress | None = None,
    *,
    safety_checker: SafetyChecker | None = None,
) -> Iterator[Drawn]:
    """Draw all images, `batch_size` at a time.

    Args:
        pipeline: What draws.
        config: Prompts, schedule and seeds.
        scheduler: Used up to count the timesteps, of which some schedulers visit more than there are steps.
        progress: Told after each denoising step, in images times timesteps.
        safety_checker: Blackens what it flags; None asks nobody.

    Raises:
        ConfigError: the scheduler cannot do that many steps.
        QuestDeployError: a component gave a NaN or an infinity.
    """
    jobs = make_jobs(config)
    size = pipeline.latent_shape(config.height, config.width)[-2:]
    total = len(jobs) * len(sampling.timesteps(scheduler, config.steps, flow=pipeline.flow, size=size))
    completed = 0

    def count(images: int) -> None:
        nonlocal completed
        completed += images
        if progress is not None:
            progress(ProgressEvent(stage="generate", completed=completed, total=total))

    for start in range(0, len(jobs), config.batch_size):
        batch = jobs[start : start + config.batch_size]
        began = time.perf_counter()
        images = draw_batch(pipeline, config, batch, count)
        flags: list[bool | None] = [None] * len(batch)
        if safety_checker is not None:
            images, flags[:] = safety_checker.check(images)
        pictures = [to_pil(image) for image in images]
        seconds = (time.perf_counter() - began) / len(batch)
        for job, picture, flagged in zip(batch, pictures, flags, strict=True):
            yield Drawn(job=job, image=picture, seconds=seconds, flagged=flagged)


def draw_batch(
    pipeline: Pipeline, config: GenerateConfig, batch: Sequence[Job], count: Callable[[int], None]
) -> Tensor:
    """Draw one batch, float32 [n, 3, H, W] in [0, 1]; `count` is told its size after each step.

    Raises:
        QuestDeployError: names the component, and the step, that gave the first NaN or infinity.
    """
    positive = pipeline.encode([job.prompt for job in batch])
    negative = pipeline.encode_negative(len(batch), config.negative_prompt)
    check_finite(" or ".join(pipeline.family.text_encoders), *positive.values(), *(negative or {}).values())
    shape = pipeline.latent_shape(config.height, config.width)
    generators = sampling.generators_of([job.seed for job in batch])

    def watch(step: Step) -> None:
        where = f"step {step.index + 1} (timestep {step.timestep.item():g})"
        check_finite(f"the scheduler before {where}", step.latents)
        check_finite(f"{pipeline.family.denoiser} at {where}", step.noise_pred)
        count(len(batch))

    latents = pipeline.denoise(
        sampling.draw_noise(generators, shape),
        positive,
        negative,
        steps=config.steps,
        guidance_scale=config.guidance_scale,
        scheduler=config.scheduler,
        generators=generators,
        callback=watch,
    )
    check_finite("the scheduler after the last step", latents)
    images = pipeline.decode(latents)
    check_finite("vae_decoder", images)
    return images


def check_finite(where: str, *tensors: Tensor) -> None:
    """Check that no tensor holds a NaN or an infinity.

    Raises:
        QuestDeployError: one does.
    """
    if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise QuestDeployError(
            f"{where} gave NaN or infinity, expected finite numbers; check the weights, or find the first divergence "
            "with `quest-deploy parity REFERENCE CANDIDATE`"
        )

"""The `generate` stage: prompts -> PNG files, a contact sheet and a manifest."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from quest_deploy import sampling
from quest_deploy.artifacts import Artifact, check_output, hash_directory, read_artifact, write_artifact
from quest_deploy.config import GenerateConfig, ProgressEvent, to_dict
from quest_deploy.errors import QuestDeployError
from quest_deploy.pipeline.images import MAX_CELLS, Cell, contact_sheet, save_png, thumbnail, to_pil
from quest_deploy.pipeline.load import load_pipeline
from quest_deploy.pipeline.text_to_image import Pipeline
from quest_deploy.sampling import Step

logger = logging.getLogger(__name__)

Progress = Callable[[ProgressEvent], None]

STAGE = "images"
CONTACT_SHEET = "contact-sheet.png"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image to draw."""

    index: int
    prompt: str
    seed: int

    @property
    def file_name(self) -> str:
        return f"image-{self.index:05}.png"


def make_jobs(config: GenerateConfig) -> list[Job]:
    """All images of a request, prompt by prompt, each with a seed of its own."""
    return [
        Job(index=index, prompt=config.prompts[index // config.num_images], seed=config.seed + index)
        for index in range(len(config.prompts) * config.num_images)
    ]


def generate(
    path: str | Path,
    output: str | Path,
    config: GenerateConfig,
    *,
    backend: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Draw images with a model, checkpoint, ONNX or engines.

    Args:
        path: What draws.
        output: The directory to make.
        config: Prompts, schedule and seeds.
        backend: What runs it; None chooses by what `path` is.
        threads: CPU threads; None leaves the choice to the runtime.
        progress: Told after each denoising step, in images times steps.
        overwrite: Replace an existing directory of images.

    Raises:
        ArtifactError: `path` or `output` cannot be used.
        ConfigError: the backend, the scheduler or the image size does not fit the model.
        QuestDeployError: a component gave a NaN or an infinity.
    """
    path, output = Path(path), Path(output)
    check_output(output, stage=STAGE, overwrite=overwrite)
    with load_pipeline(path, backend=backend, threads=threads) as pipeline:
        digest = hash_directory(path) if pipeline.stage == "model" else read_artifact(path).digest
        pipeline.latent_shape(config.height, config.width)
        scheduler = pipeline.make_scheduler(config.scheduler)
        report = _Counter(progress, total=0)
        with write_artifact(
            output, stage=STAGE, config=to_dict(config), inputs={"source": digest}, overwrite=overwrite
        ) as writer:
            common = _common_metadata(pipeline, config, type(scheduler).__name__, digest)
            cells: list[Cell] = []
            drawn: list[dict[str, Any]] = []
            start = time.perf_counter()
            for job, image, seconds in draw_images(pipeline, config, report):
                metadata = {"prompt": job.prompt, "seed": str(job.seed), **common}
                save_png(image, writer.path / job.file_name, metadata)
                drawn.append(
                    {
                        "file": job.file_name,
                        "prompt": job.prompt,
                        "seed": job.seed,
                        "seconds": round(seconds, 4),
                    }
                )
                if len(cells) < MAX_CELLS:
                    cells.append(Cell(image=thumbnail(image), caption=job.prompt, note=f"seed {job.seed}"))
            seconds = time.perf_counter() - start
            columns = config.num_images if 1 < config.num_images <= 8 else None
            contact_sheet(cells, columns=columns).save(writer.path / CONTACT_SHEET)
            if len(drawn) > len(cells):
                logger.info("the contact sheet shows the first %d of %d images", len(cells), len(drawn))
            writer.details.update(
                backend=pipeline.backend,
                device=str(pipeline.device),
                source_stage=pipeline.stage,
                scheduler=type(scheduler).__name__,
                images=drawn,
                seconds=round(seconds, 4),
                seconds_per_image=round(seconds / len(drawn), 4),
            )
    return read_artifact(output, stage=STAGE)


class _Counter:
    """Counts images times denoising steps."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.completed, self.total = progress, 0, total

    def add(self, images: int) -> None:
        self.completed += images
        if self.progress is not None:
            self.progress(ProgressEvent(stage="generate", completed=self.completed, total=self.total))


def draw_images(
    pipeline: Pipeline, config: GenerateConfig, counter: _Counter
) -> Iterator[tuple[Job, Image.Image, float]]:
    """Draw batch by batch; yields each image with its share of the batch's seconds."""
    jobs = make_jobs(config)
    scheduler = pipeline.make_scheduler(config.scheduler)
    counter.total = len(jobs) * len(sampling.timesteps(scheduler, config.steps))
    for start in range(0, len(jobs), config.batch_size):
        batch = jobs[start : start + config.batch_size]
        began = time.perf_counter()
        images = draw_batch(pipeline, config, batch, counter)
        pictures = [to_pil(image) for image in images]
        seconds = (time.perf_counter() - began) / len(batch)
        for job, picture in zip(batch, pictures, strict=True):
            yield job, picture, seconds


def draw_batch(pipeline: Pipeline, config: GenerateConfig, batch: list[Job], counter: _Counter) -> Tensor:
    """Draw one batch, float32 [n, 3, H, W] in [0, 1].

    Raises:
        QuestDeployError: names the component, and the step, that gave the first NaN or infinity.
    """
    positive = pipeline.encode([job.prompt for job in batch])
    negative = pipeline.encode([config.negative_prompt] * len(batch))
    check_finite("text_encoder", positive, negative)
    shape = pipeline.latent_shape(config.height, config.width)
    generators = sampling.generators_of([job.seed for job in batch])
    noise = sampling.draw_noise(generators, shape)

    def watch(step: Step) -> None:
        where = f"step {step.index + 1} (timestep {step.timestep.item():g})"
        check_finite(f"the scheduler before {where}", step.latents)
        check_finite(f"unet at {where}", step.noise_pred)
        counter.add(len(batch))

    latents = pipeline.denoise(
        noise,
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


def _common_metadata(
    pipeline: Pipeline, config: GenerateConfig, scheduler: str, digest: str
) -> dict[str, str]:
    from quest_deploy import __version__

    return {
        "negative_prompt": config.negative_prompt,
        "steps": str(config.steps),
        "guidance_scale": str(config.guidance_scale),
        "scheduler": scheduler,
        "backend": pipeline.backend,
        "model": pipeline.path.resolve().name,
        "model_digest": digest,
        "software": f"quest-deploy {__version__}",
    }

"""The `generate` stage: prompts -> PNG files, a contact sheet and a manifest."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quest_deploy.artifacts import (
    Artifact,
    ArtifactWriter,
    check_output,
    hash_directory,
    read_artifact,
    stage_of,
    write_artifact,
)
from quest_deploy.config import DEFAULT_RUN, GenerateConfig, RunConfig, to_dict
from quest_deploy.engines import resolve_backend
from quest_deploy.errors import StaleArtifactError
from quest_deploy.model.carried import SAFETY_CHECKER
from quest_deploy.model.denoisers import takes_guidance
from quest_deploy.pipeline.draw import Drawn, Progress, draw_images
from quest_deploy.pipeline.images import MAX_CELLS, MAX_COLUMNS, Cell, contact_sheet, save_png, thumbnail
from quest_deploy.pipeline.load import load_pipeline
from quest_deploy.pipeline.request import check_prompts, check_request
from quest_deploy.pipeline.safety import SafetyChecker, load_safety_checker
from quest_deploy.pipeline.text_to_image import Pipeline

logger = logging.getLogger(__name__)

STAGE = "images"
CONTACT_SHEET = "contact-sheet.png"
_VERDICTS = {None: "not asked", False: "passed", True: "flagged: the image was replaced by a black one"}


def generate(
    path: str | Path,
    output: str | Path,
    config: GenerateConfig,
    *,
    backend: str | None = None,
    threads: int | None = None,
    run: RunConfig = DEFAULT_RUN,
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
        run: What else some runtimes can be told.
        progress: Told after each denoising step, in images times timesteps.
        overwrite: Replace an existing directory of images.

    Raises:
        ArtifactError: `path`, its safety checker or `output` cannot be used.
        ConfigError: the backend, the scheduler or the image size does not fit the model.
        QuestDeployError: a component gave a NaN or an infinity.
        StaleArtifactError: `path` was changed while it was loaded.
    """
    path, output = Path(path), Path(output)
    check_output(output, stage=STAGE, overwrite=overwrite)
    check_request(path, config, resolve_backend(path, backend))
    digest = source_digest(path)
    with load_pipeline(path, backend=backend, threads=threads, run=run) as pipeline:
        check_prompts(pipeline.family, pipeline.classes, config)
        pipeline.latent_shape(config.height, config.width)
        guided = pipeline.has_negative or takes_guidance(pipeline.denoiser_spec)
        if config.guidance_scale > 1 and not guided:
            logger.info("the model has no negative branch, so the guidance scale has no effect")
        if config.negative_prompt and not (pipeline.has_negative and config.guidance_scale > 1):
            why = (
                "the guidance scale is not above 1"
                if pipeline.has_negative
                else "the model has no negative branch"
            )
            logger.info("%s, so the negative prompt has no effect", why)
        checker = load_safety_checker(path, pipeline.device) if config.safety_checker else None
        if source_digest(path) != digest:
            raise StaleArtifactError(
                f"'{path}' was changed while it was loaded, so nothing is drawn; run the same command once nothing "
                "changes it any more"
            )
        with write_artifact(
            output, stage=STAGE, config=to_dict(config), inputs={"source": digest}, overwrite=overwrite
        ) as writer:
            writer.details.update(run=to_dict(run), threads=threads)
            _write_images(writer, pipeline, config, digest, progress, checker)
    return read_artifact(output, stage=STAGE)


def source_digest(path: Path) -> str:
    """The digest of a model, or of an artifact, its files verified."""
    return hash_directory(path) if stage_of(path) == "model" else read_artifact(path).digest


def _write_images(
    writer: ArtifactWriter,
    pipeline: Pipeline,
    config: GenerateConfig,
    digest: str,
    progress: Progress | None,
    checker: SafetyChecker | None,
) -> None:
    scheduler = pipeline.make_scheduler(config.scheduler)
    facts = _facts(pipeline, config, type(scheduler).__name__, digest)
    cells: list[Cell] = []
    images: list[dict[str, Any]] = []
    start = time.perf_counter()
    for drawn in draw_images(pipeline, config, scheduler, progress, safety_checker=checker):
        job = drawn.job
        save_png(
            drawn.image,
            writer.path / job.file_name,
            {"prompt": job.prompt, "seed": str(job.seed), **facts, SAFETY_CHECKER: _VERDICTS[drawn.flagged]},
        )
        images.append(_entry(drawn))
        if len(cells) < MAX_CELLS:
            cells.append(Cell(image=thumbnail(drawn.image), caption=job.prompt, note=f"seed {job.seed}"))
    seconds = time.perf_counter() - start
    sheet = contact_sheet(cells, columns=sheet_columns(len(cells), config.num_images))
    sheet.save(writer.path / CONTACT_SHEET)
    if len(images) > len(cells):
        logger.info("the contact sheet shows the first %d of %d images", len(cells), len(images))
    if checker is not None:
        flagged = [image["file"] for image in images if image["flagged"]]
        logger.info(
            "the safety checker flagged %d of %d images%s", len(flagged), len(images), _named(flagged)
        )
    writer.details.update(
        backend=pipeline.backend,
        device=str(pipeline.device),
        source_stage=pipeline.stage,
        scheduler=type(scheduler).__name__,
        seconds=round(seconds, 4),
        seconds_per_image=round(seconds / len(images), 4),
        safety_checker=checker is not None,
        images=images,
    )


def _named(files: Sequence[str]) -> str:
    return f", which are black: {', '.join(files)}" if files else ""


def sheet_columns(cells: int, num_images: int) -> int:
    """About as many columns as rows, with the images of one prompt side by side where they fit."""
    square = min(MAX_COLUMNS, math.ceil(math.sqrt(cells)))
    if num_images > MAX_COLUMNS:
        return square
    prompts_a_row = max(1, round(square / num_images))
    return min(MAX_COLUMNS // num_images, prompts_a_row) * num_images


def _entry(drawn: Drawn) -> dict[str, Any]:
    job = drawn.job
    return {
        "file": job.file_name,
        "prompt": job.prompt,
        "seed": job.seed,
        "seconds": round(drawn.seconds, 4),
        "flagged": drawn.flagged,
    }


def _facts(pipeline: Pipeline, config: GenerateConfig, scheduler: str, digest: str) -> dict[str, str]:
    """What the metadata of every image says, besides its prompt and seed."""
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

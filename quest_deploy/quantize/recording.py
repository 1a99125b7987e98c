"""Recording trajectories, resumable: those of the full-precision network, and those that the quantized one draws."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from quest_deploy.config import FinetuneConfig, Recipe
from quest_deploy.model.components import first_device
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import calibrate, learned
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.memory import (
    cached_bytes,
    forward_memory,
    held_bytes,
    kept_bytes,
    limit_count,
    placeholder,
    prompts_at_once,
    size_bytes,
)
from quest_deploy.quantize.parts import Progress, reporter
from quest_deploy.quantize.resume import WorkDirectory
from quest_deploy.quantize.schedule import recording_config

BATCH_PROMPTS = 8
GPU_BATCH_PROMPTS = 32
TRAJECTORIES = "trajectories"
OWN_TRAJECTORIES = "own-trajectories"
Draw = Callable[[int, int], CalibrationSet]
"""The trajectories of the prompts from one place up to another."""


def batch_prompts(device: torch.device) -> int:
    """Prompts that are recorded together; a GPU is hardly busy with as few as a CPU is."""
    return BATCH_PROMPTS if device.type == "cpu" else GPU_BATCH_PROMPTS


def own_bytes(data: CalibrationSet, recipe: Recipe) -> int:
    """Of the student's own trajectories, kept as those of `data`."""
    return kept_bytes(data, recipe.targets) * recipe.on_policy_prompts // recipe.calibration_prompts


def drawing_bytes(model: LoadedModel, student: nn.Module, data: CalibrationSet, recipe: Recipe) -> int:
    """What is in memory while the student draws, beside its passes."""
    own = 0 if recipe.targets == "disk" else own_bytes(data, recipe)
    weights = size_bytes([*student.parameters(), *student.buffers()])
    return held_bytes(model, data, recipe) + own + weights + cached_bytes(student)


def record(
    model: LoadedModel, config: FinetuneConfig, work: WorkDirectory, progress: Progress
) -> CalibrationSet:
    """The recorded trajectories, a few prompts at a time so that little is lost."""
    recipe = config.recipe
    device = first_device(model.denoiser)
    at_once = batch_prompts(device)
    if recipe.memory_limit_gb is not None:
        at_once = prompts_at_once(model, placeholder(model, config), recipe, at_once)
    draw = _draw(model, config, at_once, seed=config.seed)
    report = reporter(progress, "record trajectories")
    done = work.load(TRAJECTORIES)
    if done is None:
        pieces = _pieces(
            TRAJECTORIES, recipe.calibration_prompts, batch_prompts(device), draw, config, work, report
        )
        if recipe.targets != "disk":
            return calibrate.join([_read(model, tensors) for _, tensors in pieces])
        work.append([name for name, _ in pieces], TRAJECTORIES)
        done = work.load(TRAJECTORIES)
    else:
        # A process that was killed just then may have left what was written into one file.
        work.drop(work.names(f"{TRAJECTORIES}-"))
    assert done is not None
    # safetensors maps the file: rows are read when they are asked for.
    return _read(model, done[0])


@torch.no_grad()
def record_own(
    model: LoadedModel,
    student: nn.Module,
    context: TimestepContext,
    data: CalibrationSet,
    config: FinetuneConfig,
    work: WorkDirectory,
    progress: Progress,
) -> CalibrationSet:
    """`data`, and after it the trajectories that `student` draws by itself, with full precision's answers there.

    What a sampler shows a quantized network is where its own errors led, which recorded trajectories do not hold: Ross
    et al., "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online Learning" (DAgger, arXiv
    1011.0686).

    Args:
        model: Full precision.
        student: Its denoiser, quantized; as it is now.
        context: The student's.
        data: What :func:`record` gave.
        config: Of the run; `on_policy_prompts` of its recipe are drawn, each from another noise than in `data`.
        work: Where a few prompts at a time are kept, so that little is lost.
        progress: Told how far it is.
    """
    recipe = config.recipe
    at_once = batch_prompts(data.device)
    if recipe.memory_limit_gb is not None:
        held = drawing_bytes(model, student, data, recipe)
        at_once = limit_count(at_once, held, recipe.memory_limit_gb, forward_memory(student, data, context))
    draw = _draw(model, config, at_once, seed=config.seed + recipe.calibration_prompts, follow=student)
    report = reporter(progress, "record own trajectories")
    done = work.load(OWN_TRAJECTORIES)
    if done is None:
        with learned.quantized_once(quantized_layers(student).values()):
            pieces = _pieces(
                OWN_TRAJECTORIES,
                recipe.on_policy_prompts,
                batch_prompts(data.device),
                draw,
                config,
                work,
                report,
            )
            if recipe.targets != "disk":
                return calibrate.join([data, *(_read(model, tensors) for _, tensors in pieces)])
            names = [name for name, _ in pieces]
        work.append([TRAJECTORIES, *names], OWN_TRAJECTORIES, keep=[TRAJECTORIES])
        done = work.load(OWN_TRAJECTORIES)
    else:
        work.drop(work.names(f"{OWN_TRAJECTORIES}-"))
    assert done is not None
    return _read(model, done[0])


def _draw(
    model: LoadedModel, config: FinetuneConfig, at_once: int, *, seed: int, follow: nn.Module | None = None
) -> Draw:
    schedule = recording_config(model, config.recipe.calibration_steps)
    return lambda start, stop: calibrate.record_trajectories(
        model,
        config.prompts[start:stop],
        steps=config.recipe.calibration_steps,
        guidance_scale=config.recipe.guidance_scale,
        seed=seed + start,
        batch_size=at_once,
        schedule=schedule,
        follow=follow,
    )


def _pieces(
    name: str,
    total: int,
    batch: int,
    draw: Draw,
    config: FinetuneConfig,
    work: WorkDirectory,
    report: calibrate.Report,
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Names and tensors of `total` prompts, `batch` at a time; what an interrupted run left is read."""
    for start in range(0, total, batch):
        stop, key = min(start + batch, total), f"{name}-{start:06d}"
        saved = work.load(key)
        if saved is None:
            tensors = draw(start, stop).tensors()
            if config.recipe.targets == "recompute":
                del tensors["targets"]
            work.save(key, tensors)
        else:
            tensors = saved[0]
        report(stop, total)
        yield key, tensors


def _read(model: LoadedModel, tensors: dict[str, Tensor]) -> CalibrationSet:
    device = first_device(model.denoiser)
    return calibrate.from_tensors(tensors, teacher=model.denoiser, device=device, control=model.control)

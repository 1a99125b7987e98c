"""Trajectories of the calibration prompts: those that rows calibrate on, and those kept to compare their losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.rows import Bench
from benchmarks.settings import MODEL, Settings
from benchmarks.stages import QUANTIZER, identity, made_by
from benchmarks.trajectories import predicted, record
from quest_deploy.artifacts import read_json, write_json
from quest_deploy.config import Recipe
from quest_deploy.files import hash_mapping
from quest_deploy.pipeline import Pipeline, load_pipeline
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize.calibrate import CalibrationSet


def calibration_trajectories(settings: Settings, recipe: Recipe, first: int, last: int) -> CalibrationSet:
    """Calibration prompts `first` to `last` (without it), from the noise that `finetune` gives them."""
    prompts = load_prompts(default="calibration")[first:last]
    what = {
        "model": identity(MODEL),
        **made_by(QUANTIZER),
        "prompts": list(prompts),
        "steps": recipe.calibration_steps,
        "guidance_scale": recipe.guidance_scale,
        "seed": settings.seed,
    }
    return record(
        MODEL,
        prompts,
        steps=recipe.calibration_steps,
        guidance_scale=recipe.guidance_scale,
        seed=settings.seed + first,
        batch_size=settings.batch_size,
        file=settings.work / "quality" / f"prompts-{hash_mapping(what)[:12]}.safetensors",
    )


def held_trajectories(settings: Settings, recipe: Recipe) -> CalibrationSet:
    """Of the prompts that choose the result of finetuning, which trains on the others."""
    total = recipe.calibration_prompts
    return calibration_trajectories(settings, recipe, total - recipe.validation_prompts, total)


def prediction_loss(pipeline: Pipeline, data: CalibrationSet, batch_size: int) -> float:
    """Mean squared error of the network's output relative to the mean square of what it should be."""
    error, power = [], []
    for step in range(data.timesteps.numel()):
        for prompt in torch.arange(data.num_prompts).split(batch_size):
            target, output = predicted(pipeline, data, prompt, step)
            error.append((output - target).double().square().sum())
            power.append(target.double().square().sum())
    return float(torch.stack(error).sum() / torch.stack(power).sum())


def measured_loss(bench: Bench, name: str, checkpoint: Path, held: Callable[[], CalibrationSet]) -> float:
    """`prediction_loss` of a checkpoint, measured unless it is known."""
    own = hash_mapping({"conditions": bench.key, "checkpoint": identity(checkpoint)})
    file = bench.folder / "rows" / f"{name}-{own[:12]}-loss.json"
    if not file.is_file():
        with load_pipeline(checkpoint) as pipeline:
            loss = prediction_loss(pipeline, held(), bench.settings.batch_size)
        write_json(file, {"loss": round(loss, 8)})
    return float(read_json(file)["loss"])

"""Both phases of finetuning, each resumable."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from quest_deploy.config import FinetuneConfig, PhaseConfig, ProgressEvent
from quest_deploy.errors import CalibrationError, ConfigError
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import train
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.losses import make_objective
from quest_deploy.quantize.parts import Progress
from quest_deploy.quantize.resume import Throttle, WorkDirectory
from quest_deploy.quantize.trace import Trace
from quest_deploy.quantize.walk import fit_steps

logger = logging.getLogger(__name__)


def train_phases(
    model: LoadedModel,
    student: nn.Module,
    trace: Trace,
    data: CalibrationSet,
    context: TimestepContext,
    config: FinetuneConfig,
    work: WorkDirectory,
    progress: Progress,
) -> dict[str, Any]:
    """Both phases. Returns the losses, for the manifest."""
    recipe = config.recipe
    split = data.num_prompts - recipe.validation_prompts
    training, validation = torch.arange(split), torch.arange(split, data.num_prompts)
    student.requires_grad_(False)
    steps = fit_steps(data, recipe.guidance_scale) if recipe.walk_share else None
    if steps is None and recipe.walk_share:
        logger.warning(
            "%s does not move latents by a multiple of the prediction: finetuning without walks",
            type(model.scheduler).__name__,
        )
    objective = make_objective(
        student,
        data,
        validation,
        steps,
        walk_length=recipe.walk_length,
        walk_share=recipe.walk_share,
        guidance_scale=recipe.guidance_scale,
    )
    task = train.Task(
        student=student,
        teacher=model.denoiser,
        trace=trace,
        data=data,
        training=training,
        validation=validation,
        objective=objective,
        context=context,
        seed=config.seed,
        num_train_timesteps=model.scheduler.config.num_train_timesteps,
    )
    history: dict[str, Any] = {}
    for name, phase in (("temporal", recipe.temporal), ("sensitive", recipe.sensitive)):
        if phase.steps:
            state = _train_phase(task, name, phase, work, progress)
            history[name] = {"validation_loss": state.losses, "best": state.best_loss}
    student.requires_grad_(False)
    if not train.quantizers_are_finite(student):
        raise CalibrationError("a learned scale is NaN, infinite or zero; lower the recipe's learning rates")
    return history


def _train_phase(
    task: train.Task, name: str, phase: PhaseConfig, work: WorkDirectory, progress: Progress
) -> train.TrainState:
    temporal = name == "temporal"
    groups = train.trainable(task.student, phase, task.trace.roles, temporal=temporal)
    if not groups:
        raise ConfigError(
            f"the {name} phase has steps but nothing to train; raise a learning rate, or set steps to 0"
        )
    optimizer = torch.optim.Adam(groups, lr=1.0)
    state = train.TrainState()
    saved = work.load(f"phase-{name}")
    if saved is not None:
        train.restore(state, optimizer, *saved)
    throttle = Throttle()

    def after_step(now: train.TrainState, loss: float) -> None:
        if throttle.due() or now.step == phase.steps:
            tensors, facts = train.snapshot(now, optimizer)
            work.save(f"phase-{name}", tensors, **facts)
        metrics = {"loss": loss, "validation_loss": now.losses[-1][1], "best": now.best_loss}
        progress(
            ProgressEvent(
                stage=f"finetune {name} layers", completed=now.step, total=phase.steps, metrics=metrics
            )
        )

    train.run_phase(task, phase, state, optimizer, temporal=temporal, after_step=after_step)
    return state

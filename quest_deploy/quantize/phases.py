"""Both phases of finetuning, each resumable."""

from __future__ import annotations

import dataclasses
import functools
import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from quest_deploy.config import FinetuneConfig, PhaseConfig, ProgressEvent, Recipe
from quest_deploy.errors import CalibrationError, ConfigError
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import train
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.losses import Objective, make_objective
from quest_deploy.quantize.memory import (
    PassMemory,
    cached_bytes,
    enable_checkpointing,
    kept_bytes,
    limit_slices,
    pass_memory,
    size_bytes,
    temporal_memory,
    weight_bytes,
)
from quest_deploy.quantize.parallel import ALONE, Workers
from quest_deploy.quantize.parts import Progress
from quest_deploy.quantize.recording import own_bytes, record_own
from quest_deploy.quantize.resume import Throttle, WorkDirectory
from quest_deploy.quantize.trace import Trace
from quest_deploy.quantize.walk import Steps, fit_steps

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What finetuning works on.

    Attributes:
        model: The full-precision model.
        student: A copy of its denoiser with quantized layers.
        trace: What feeds the layers that carry time.
        data: Recorded trajectories.
        context: The student's.
        config: Of the run.
        workers: The processes that share it.
    """

    model: LoadedModel
    student: nn.Module
    trace: Trace
    data: CalibrationSet
    context: TimestepContext
    config: FinetuneConfig
    workers: Workers = ALONE

    @property
    def recipe(self) -> Recipe:
        """Of the run."""
        return self.config.recipe


def train_phases(inputs: Inputs, work: WorkDirectory, progress: Progress) -> dict[str, Any]:
    """Both phases. Returns the losses, for the manifest."""
    student = inputs.student.requires_grad_(False)
    if inputs.recipe.gradient_checkpointing:
        enable_checkpointing(student, inputs.context)
    task = make_task(inputs)
    history: dict[str, Any] = {}
    for name, phase in phases(inputs.recipe):
        if name == "sensitive" and inputs.recipe.on_policy_prompts:
            task = _with_own(task, inputs, work, progress)
        state = _train_phase(task, name, phase, work, progress)
        history[name] = {"validation_loss": state.losses, "best": state.best_loss}
        if state.broken_at is not None:
            history[name]["not_finite_at"] = state.broken_at
    student.requires_grad_(False)
    if not train.quantizers_are_finite(student):
        raise CalibrationError(
            "a learned scale or table is NaN, infinite or zero; lower the recipe's learning rates"
        )
    return history


def phases(recipe: Recipe) -> list[tuple[str, PhaseConfig]]:
    """Those that have steps."""
    both = (("temporal", recipe.temporal), ("sensitive", recipe.sensitive))
    return [(name, phase) for name, phase in both if phase.steps]


def nothing_to_train(name: str) -> str:
    """What is told of a phase that would learn nothing."""
    return f"the {name} phase has steps but nothing to train; choose layers, raise a learning rate, or set steps to 0"


def make_task(inputs: Inputs) -> train.Task:
    """What both phases work on."""
    recipe, data = inputs.recipe, inputs.data
    split = data.num_prompts - recipe.validation_prompts
    training, validation = torch.arange(split), torch.arange(split, data.num_prompts)
    steps = fit_steps(data, recipe.guidance_scale) if recipe.walk_share else None
    if steps is None and recipe.walk_share:
        logger.warning(
            "%s does not move latents by a multiple of the prediction: finetuning without walks",
            type(inputs.model.scheduler).__name__,
        )
    elif steps is not None and not steps.starts(recipe.walk_length):
        logger.warning(
            "walk_length is %d, and trajectories have %d steps: finetuning without walks",
            *(recipe.walk_length, recipe.calibration_steps),
        )
    max_pairs = max_walks = None
    if recipe.memory_limit_gb is not None:
        max_pairs, max_walks = slices_within(inputs, recipe.memory_limit_gb, steps)
        logger.info("at most %d pairs or %d walks at once", max_pairs, max_walks)
    with train.autocast(data.device, recipe.precision):
        objective = make_objective(
            inputs.student,
            data,
            validation,
            steps,
            walk_length=recipe.walk_length,
            walk_share=recipe.walk_share,
            guidance_scale=recipe.guidance_scale,
            max_pairs=max_pairs,
            max_walks=max_walks,
            geometric=recipe.error_mean == "geometric",
        )
    return train.Task(
        student=inputs.student,
        teacher=inputs.model.denoiser,
        trace=inputs.trace,
        data=data,
        training=training,
        validation=validation,
        objective=objective,
        context=inputs.context,
        seed=inputs.config.seed,
        last_time=inputs.model.last_time,
        precision=recipe.precision,
        workers=inputs.workers,
    )


def _with_own(task: train.Task, inputs: Inputs, work: WorkDirectory, progress: Progress) -> train.Task:
    """`task`, and the trajectories that the student draws as it is now."""
    with task.workers.main_first():
        data = record_own(inputs.model, task.student, task.context, task.data, inputs.config, work, progress)
    return dataclasses.replace(task, data=data, own=torch.arange(task.data.num_prompts, data.num_prompts))


def phase_memory(
    inputs: Inputs, steps: Steps | None, name: str, phase: PhaseConfig
) -> tuple[int, PassMemory, PassMemory | None]:
    """What one phase holds all the time, in bytes, and what its passes over pairs and over walks take beside that."""
    model, student, data, recipe = inputs.model, inputs.student, inputs.data, inputs.recipe
    groups = train.trainable(student, phase, inputs.trace.roles, temporal=name == "temporal")
    learned = size_bytes(train.learned(groups))
    held = weight_bytes(model) + size_bytes([*student.parameters(), *student.buffers()])
    held += cached_bytes(student)
    if recipe.targets != "disk":
        held += kept_bytes(data, recipe.targets)
        held += own_bytes(data, recipe) if name == "sensitive" else 0
    bare = Objective(
        raw=torch.empty(0),
        walks=torch.empty(0),
        steps=steps,
        walk_length=recipe.walk_length,
        walk_share=recipe.walk_share,
        guidance_scale=recipe.guidance_scale,
    )
    # Where there is a limit, an update may be cut.
    measured = functools.partial(
        pass_memory, student, data, inputs.context, bare, passes=1 if recipe.memory_limit_gb is None else 2
    )
    pairs = measured(walks=False, most=phase.batch_size)
    walking = steps is not None and steps.starts(recipe.walk_length) > 0
    walks = measured(walks=True, most=phase.walks) if walking else None
    if name == "temporal" and inputs.trace.ends:
        count = train.TIMESTEPS_PER_LOCAL_BATCH
        # Beside a pass over pairs, whose update it is part of.
        held += temporal_memory(student, model.denoiser, inputs.trace, data, inputs.context, count)
    student.requires_grad_(False)
    # Adam's two moments and the best tensors so far; gradients are part of a pass.
    return held + 3 * learned, pairs, walks


def slices_within(inputs: Inputs, limit_gb: float, steps: Steps | None) -> tuple[int, int]:
    """How many pairs and how many walks can go through backpropagation at once, in every phase.

    Raises:
        ConfigError: in one of them, not even one.
    """
    found = [
        limit_slices(held, limit_gb, pairs, walks)
        for held, pairs, walks in (
            phase_memory(inputs, steps, name, phase) for name, phase in phases(inputs.recipe)
        )
    ]
    return min((pair for pair, _ in found), default=1), min((walk for _, walk in found), default=1)


def _train_phase(
    task: train.Task, name: str, phase: PhaseConfig, work: WorkDirectory, progress: Progress
) -> train.TrainState:
    temporal = name == "temporal"
    groups = train.trainable(task.student, phase, task.trace.roles, temporal=temporal)
    if not groups:
        raise ConfigError(nothing_to_train(name))
    optimizer = train.make_optimizer(groups)
    state = train.TrainState()
    with task.workers.main_first():
        saved = work.load(f"phase-{name}")
    if saved is not None:
        train.restore(state, optimizer, *saved)
    throttle = Throttle(work)

    def after_step(now: train.TrainState, loss: float) -> None:
        if task.workers.main and (throttle.due() or train.finished(phase, now)):
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

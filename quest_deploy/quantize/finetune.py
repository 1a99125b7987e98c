"""The `finetune` stage: full-precision model -> calibrated, finetuned, packed checkpoint (QuEST, arXiv 2402.03666).

Four parts, each resumable: record trajectories, find scales, round the weights, train two phases.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.artifacts import (
    MANIFEST_NAME,
    Artifact,
    check_output,
    hash_directory,
    hash_file,
    read_artifact,
    stage_of,
    write_artifact,
)
from quest_deploy.config import FinetuneConfig, PhaseConfig, ProgressEvent, Recipe, to_dict
from quest_deploy.errors import CalibrationError, ConfigError
from quest_deploy.model.families import Classes, Family, choose_prompts
from quest_deploy.model.load import LoadedModel, load_model
from quest_deploy.model.spec import classes_of, family_of
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize import calibrate, gptq, train
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.checkpoint import freeze, save_checkpoint
from quest_deploy.quantize.initialize import initialize_layer
from quest_deploy.quantize.insert import LayerQParams, insert, quantizable_layers
from quest_deploy.quantize.layers import Quantizable, TimestepContext
from quest_deploy.quantize.losses import make_objective
from quest_deploy.quantize.resume import WorkDirectory, flatten_qparams, machine, unflatten_qparams
from quest_deploy.quantize.select import layer_bits, select
from quest_deploy.quantize.trace import Trace
from quest_deploy.quantize.trace import trace as trace_model
from quest_deploy.quantize.walk import fit_steps

logger = logging.getLogger(__name__)

Progress = Callable[[ProgressEvent], None]
SAVE_EVERY_SECONDS = 15.0
BATCH_PROMPTS = 8
PROMPTS_PER_STEP = 8
POSITIONS_PER_STEP = 64
ROWS_PER_STEP = 256


def finetune(
    model: str | Path,
    output: Path,
    config: FinetuneConfig,
    *,
    progress: Progress | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Artifact:
    """Quantize and finetune `model`, and write a checkpoint to `output`.

    Args:
        model: diffusers directory, single .safetensors file, or hub id.
        output: Directory to make.
        config: Recipe, prompts and seed.
        progress: Told how far each part is.
        resume: Go on with the interrupted run of the same settings, if there is one.
        overwrite: Replace an existing checkpoint, throw away an interrupted run.

    Raises:
        QuestDeployError: with what to do next. A run that was interrupted goes on with `resume`.
    """
    work = WorkDirectory(Path(output))
    if Path(model).is_dir():
        config = with_prompts(config, family_of(Path(model)), classes_of(Path(model)))
    if resume and not overwrite and (finished := _finished(Path(model), Path(output), config)) is not None:
        work.remove()
        return finished
    check_output(output, stage="checkpoint", overwrite=overwrite)
    loaded = load_model(model)
    if not Path(model).is_dir():
        config = with_prompts(config, loaded.family, loaded.classes)
    source = hash_directory(loaded.path) if loaded.path.is_dir() else hash_file(loaded.path)
    # Before the minutes that come first: layers that stand for nothing are an error in the recipe.
    trace = trace_model(loaded)
    bits = layer_bits(trace.roles, config.recipe)
    for phase in (config.recipe.temporal, config.recipe.sensitive):
        select(trace.roles, phase.layers)
    run = {"config": to_dict(config), "source": source, "machine": machine()}
    work.open(run, resume=resume, overwrite=overwrite)
    with deterministic(config.seed):
        denoiser, context, history = _quantize(loaded, trace, config, work, progress or (lambda event: None))
    with write_artifact(
        output, stage="checkpoint", config=to_dict(config), inputs={"source": source}, overwrite=overwrite
    ) as writer:
        save_checkpoint(
            writer.path,
            loaded,
            denoiser,
            recipe=config.recipe,
            activation_bits={name: activation for name, (_, activation) in bits.items()},
            context=context,
            history=history,
        )
        writer.details.update(history)
    work.remove()
    return read_artifact(output, stage="checkpoint")


def with_prompts(config: FinetuneConfig, family: Family, classes: Classes | None) -> FinetuneConfig:
    """`config` with the prompts, classes or number of samples that it stands for with a model of that kind.

    Raises:
        ConfigError: prompts were given to a model that takes none, or a prompt is no class of the model.
    """
    default = load_prompts(default="calibration")
    count = config.recipe.calibration_prompts
    prompts = choose_prompts(family, classes, config.prompts, default=default, count=count)
    if classes is not None:
        for prompt in prompts:
            classes.number(prompt)
    return dataclasses.replace(config, prompts=prompts)


def _finished(model: Path, output: Path, config: FinetuneConfig) -> Artifact | None:
    """The checkpoint at `output`, if this very run was killed after its last write."""
    if not (output / MANIFEST_NAME).is_file() or not model.is_dir() or stage_of(output) != "checkpoint":
        return None
    artifact = read_artifact(output, stage="checkpoint")
    same_config = artifact.manifest.config == json.loads(json.dumps(to_dict(config)))
    return artifact if same_config and artifact.manifest.inputs["source"] == hash_directory(model) else None


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Deterministic algorithms while the body runs, so that a resumed run ends in the same weights."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def _quantize(
    model: LoadedModel, trace: Trace, config: FinetuneConfig, work: WorkDirectory, progress: Progress
) -> tuple[nn.Module, TimestepContext, dict[str, Any]]:
    recipe = config.recipe
    data = _record(model, config, work, progress)
    qparams = _scales(model, data, layer_bits(trace.roles, recipe), config, work, progress)
    rounded = _round(model, data, qparams, config, work, progress) if recipe.initializer == "gptq" else {}
    student = copy.deepcopy(model.denoiser)
    layers = quantizable_layers(student)
    with torch.no_grad():
        for name, weight in rounded.items():
            layers[name].weight.copy_(weight)
    context = TimestepContext(data.boundaries())
    insert(student, qparams, context)
    history = _train(model, student, trace, data, context, config, work, progress)
    freeze(student)
    return student, context, history


def _record(
    model: LoadedModel, config: FinetuneConfig, work: WorkDirectory, progress: Progress
) -> CalibrationSet:
    """The recorded trajectories, a few prompts at a time so that little is lost."""
    recipe, total = config.recipe, config.recipe.calibration_prompts
    parts = []
    for start in range(0, total, BATCH_PROMPTS):
        name = f"trajectories-{start:06d}"
        saved = work.load(name)
        if saved is None:
            part = calibrate.record_trajectories(
                model,
                config.prompts[start : min(start + BATCH_PROMPTS, total)],
                steps=recipe.calibration_steps,
                guidance_scale=recipe.guidance_scale,
                seed=config.seed + start,
                batch_size=BATCH_PROMPTS,
            )
            work.save(name, part.tensors())
        else:
            part = calibrate.from_tensors(saved[0])
        parts.append(part)
        progress(
            ProgressEvent(
                stage="record trajectories", completed=min(start + BATCH_PROMPTS, total), total=total
            )
        )
    return calibrate.join(parts)


def _scales(
    model: LoadedModel,
    data: CalibrationSet,
    bits: Mapping[str, tuple[int, int]],
    config: FinetuneConfig,
    work: WorkDirectory,
    progress: Progress,
) -> dict[str, LayerQParams]:
    recipe = config.recipe
    saved = work.load("inputs")
    if saved is None:
        inputs = calibrate.collect_inputs(
            model.denoiser,
            data,
            prompts_per_step=PROMPTS_PER_STEP,
            positions=POSITIONS_PER_STEP,
            seed=config.seed,
            report=_reporter(progress, "collect activations"),
        )
        work.save("inputs", inputs)
    else:
        inputs = saved[0]
    saved = work.load("scales")
    qparams = {} if saved is None else unflatten_qparams(*saved)
    throttle = Throttle()
    layers = quantizable_layers(model.denoiser)
    for done, name in enumerate(inputs, start=1):
        if name not in qparams:
            qparams[name] = initialize_one(layers[name], inputs[name], bits[name], recipe)
            if throttle.due() or done == len(inputs):
                tensors, facts = flatten_qparams(qparams)
                work.save("scales", tensors, **facts)
        progress(ProgressEvent(stage="search scales", completed=done, total=len(inputs)))
    return qparams


def initialize_one(layer: Quantizable, inputs: Tensor, bits: tuple[int, int], recipe: Recipe) -> LayerQParams:
    """Starting scales of one layer as the recipe wants them; `inputs` as `collect_inputs` gives them."""
    return initialize_layer(
        layer,
        inputs,
        *bits,
        method="search",
        time_aware=recipe.time_aware,
        channel_wise=recipe.channel_wise,
    )


def _round(
    model: LoadedModel,
    data: CalibrationSet,
    qparams: dict[str, LayerQParams],
    config: FinetuneConfig,
    work: WorkDirectory,
    progress: Progress,
) -> dict[str, Tensor]:
    """Weights rounded with error compensation, as many layers at a time as their Hessians leave memory for."""
    rounded: dict[str, Tensor] = {}
    for index, names in enumerate(gptq.chunks(model.denoiser, list(qparams))):
        key = f"rounded-{index:04d}"
        saved = work.load(key)
        if saved is None:
            part = gptq.compensate(
                model.denoiser,
                data,
                qparams,
                names,
                prompts_per_step=PROMPTS_PER_STEP,
                rows_per_step=ROWS_PER_STEP,
                seed=config.seed,
                report=_reporter(progress, "round weights"),
            )
            work.save(key, part)
        else:
            part = saved[0]
        rounded.update(part)
    left = sorted(qparams.keys() - rounded.keys())
    if left:
        logger.info(
            "%d layers are too wide or grouped and are rounded to nearest, e.g. %s", len(left), left[0]
        )
    return rounded


def _train(
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


class Throttle:
    """Says when the next save is due, so that saving costs little and an interruption loses little."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self.last < SAVE_EVERY_SECONDS:
            return False
        self.last = time.monotonic()
        return True


def _reporter(progress: Progress, stage: str) -> Callable[[int, int], None]:
    return lambda completed, total: progress(ProgressEvent(stage=stage, completed=completed, total=total))

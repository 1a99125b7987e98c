"""The `finetune` stage: full-precision model -> calibrated, finetuned, packed checkpoint (QuEST, arXiv 2402.03666).

Four parts, each resumable: record trajectories, find scales, round the weights, train two phases.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

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
from quest_deploy.config import FinetuneConfig, to_dict
from quest_deploy.model.families import Classes, Family, choose_prompts
from quest_deploy.model.load import LoadedModel, load_model
from quest_deploy.model.spec import classes_of, family_of
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize.attention import insert_attention
from quest_deploy.quantize.checkpoint import freeze, save_checkpoint
from quest_deploy.quantize.insert import insert, quantizable_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.operands import find_operands
from quest_deploy.quantize.parts import Progress, find_scales, record, reporter, round_weights
from quest_deploy.quantize.phases import train_phases
from quest_deploy.quantize.resume import WorkDirectory, machine
from quest_deploy.quantize.select import layer_bits, select
from quest_deploy.quantize.split import find_concatenations, split_layers
from quest_deploy.quantize.trace import Trace
from quest_deploy.quantize.trace import trace as trace_model


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
    if config.recipe.split:
        split_layers(loaded.denoiser, find_concatenations(loaded.denoiser, loaded.denoiser_spec))
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
    data = record(model, config, work, progress)
    qparams = find_scales(model, data, layer_bits(trace.roles, recipe), config, work, progress)
    report = reporter(progress, "collect attention operands")
    operands = find_operands(model.denoiser, data, recipe, work, seed=config.seed, report=report)
    rounded, history = round_weights(model, data, qparams, config, work, progress)
    student = copy.deepcopy(model.denoiser)
    layers = quantizable_layers(student)
    with torch.no_grad():
        for name, weight in rounded.items():
            layers[name].weight.copy_(weight)
    context = TimestepContext(data.boundaries())
    insert(student, qparams, context)
    insert_attention(student, operands, context)
    history |= train_phases(model, student, trace, data, context, config, work, progress)
    freeze(student)
    return student, context, history

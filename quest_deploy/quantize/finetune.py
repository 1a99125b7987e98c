"""The `finetune` stage: full-precision model -> calibrated, finetuned, packed checkpoint (QuEST, arXiv 2402.03666).

Four parts, each resumable: record trajectories, find scales, round the weights, train two phases.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
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
from quest_deploy.config import FinetuneConfig, ProgressEvent, to_dict
from quest_deploy.errors import ArtifactError
from quest_deploy.model.families import Classes, Family, choose_prompts
from quest_deploy.model.load import LoadedModel, load_model
from quest_deploy.model.lora import merge_loras
from quest_deploy.model.products import Products, float32_products
from quest_deploy.model.spec import classes_of, family_of
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize.attention import insert_attention
from quest_deploy.quantize.auto_layers import asked, choose_layers
from quest_deploy.quantize.checkpoint import freeze, save_checkpoint
from quest_deploy.quantize.collapse import collapse_groups
from quest_deploy.quantize.fit import check_fit
from quest_deploy.quantize.insert import share_quantizers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.memory import (
    cached_bytes,
    forward_memory,
    held_bytes,
    limit_count,
    prompts_at_once,
    size_bytes,
)
from quest_deploy.quantize.operands import PROMPTS_PER_STEP, find_operands
from quest_deploy.quantize.parallel import Workers, device_of, find_workers, place
from quest_deploy.quantize.parts import Progress, find_scales, reporter, round_weights
from quest_deploy.quantize.phases import Inputs, train_phases
from quest_deploy.quantize.recording import record
from quest_deploy.quantize.resume import WorkDirectory, machine
from quest_deploy.quantize.schedule import recording_config
from quest_deploy.quantize.select import layer_bits
from quest_deploy.quantize.sensitivity import BATCH_PAIRS
from quest_deploy.quantize.static import quantize_companions
from quest_deploy.quantize.structure import restructure
from quest_deploy.quantize.student import check_limit, make_student
from quest_deploy.quantize.tables import insert_tables, make_context
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
    output = Path(output)
    work = WorkDirectory(output)
    workers = find_workers(config.device)
    # The other processes of a run only read.
    with work.lock() if workers.main else nullcontext():
        again, is_directory = resume and not overwrite, Path(model).is_dir()
        if is_directory:
            config = with_prompts(config, family_of(Path(model)), classes_of(Path(model)))
            if again and (finished := _finished(output, config, work, Path(model))) is not None:
                work.remove()
                return finished
        # Of other models what they draw, and where they lie, is known when they are loaded.
        if is_directory or not again:
            check_output(output, stage="checkpoint", overwrite=overwrite)
        loaded, trace, config = prepare(model, config)
        bits = layer_bits(trace.roles, config.recipe)
        inputs = inputs_of(loaded, config)
        if again and not is_directory:
            if (finished := _finished(output, config, work, loaded.path)) is not None:
                work.remove()
                return finished
            check_output(output, stage="checkpoint", overwrite=overwrite)
        with workers.main_first():
            if workers.main:
                if not (resume and work.started):
                    check_limit(loaded, trace, config)
                run = {"config": to_dict(config), **inputs, "machine": machine(workers.count)}
                work.open(run, resume=resume, overwrite=overwrite)
        place(loaded, device_of(config.device, workers))
        told = progress if progress is not None and workers.main else _tell_nobody
        products: Products = "tf32" if config.recipe.precision == "tf32" else "ieee"
        with deterministic(config.seed), float32_products(products):
            denoiser, context, history = _quantize(loaded, trace, config, work, told, workers)
        with workers.main_first():
            if workers.main:
                with deterministic(config.seed), float32_products(products):
                    companions = quantize_companions(loaded, config)
                with write_artifact(
                    output,
                    stage="checkpoint",
                    config=to_dict(config),
                    inputs=inputs,
                    sources={"source": (loaded.path, hash_directory)},
                    overwrite=overwrite,
                ) as writer:
                    save_checkpoint(
                        writer.path,
                        loaded,
                        denoiser,
                        recipe=config.recipe,
                        activation_bits={name: activation for name, (_, activation) in bits.items()},
                        context=context,
                        history=history,
                        companions=companions,
                    )
                    writer.details.update(history)
                work.remove()
        return read_artifact(output, stage="checkpoint")


def prepare(model: str | Path, config: FinetuneConfig) -> tuple[LoadedModel, Trace, FinetuneConfig]:
    """The model in memory, what feeds its layers, and `config` as it stands for this model.

    Raises:
        QuestDeployError: the model cannot be loaded, or the recipe does not fit it.
    """
    if (Path(model) / MANIFEST_NAME).is_file() and (stage := stage_of(Path(model))) != "model":
        raise ArtifactError(
            f"'{model}' is of stage '{stage}', expected a full-precision model; give the one that it was made from"
        )
    loaded = load_model(model)
    if not Path(model).is_dir():
        config = with_prompts(config, loaded.family, loaded.classes)
    loaded = dataclasses.replace(loaded, changed=merge_loras(loaded, config.loras))
    restructure(loaded, config.recipe)
    trace = trace_model(loaded)
    check_fit(loaded, trace, config.recipe)
    recording_config(loaded, config.recipe.calibration_steps, tell=True)
    return loaded, trace, config


def inputs_of(model: LoadedModel, config: FinetuneConfig) -> dict[str, str]:
    """Content hashes of everything that a checkpoint is made from, for its manifest."""
    return _digests(model.path, config)


def _digests(path: Path, config: FinetuneConfig) -> dict[str, str]:
    inputs = {"source": hash_directory(path) if path.is_dir() else hash_file(path)}
    return inputs | {f"lora-{index}": hash_file(lora.path) for index, lora in enumerate(config.loras)}


def _tell_nobody(event: ProgressEvent) -> None:
    pass


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


def _finished(output: Path, config: FinetuneConfig, work: WorkDirectory, model: Path) -> Artifact | None:
    """The checkpoint at `output`, if this very run, of what lies at `model`, was killed after its last write."""
    if not (output / MANIFEST_NAME).is_file() or stage_of(output) != "checkpoint":
        return None
    # One that --overwrite was to replace is no result of the run that was to replace it.
    if work.started_after(output / MANIFEST_NAME):
        return None
    artifact = read_artifact(output, stage="checkpoint")
    same_config = artifact.manifest.config == json.loads(json.dumps(to_dict(config)))
    return artifact if same_config and artifact.manifest.inputs == _digests(model, config) else None


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Deterministic algorithms while the body runs, so that a resumed run ends in the same weights."""
    before = torch.are_deterministic_algorithms_enabled()
    # Not every operation has a deterministic form on a GPU.
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_initialized())
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield
    finally:
        torch.use_deterministic_algorithms(before)


def _quantize(
    model: LoadedModel,
    trace: Trace,
    config: FinetuneConfig,
    work: WorkDirectory,
    progress: Progress,
    workers: Workers,
) -> tuple[nn.Module, TimestepContext, dict[str, Any]]:
    recipe = config.recipe
    bits = layer_bits(trace.roles, recipe)
    # The others find every part finished, and only read it.
    with workers.main_first():
        data = record(model, config, work, progress)
        qparams = find_scales(model, data, bits, config, work, progress, trace=trace)
        report = reporter(progress, "collect attention operands")
        operands = find_operands(
            model.denoiser,
            data,
            recipe,
            work,
            seed=config.seed,
            report=report,
            at_once=prompts_at_once(model, data, recipe, PROMPTS_PER_STEP),
        )
        rounded, history = round_weights(model, data, qparams, config, work, progress)
        pairs = BATCH_PAIRS
        if asked(recipe):
            pairs = prompts_at_once(model, data, recipe, pairs, size_bytes(rounded))
        config, chosen = choose_layers(
            model.denoiser, trace.roles, data, qparams, rounded, config, work, progress, pairs
        )
    history |= chosen
    history["scheduler"] = str(recording_config(model, recipe.calibration_steps)["_class_name"])
    context = make_context(data.boundaries(), data.timesteps, recipe)
    student = make_student(model, qparams, rounded, context)
    trace = insert_tables(student, model.denoiser, trace, context, data.device)
    insert_attention(student, operands, context)
    share_quantizers(student, trace.siblings if recipe.shared_inputs else ())
    student.to(data.device)
    inputs = Inputs(
        model=model,
        student=student,
        trace=trace,
        data=data,
        context=context,
        config=config,
        workers=workers,
    )
    history |= train_phases(inputs, work, progress)
    history |= _collapse(inputs, progress)
    freeze(student.to("cpu"))
    return student, context, history


def _collapse(inputs: Inputs, progress: Progress) -> dict[str, Any]:
    """One scale for quantizers that hardly need several, where the recipe asks for it; what came of it."""
    recipe, data = inputs.recipe, inputs.data
    if not recipe.collapse_loss_db:
        return {}
    student = inputs.student
    held = held_bytes(inputs.model, data, recipe) + size_bytes([*student.parameters(), *student.buffers()])
    held += cached_bytes(student)
    forward = forward_memory(student, data, inputs.context)
    found = collapse_groups(
        student,
        inputs.model.denoiser,
        data,
        torch.arange(data.num_prompts - recipe.validation_prompts, data.num_prompts),
        limit_db=recipe.collapse_loss_db,
        progress=reporter(progress, "collapse timestep groups"),
        at_once=limit_count(BATCH_PAIRS, held, recipe.memory_limit_gb, forward),
    )
    return {"collapse": found.describe()}

"""The `analyze` stage: a full-precision model, and if there is one its checkpoint, to an analysis.

``analysis.json`` holds, lists over timesteps following ``timesteps``:

=================  =================================================================================================
``schema_version``  2
``config``          the analysis' configuration
``model``           ``path``, ``digest``, ``loras`` merged into it; ``checkpoint`` ``path``, ``digest``, or null
``timesteps``       of the recorded trajectories, as the scheduler visits them
``run_order``       names of the layers as they run
``activations``     ``before`` and ``after`` (null without a checkpoint): by layer what
                    :meth:`~quest_deploy.analyze.activations.Activations.summary` says
``histograms``      ``before``, ``after``: of the worst layers at ``steps``
``temporal``        ``embedding`` (layer or null), ``start`` and ``checkpoint``: ``layers``, ``confusion``
``sensitivity``     ``bits``, ``timesteps`` and ``layers[]``: ``name role outlet weights macs damage{bits}``
``network``         damage of the whole network quantized: ``start``, ``checkpoint``, and ``predicted_snr_db``
=================  =================================================================================================

"Start" is the recipe's quantization before finetuning, weights rounded to nearest.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quest_deploy.analyze.config import AnalyzeConfig, recipe_of
from quest_deploy.analyze.measure import Progress, measure, reporter
from quest_deploy.analyze.page import write_page
from quest_deploy.artifacts import (
    MANIFEST_NAME,
    Artifact,
    check_output,
    hash_directory,
    hash_file,
    read_artifact,
    read_json,
    read_manifest,
    stage_of,
    write_artifact,
    write_json,
)
from quest_deploy.config import LoraConfig, Recipe, to_dict
from quest_deploy.errors import ArtifactError, ConfigError, StaleArtifactError
from quest_deploy.model.families import Classes, Family, choose_prompts
from quest_deploy.model.load import load_model
from quest_deploy.model.lora import merge_loras
from quest_deploy.model.merged import find_files, merged_loras
from quest_deploy.model.spec import classes_of, family_of
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize import calibrate
from quest_deploy.quantize.checkpoint import load_checkpoint
from quest_deploy.quantize.recording import BATCH_PROMPTS
from quest_deploy.quantize.resume import WorkDirectory, machine
from quest_deploy.quantize.structure import rebuild, restructure, structure
from quest_deploy.quantize.trace import trace

# Version 1 knew no outlets of layers that carry time, and found their scales otherwise.
SCHEMA_VERSION = 2
# Fields of a recipe that decide what finetuning starts from.
STARTS_FROM = (
    "weight_bits",
    "activation_bits",
    "overrides",
    "time_aware",
    "channel_wise",
    "migration_exponent",
    "split",
    "rotation",
    "shared_inputs",
    "temporal_path",
    "attention_bits",
    "softmax_bits",
    "softmax_max_keys",
)
DOCUMENT, PAGE = "analysis.json", "analysis.html"


def analyze(
    model: str | Path,
    output: Path,
    config: AnalyzeConfig,
    *,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Artifact:
    """Measure what low bits do to `model`, layer by layer, and write an analysis to `output`.

    Args:
        model: Full precision: diffusers directory, single .safetensors file, or hub id.
        output: Directory to make.
        config: Recipe, prompts and how much is measured.
        checkpoint: What `finetune` made of the model, to be compared with it; its LoRAs are merged into the model.
        progress: Told how far each part is.
        resume: Go on with the interrupted analysis of the same settings, if there is one.
        overwrite: Replace an existing analysis, throw away an interrupted one.

    Raises:
        QuestDeployError: with what to do next.
    """
    work = WorkDirectory(Path(output), "analyze")
    report = progress or (lambda event: None)
    with work.lock():
        inputs, again = _inputs(model, checkpoint), resume and not overwrite
        _check_recipe(config.recipe, checkpoint)
        is_directory = Path(model).is_dir()
        if is_directory:
            config = with_prompts(config, family_of(Path(model)), classes_of(Path(model)))
            if again and (finished := _finished(output, config, inputs, work)) is not None:
                work.remove()
                return finished
        # Of other models what they draw, and where they lie, is known when they are loaded.
        if is_directory or not again:
            check_output(output, stage="analysis", overwrite=overwrite)
        loras = _loras(checkpoint)
        loaded = load_model(model)
        merge_loras(loaded, loras)
        if not is_directory:
            config = with_prompts(config, loaded.family, loaded.classes)
            inputs.setdefault("source", _digest(loaded.path))
            if again and (finished := _finished(output, config, inputs, work)) is not None:
                work.remove()
                return finished
            check_output(output, stage="analysis", overwrite=overwrite)
        quantized = None if checkpoint is None else load_checkpoint(checkpoint).denoiser
        # As the checkpoint is, so that both have the same layers.
        if quantized is not None:
            rebuild(loaded.denoiser, structure(quantized))
        else:
            restructure(loaded, config.recipe)
        work.open(
            {"schema": SCHEMA_VERSION, "config": to_dict(config), "inputs": inputs, "machine": machine()},
            resume=resume,
            overwrite=overwrite,
        )
        data = calibrate.record_trajectories(
            loaded,
            config.prompts,
            steps=config.steps,
            guidance_scale=config.recipe.guidance_scale,
            seed=config.seed,
            batch_size=BATCH_PROMPTS,
            report=reporter(report, "record trajectories"),
        )
        traced = trace(loaded)
        document = {
            "schema_version": SCHEMA_VERSION,
            "config": to_dict(config),
            "model": {
                "path": str(model),
                "digest": inputs["source"],
                "loras": [to_dict(lora) for lora in loras],
            },
            "checkpoint": None
            if checkpoint is None
            else {"path": str(checkpoint), "digest": inputs["checkpoint"]},
            **measure(loaded, traced, quantized, data, config, work, report),
        }
        with write_artifact(
            output, stage="analysis", config=to_dict(config), inputs=inputs, overwrite=overwrite
        ) as writer:
            write_json(writer.path / DOCUMENT, document)
            write_page(writer.path / PAGE, document)
            writer.details.update(
                layers=len(document["run_order"]), network=_without_steps(document["network"])
            )
        work.remove()
        return read_artifact(output, stage="analysis")


def with_prompts(config: AnalyzeConfig, family: Family, classes: Classes | None) -> AnalyzeConfig:
    """`config` with the prompts, classes or number of samples that it stands for with a model of that kind.

    Raises:
        ConfigError: prompts were given to a model that takes none, or a prompt is no class of the model.
    """
    count = config.num_prompts
    default = load_prompts(default="calibration")
    prompts = choose_prompts(family, classes, config.prompts, default=default, count=count)[:count]
    if classes is not None:
        for prompt in prompts:
            classes.number(prompt)
    return dataclasses.replace(config, prompts=prompts)


def _inputs(model: str | Path, checkpoint: Path | None) -> dict[str, str]:
    """Digests of what is read; the model's only where it lies on this disk.

    Raises:
        ArtifactError: one is not what it is taken for.
        StaleArtifactError: the checkpoint was made from another model.
    """
    inputs: dict[str, str] = {}
    path = Path(model)
    if path.exists():
        stage = stage_of(path)
        if stage == "checkpoint":
            raise ArtifactError(
                f"'{path}' is a checkpoint, expected the full-precision model that it was made from; "
                "give that model, and this as --checkpoint"
            )
        if stage != "model":
            raise ArtifactError(
                f"'{path}' is an artifact of stage '{stage}', which has no layers to analyze; "
                "give the full-precision model, and its checkpoint as --checkpoint"
            )
        inputs["source"] = _digest(path)
    if checkpoint is not None:
        artifact = read_artifact(checkpoint, stage="checkpoint")
        if inputs.get("source") not in (None, artifact.manifest.inputs["source"]):
            raise StaleArtifactError(
                f"checkpoint '{checkpoint}' was not made from '{path}' (its manifest names another source); "
                "give the model that it was made from, or finetune this one"
            )
        inputs["checkpoint"] = artifact.digest
    return inputs


def _loras(checkpoint: Path | None) -> tuple[LoraConfig, ...]:
    """What was merged into the model that a checkpoint was made from.

    Raises:
        StaleArtifactError: it cannot be merged again.
    """
    merged = None if checkpoint is None else merged_loras(read_manifest(checkpoint))
    return () if checkpoint is None or merged is None else find_files(merged, checkpoint)


def _check_recipe(recipe: Recipe, checkpoint: Path | None) -> None:
    """Refuse to compare a checkpoint with the start of another recipe.

    Raises:
        ConfigError: its layers are quantized otherwise.
    """
    if checkpoint is None:
        return
    made_with = recipe_of(checkpoint)
    other = [name for name in STARTS_FROM if getattr(made_with, name) != getattr(recipe, name)]
    if other:
        raise ConfigError(
            f"recipe {recipe.name} is not that of '{checkpoint}', {made_with.name} ({', '.join(other)} differ): before "
            "and after would be of two; leave --recipe out"
        )


def _digest(path: Path) -> str:
    return hash_directory(path) if path.is_dir() else hash_file(path)


def _finished(
    output: Path, config: AnalyzeConfig, inputs: Mapping[str, str], work: WorkDirectory
) -> Artifact | None:
    """The analysis at `output`, if it is of these settings and inputs."""
    if not (output / MANIFEST_NAME).is_file() or stage_of(output) != "analysis":
        return None
    # One that --overwrite was to replace is no result of the run that was to replace it.
    if work.started_after(output / MANIFEST_NAME):
        return None
    artifact = read_artifact(output, stage="analysis")
    same = artifact.manifest.config == json.loads(json.dumps(to_dict(config)))
    same = same and artifact.manifest.inputs == dict(inputs)
    # Of another version, it would be another analysis.
    return artifact if same and read_json(output / DOCUMENT).get("schema_version") == SCHEMA_VERSION else None


def _without_steps(network: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value["step_snr_db"] if isinstance(value, dict) else value for name, value in network.items()
    }

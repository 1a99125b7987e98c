"""Stages of quest-deploy as measured processes, each run only where its result is not there yet."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.environment import machine
from benchmarks.settings import MODEL, ROOT, Settings, write_recipe
from quest_deploy.artifacts import hash_directory, read_json, write_json
from quest_deploy.config import FinetuneConfig, Recipe, to_dict
from quest_deploy.files import hash_file, hash_mapping
from quest_deploy.manifest import MANIFEST_NAME, read_manifest, tool_versions
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize.recipe import PACKAGED, recipe_from_dict
from scripts import demo

PACKAGE = ("quest_deploy", "export", "engines")
# Code that runs OpenVINO lies here, alone or with other engines.
OPENVINO = {"engines", "engines/openvino_runtime.py"}
# What the numbers of a quantized denoiser depend on.
QUANTIZER = (
    "quest_deploy/quantize",
    "quest_deploy/model",
    "quest_deploy/data/prompts",
    "quest_deploy/sampling.py",
)
SOURCE_SUFFIXES = (".py", ".yaml", ".j2", ".txt")
FINISHED = (0, demo.OVER_BUDGET)


def sources_digest(paths: Sequence[str], root: Path = ROOT) -> str:
    """sha256 over the names and contents of the source files below `paths`."""
    digest = hashlib.sha256()
    for start in paths:
        below = root / start
        for file in [below] if below.is_file() else sorted(below.rglob("*")):
            if file.suffix in SOURCE_SUFFIXES and file.is_file():
                digest.update(f"{file.relative_to(root)}\0{hash_file(file)}\0".encode())
    return digest.hexdigest()


def made_by(sources: Sequence[str]) -> dict[str, Any]:
    """What a cached result depends on besides its inputs: the code below `sources`, and the libraries' versions."""
    tools = tool_versions()
    if not OPENVINO & {*sources}:
        # Torch makes the same without it.
        tools.pop("openvino", None)
    return {"code": sources_digest(sources), "tools": tools}


def identity(path: Path) -> str:
    """What an artifact's manifest, or a model's files, hash to."""
    manifest = path / MANIFEST_NAME
    return hash_file(manifest) if manifest.is_file() else hash_directory(path)


def make(
    settings: Settings,
    name: str,
    arguments: Sequence[str],
    output: Path,
    *,
    inputs: Sequence[Path],
    sources: Sequence[str] = PACKAGE,
    settings_read: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Any]:
    """Run one stage, or look up what it took.

    Args:
        settings: Of the benchmark.
        name: Unique; the record is kept under it.
        arguments: Of `quest-deploy`, the verb first, without the output.
        output: The artifact.
        inputs: Artifacts that are read: the stage is run again when one of them changed.
        sources: Code that the result depends on.
        settings_read: What the files say that `arguments` name.

    Returns:
        The fields of :class:`scripts.demo.Outcome`; `resumed`: whether an interrupted run was finished, whose time is
        then not all there; and `cores` and `threads` (OMP_NUM_THREADS) that it ran with, as :func:`machine` tells them:
        the result of an earlier run is taken whatever those were, and its time is not one of now.
    """
    record = settings.work / "stages" / f"{name}.json"
    begun = record.with_suffix(".begun")
    maker = made_by(sources)
    key = hash_mapping(
        {
            "arguments": list(arguments),
            "inputs": [identity(path) for path in inputs],
            "settings": dict(settings_read),
            **maker,
        }
    )
    if record.is_file() and (output / MANIFEST_NAME).is_file():
        known: dict[str, Any] = read_json(record)
        if known["key"] == key and known["output"] == identity(output):
            return known["outcome"]
    unfinished = output.parent / f".{output.name}.finetune"
    here = machine()
    ran_with = {"cores": here["cores"], "threads": here["omp_num_threads"]}
    start = hash_mapping({"key": key, **ran_with})
    if unfinished.is_dir() and (not begun.is_file() or begun.read_text(encoding="utf-8") != start):
        # Of other code, settings or threads: nothing of it may be gone on with.
        shutil.rmtree(unfinished)
    resumed = unfinished.is_dir()
    if arguments[0] == "build-engine" and output.is_dir():
        # Engines that are up to date would be kept, in no time.
        shutil.rmtree(output)
    for folder in (output.parent, record.parent):
        folder.mkdir(parents=True, exist_ok=True)
    begun.write_text(start, encoding="utf-8")
    print(f"\n{name}", flush=True)
    stage = demo.Stage(name=name, arguments=(*arguments, "-o", str(output)), output=output)
    outcome = {**asdict(run(stage)), "resumed": resumed, **ran_with}
    if outcome["exit_code"] == demo.INTERRUPTED:
        raise KeyboardInterrupt
    if outcome["exit_code"] in FINISHED:
        written = {"key": key, "sources": maker["code"], "output": identity(output), "outcome": outcome}
        write_json(record, written)
    return outcome


def run(stage: demo.Stage) -> demo.Outcome:
    """Run a stage in a process of its own."""
    # Linux counts the pages of a process against its child until the child has started its program.
    assert "torch" not in sys.modules, "a stage is measured from a process that holds torch"
    return demo.run(stage)


def required(outcome: dict[str, Any]) -> dict[str, Any]:
    """`outcome`, of a stage without which nothing can go on.

    Raises:
        SystemExit: it failed.
    """
    if outcome["exit_code"] not in FINISHED:
        raise SystemExit(f"benchmarks: failed with code {outcome['exit_code']}: {outcome['command']}")
    return outcome


def finetune(settings: Settings, recipe: Recipe, output: Path, *, model: Path = MODEL) -> dict[str, Any]:
    """A checkpoint of the packaged calibration prompts (or the classes, or seeds), made as a user makes it."""
    packaged = recipe.name in PACKAGED and not settings.quick
    source = recipe.name if packaged else str(write_recipe(recipe, settings.work / "recipes"))
    arguments = ("finetune", str(model), "--recipe", source, "--seed", str(settings.seed))
    name = f"finetune {recipe.name}" if model == MODEL else f"finetune {model.name} {recipe.name}"
    read = {"recipe": to_dict(recipe)}
    made = make(settings, name, arguments, output, inputs=(model,), sources=QUANTIZER, settings_read=read)
    return required(made)


def finetuned(settings: Settings, name: str) -> tuple[Path, dict[str, Any]]:
    """The checkpoint of a packaged recipe, and what making it took.

    It is made by this code, unless `--checkpoints` gives one that is there: that is used as it is. Its seconds and
    memory are None where it was made otherwise than by a benchmark here, and `made_by` in the outcome says whether this
    code made it.

    Raises:
        SystemExit: it was made with other settings than the recipe has now.
    """
    path, recipe = settings.checkpoint(name), settings.recipe(name)
    if settings.checkpoints is None or not (path / MANIFEST_NAME).is_file():
        return path, {**finetune(settings, recipe, path), "made_by": "this code"}
    config = FinetuneConfig(recipe=recipe, prompts=load_prompts(default="calibration"), seed=settings.seed)
    if not made_with(config, read_manifest(path).config):
        raise SystemExit(
            f"benchmarks: {path} was made with other settings than recipe {name} has now; "
            "remove it, or give another directory with --checkpoints"
        )
    record = settings.work / "stages" / f"finetune {name}.json"
    if record.is_file():
        known = read_json(record)
        if known["output"] == identity(path):
            same = known["sources"] == sources_digest(QUANTIZER)
            return path, {**known["outcome"], "made_by": "this code" if same else "other code"}
    unknown = {"stage": f"finetune {name}", "command": "", "exit_code": 0, "resumed": False}
    return path, {**unknown, "seconds": None, "peak_memory_bytes": None, "made_by": "unknown"}


def made_with(config: FinetuneConfig, recorded: Mapping[str, Any]) -> bool:
    """Whether a manifest's configuration is `config`; a setting that did not exist then has its default."""
    known = dict(recorded)
    recipe = recipe_from_dict(known.pop("recipe"))
    now = to_dict(config)
    defaults = to_dict(FinetuneConfig(recipe=recipe))
    same = {key: json.loads(json.dumps(known.get(key, defaults[key]))) for key in now if key != "recipe"}
    return recipe == config.recipe and same == {key: json.loads(json.dumps(now[key])) for key in same}


def export(settings: Settings, name: str, source: Path, target: str) -> tuple[Path, dict[str, Any]]:
    """ONNX of a checkpoint or model; `name` is the recipe, or fp32."""
    output = settings.work / "onnx" / target / name
    arguments = ("export", str(source), "--target", target)
    made = make(settings, f"export {name} for {target}", arguments, output, inputs=(source,))
    return output, required(made)


def build(settings: Settings, name: str, onnx: Path) -> tuple[Path, dict[str, Any]]:
    """TensorRT for RTX engines. The outcome may be a failure: whether they build is what is asked."""
    output = settings.work / "engines" / name
    arguments = ("build-engine", str(onnx), "--backend", "tensorrt-rtx")
    return output, make(settings, f"build {name} engines", arguments, output, inputs=(onnx,))


def parity(
    settings: Settings, name: str, checkpoint: Path, onnx: Path, *, model: Path = MODEL
) -> tuple[Path, dict[str, Any]]:
    """The comparison of the model, its checkpoint and that one's ONNX on the held-out prompts."""
    output = settings.work / "parity" / name
    arguments = ("parity", str(model), str(onnx), "--via", str(checkpoint))
    arguments += _sampling(settings, settings.noise_seeds[0])
    arguments += ("--num-prompts", str(len(settings.prompts)), "--batch-size", str(settings.batch_size))
    made = make(settings, f"parity {name}", arguments, output, inputs=(model, checkpoint, onnx))
    return output, required(made)


def generate(settings: Settings, name: str, onnx: Path) -> tuple[Path, dict[str, Any]]:
    """The eight images of the demo, drawn by ONNX Runtime."""
    output = settings.work / "images" / name
    arguments = ("generate", str(onnx), *demo.PROMPTS, "--backend", "onnxruntime")
    arguments += _sampling(settings, settings.seed)
    return output, required(make(settings, f"generate {name}", arguments, output, inputs=(onnx,)))


def _sampling(settings: Settings, seed: int) -> tuple[str, ...]:
    steps, scale = str(settings.denoising_steps), str(settings.guidance_scale)
    return ("--steps", steps, "--guidance-scale", scale, "--seed", str(seed))

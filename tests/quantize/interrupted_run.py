"""Finetunes a model twice: once in peace, once killed at the given moments and resumed each time. Not a test itself.

Arguments: what is run (of `RECIPES`), model, an empty folder, and moments ``part:count:how``, in the order in which a
run passes them. The process is killed when it saves its state for the `count`-th time under a name that starts with
`part`: `after` that is done, or `during` it, when half of the file is written. ``inputs$`` is that name alone;
``output`` is the checkpoint itself.
Writes one JSON object to standard output.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quest_deploy.config import FinetuneConfig, PhaseConfig, Recipe
from quest_deploy.files import hash_file
from quest_deploy.model.load import load_model
from quest_deploy.quantize import finetune, recording, resume, train

RECIPE = Recipe(
    name="tiny",
    weight_bits=4,
    activation_bits=4,
    calibration_prompts=3,
    validation_prompts=1,
    calibration_steps=2,
    temporal=PhaseConfig(layers="temporal", steps=3, batch_size=2, network_every=2),
    sensitive=PhaseConfig(layers="all", steps=3, batch_size=2, learning_rate_floats=1e-4),
)
RECIPES = {
    "gptq": RECIPE,
    "adaround": dataclasses.replace(RECIPE, initializer="adaround", adaround_iterations=3),
    "shared": dataclasses.replace(RECIPE, initializer="nearest", shared_inputs=True),
    "table": dataclasses.replace(
        RECIPE,
        initializer="nearest",
        temporal_path="table",
        sensitive=dataclasses.replace(RECIPE.sensitive, layers="auto"),
    ),
}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def always_better(task: train.Task) -> float:
    """A loss that falls all the time, so that the last weights are the result and not those of the start."""
    return -time.monotonic()


def kill_at(part: str, count: int, how: str) -> None:
    """Arrange for this process to be killed."""
    save, save_file, save_checkpoint = (
        resume.WorkDirectory.save,
        resume.save_file,
        finetune.save_checkpoint,
    )
    left = count

    def counted_save(self: resume.WorkDirectory, name: str, tensors: dict, **facts: Any) -> None:
        nonlocal left
        left -= name == part[:-1] if part.endswith("$") else name.startswith(part)
        save(self, name, tensors, **facts)
        if left == 0 and how == "after":
            die()

    def half_save_file(tensors: dict, path: Path, **options: Any) -> None:
        save_file(tensors, path, **options)
        if left == 0 and how == "during":
            os.truncate(path, path.stat().st_size // 2)
            die()

    def half_checkpoint(*arguments: Any, **options: Any) -> None:
        save_checkpoint(*arguments, **options)
        die()

    if part == "output":
        finetune.save_checkpoint = half_checkpoint
    else:
        resume.WorkDirectory.save, resume.save_file = counted_save, half_save_file


def run(
    config: FinetuneConfig, model: Path, output: Path, *, go_on: bool, prepare: Callable[[], None]
) -> int:
    """Finetune in a child process; its wait status."""
    child = os.fork()
    if child == 0:
        try:
            prepare()
            finetune.finetune(model, output, config, resume=go_on)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def main(what: str, model: Path, folder: Path, moments: list[str]) -> None:
    config = FinetuneConfig(recipe=RECIPES[what], prompts=("a", "b", "c"), seed=3)
    torch.set_num_threads(1)
    resume.SAVE_EVERY_SECONDS, recording.BATCH_PROMPTS = 0.0, 1
    train.Task.validation_loss = always_better
    # Whatever is imported only now (torch._dynamo by optimizers) would be imported by every child.
    load_model(model)
    importlib.import_module("torch._dynamo")
    whole, interrupted = folder / "whole", folder / "interrupted"
    statuses = [run(config, model, whole, go_on=False, prepare=lambda: None)]
    for index, moment in enumerate(moments):
        part, count, how = moment.split(":")
        statuses.append(
            run(
                config,
                model,
                interrupted,
                go_on=index > 0,
                prepare=lambda: kill_at(part, int(count), how),  # noqa: B023
            )
        )
    before = sorted(path.name for path in folder.iterdir())
    statuses.append(run(config, model, interrupted, go_on=True, prepare=lambda: None))
    digests = [hash_file(path / "unet" / "quest.safetensors") for path in (whole, interrupted)]
    after = sorted(path.name for path in folder.iterdir())
    result = {"statuses": statuses, "digests": digests, "before": before, "after": after}
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])

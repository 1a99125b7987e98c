"""Finetunes a model twice: once in peace, once killed at the given moments and resumed each time. Not a test itself.

Arguments: what is run (of `RECIPES`), model, an empty folder, and moments ``part:count:how``, in the order in which a
run passes them. The process is killed when it saves its state for the `count`-th time under a name that starts with
`part`: `after` that is done, or `during` it, when half of the file is written. ``inputs$`` is that name alone;
``output`` is the checkpoint itself; ``drop`` is when what was joined into one file is to be deleted.
What is run with several processes (of `PROCESSES`) is killed in the first, and the others with it, as their launcher
does. Writes one JSON object to standard output.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from quest_deploy.config import FinetuneConfig, PhaseConfig, Recipe
from quest_deploy.files import hash_file, read_json
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
WALKING = dataclasses.replace(RECIPE, initializer="nearest", calibration_steps=3, walk_length=2)


def with_phases(recipe: Recipe, **changes: Any) -> Recipe:
    """`recipe`, both of its phases changed."""
    phases = {
        name: dataclasses.replace(getattr(recipe, name), **changes) for name in ("temporal", "sensitive")
    }
    return dataclasses.replace(recipe, **phases)


RECIPES |= {
    # Room for four pairs; to find that out takes a run of its own, and walks would double it.
    "sliced": dataclasses.replace(
        WALKING,
        targets="disk",
        memory_limit_gb=0.01,
        walk_share=0.0,
        temporal=PhaseConfig(layers="none", steps=0),
        sensitive=dataclasses.replace(RECIPE.sensitive, batch_size=5, low_rank=2),
    ),
    "bfloat16": with_phases(
        dataclasses.replace(WALKING, targets="recompute", precision="bfloat16"), steps=8, patience=2
    ),
    "own": dataclasses.replace(WALKING, targets="disk", on_policy_prompts=2),
    "two": with_phases(WALKING, walks=1, patience=2, steps=8),
}
PROCESSES = {"two": 2}


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def always_better(task: train.Task) -> float:
    """A loss that falls all the time, so that the last weights are the result and not those of the start."""
    return -time.monotonic()


VALIDATION_LOSS = train.Task.validation_loss


def by_the_bits(task: train.Task) -> float:
    """A loss that any bit changes, of what learns or of the true loss: it ends phases, and chooses, as if at random."""
    digest = hashlib.sha256(struct.pack("d", VALIDATION_LOSS(task)))
    for parameter in task.student.parameters():
        if parameter.requires_grad:
            digest.update(parameter.detach().numpy().tobytes())
    return struct.unpack("I", digest.digest()[:4])[0] / 2**32


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

    def no_drop(self: resume.WorkDirectory, names: list[str]) -> None:
        die()

    if part == "drop":
        resume.WorkDirectory.drop = no_drop
    elif part == "output":
        finetune.save_checkpoint = half_checkpoint
    else:
        resume.WorkDirectory.save, resume.save_file = counted_save, half_save_file


def environments(count: int) -> list[dict[str, str]]:
    """What `accelerate launch` sets for each of `count` processes."""
    if count == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    shared["ACCELERATE_USE_CPU"] = "true"
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def run(
    config: FinetuneConfig,
    model: Path,
    output: Path,
    count: int,
    *,
    go_on: bool,
    prepare: Callable[[], None],
) -> int:
    """Finetune in `count` child processes; the wait status of the first."""
    children = []
    for environment in environments(count):
        child = os.fork()
        if child == 0:
            try:
                os.environ |= environment
                if not children:
                    prepare()
                finetune.finetune(model, output, config, resume=go_on)
                os._exit(0)
            finally:
                os._exit(1)
        children.append(child)
    status = os.waitpid(children[0], 0)[1]
    for child in children[1:]:
        if status:
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return status


def main(what: str, model: Path, folder: Path, moments: list[str]) -> None:
    config = FinetuneConfig(recipe=RECIPES[what], prompts=("a", "b", "c"), seed=3)
    torch.set_num_threads(1)
    resume.SAVE_EVERY_SECONDS, recording.BATCH_PROMPTS = 0.0, 1
    exact = RECIPES[what].calibration_steps > RECIPE.calibration_steps
    train.Task.validation_loss = by_the_bits if exact else always_better
    # Whatever is imported only now (torch._dynamo by optimizers) would be imported by every child.
    load_model(model)
    processes = PROCESSES.get(what, 1)
    for module in ("torch._dynamo", "accelerate"):
        importlib.import_module(module)
    whole, interrupted = folder / "whole", folder / "interrupted"
    statuses = [run(config, model, whole, processes, go_on=False, prepare=lambda: None)]
    for index, moment in enumerate(moments):
        part, count, how = moment.split(":")
        statuses.append(
            run(
                config,
                model,
                interrupted,
                processes,
                go_on=index > 0,
                prepare=lambda: kill_at(part, int(count), how),  # noqa: B023
            )
        )
    before = sorted(path.name for path in folder.iterdir())
    statuses.append(run(config, model, interrupted, processes, go_on=True, prepare=lambda: None))
    digests = [hash_file(path / "unet" / "quest.safetensors") for path in (whole, interrupted)]
    after = sorted(path.name for path in folder.iterdir())
    histories = [read_json(path / "quest.json")["history"] for path in (whole, interrupted)]
    # Where losses are by the clock, those differ.
    result = {
        "histories": histories if exact else [],
        "statuses": statuses,
        "digests": digests,
        "before": before,
        "after": after,
    }
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])

"""Finetunes a model as one process and as two, and tells the losses of the first updates. Not a test itself.

Arguments: model, an empty folder. Writes one JSON object to standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
from pathlib import Path

import torch

from quest_deploy.config import FinetuneConfig, PhaseConfig, ProgressEvent, Recipe
from quest_deploy.files import hash_file
from quest_deploy.model.load import load_model
from quest_deploy.quantize.finetune import finetune

UPDATES = 10
# Only floats learn, and slowly: a weight or an activation that crosses a rounding boundary moves the loss of a model as
# small as this by per cents; gradients that differ in the sixth digit, as sums in another order do, send some across
# (noise of that size in the gradients of one process does the same).
SMOOTH = {"learning_rate_weights": 0.0, "learning_rate_scales": 0.0, "learning_rate_floats": 2e-4}
RECIPE = Recipe(
    name="tiny",
    weight_bits=4,
    activation_bits=8,
    calibration_prompts=4,
    validation_prompts=2,
    calibration_steps=3,
    walk_length=2,
    initializer="nearest",
    temporal=PhaseConfig(layers="temporal", steps=UPDATES, batch_size=3, walks=1, network_every=2, **SMOOTH),
    sensitive=PhaseConfig(layers="all", steps=UPDATES, batch_size=3, walks=1, **SMOOTH),
)
CONFIG = FinetuneConfig(recipe=RECIPE, prompts=("a", "b", "c", "d"), seed=3)


def run(model: Path, output: Path) -> None:
    """Finetune in this process; the losses that it is told go to a file."""
    losses: list[float] = []

    def keep(event: ProgressEvent) -> None:
        if "loss" in event.metrics:
            losses.append(event.metrics["loss"])

    finetune(model, output, CONFIG, progress=keep)
    if losses:
        output.with_suffix(".json").write_text(json.dumps(losses))


def fork(model: Path, output: Path, environment: dict[str, str]) -> int:
    """A child process that runs with more environment variables."""
    child = os.fork()
    if child == 0:
        try:
            os.environ |= environment
            run(model, output)
            os._exit(0)
        finally:
            os._exit(1)
    return child


def main(model: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    load_model(model)
    for module in ("torch._dynamo", "accelerate"):
        importlib.import_module(module)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # As `accelerate launch` and torchrun set them.
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "ACCELERATE_USE_CPU": "true",
    }
    environments = [{}] + [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    names = ("one", "two", "two")
    children = [fork(model, folder / name, more) for name, more in zip(names, environments, strict=True)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    result = {
        "statuses": statuses,
        "left": sorted(path.name for path in folder.iterdir()),
        "losses": [json.loads((folder / f"{name}.json").read_text()) for name in ("one", "two")],
        "digests": [hash_file(folder / name / "unet" / "quest.safetensors") for name in ("one", "two")],
    }
    sys.stdout.write(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

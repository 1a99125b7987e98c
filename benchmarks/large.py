"""Export of a model as large as Stable Diffusion XL, with random weights, in fp16: time, peak memory and size."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from benchmarks import stages
from benchmarks.environment import header
from benchmarks.settings import Settings
from benchmarks.tables import Table, megabytes, number, seconds, yes
from quest_deploy.artifacts import read_json
from quest_deploy.manifest import MANIFEST_NAME

NAME = "large"
# Of the component's bytes in the type that it is exported in; and bytes on top of that.
LIMIT_RATIO, LIMIT_BYTES = 1.3, 1_000_000_000
COMPONENT = "unet"


def run(settings: Settings) -> dict[str, Any]:
    """Make the model, and export it as a user does."""
    folder = settings.work / NAME
    model, output = folder / "model", folder / "onnx"
    if not (model / "model_index.json").is_file():
        # In a process of its own: stages are measured from one that does not hold torch.
        subprocess.run([sys.executable, "-m", "scripts.random_model", str(model)], check=True)
    arguments = ("export", str(model), "--dtype", "fp16")
    outcome = stages.required(stages.make(settings, "export large fp16", arguments, output, inputs=(model,)))
    details = read_json(output / MANIFEST_NAME)["details"]["components"]
    components = {
        name: {
            "size_bytes": one["size_bytes"],
            "nodes": one["nodes"],
            "float32_nodes": sorted(one["float32_nodes"]),
        }
        for name, one in details.items()
    }
    limit = round(LIMIT_RATIO * components[COMPONENT]["size_bytes"] + LIMIT_BYTES)
    return {**header(settings), "export": outcome, "components": components, "limit_bytes": limit}


def tables(result: dict[str, Any]) -> list[Table]:
    """One row for the whole export."""
    outcome, size = result["export"], result["components"][COMPONENT]["size_bytes"]
    return [
        Table(
            title="Export in fp16 of a model as large as Stable Diffusion XL",
            columns=(
                "time",
                "U-Net, ONNX",
                "peak memory",
                "peak over U-Net",
                f"at most {LIMIT_RATIO} x U-Net + 1 GB",
                "operators kept in float32",
            ),
            rows=(
                (
                    seconds(outcome["seconds"]),
                    megabytes(size),
                    megabytes(outcome["peak_memory_bytes"]),
                    number(outcome["peak_memory_bytes"] / size),
                    yes(outcome["peak_memory_bytes"] <= result["limit_bytes"]),
                    str(sum(len(one["float32_nodes"]) for one in result["components"].values())),
                ),
            ),
            labels=0,
            note="A U-Net of 2.6 billion random parameters, the real autoencoder, text encoders of one layer "
            "(scripts/random_model.py). Peak memory is that of the process, libraries among it. The time depends on "
            "what else the machine did.",
        )
    ]

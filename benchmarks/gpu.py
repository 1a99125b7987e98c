"""What was seen on a GPU: what TensorRT for RTX says of it, and finetuning there.

    python -m benchmarks.gpu FOLDER

puts together the files that a machine with a GPU left in FOLDER: probe.json (`python -m scripts.probe_tensorrt`),
long.json and cost.json (`python -m benchmarks.gpu_finetune long`, `cost`).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks.settings import RESULTS, Settings
from benchmarks.tables import MISSING, Table, number
from quest_deploy.artifacts import read_json, write_json

NAME = "gpu"
PARTS = (
    "record trajectories",
    "collect activations",
    "search scales",
    "round weights",
    "finetune temporal layers",
    "finetune sensitive layers",
)


def run(settings: Settings) -> dict[str, Any]:
    """Nothing here: the figures come from another machine.

    Raises:
        SystemExit: always.
    """
    raise SystemExit(
        "benchmarks: gpu is measured on a machine with a GPU; see `python -m benchmarks.gpu`'s module"
    )


def collect(folder: Path) -> dict[str, Any]:
    """The result file from what lies in `folder`."""
    probe, long, cost = (read_json(folder / f"{name}.json") for name in ("probe", "long", "cost"))
    return {
        **{key: long[key] for key in ("date", "machine", "versions", "commit", "gpus")},
        "uncommitted_changes": None,  # that machine has no repository
        "tensorrt_rtx": probe,
        "w4a4": long["run"],
        "sd15": {key: cost[key] for key in ("date", "commit", "unet", "runs", "unfinished") if key in cost},
    }


def errors(probe: dict[str, Any], build: str) -> str:
    """The last thing that was said as an error."""
    said = [line for line in probe[build]["said"] if "ERROR" in line]
    return said[-1].partition(": ")[2] if said else "nothing"


def tables(result: dict[str, Any]) -> list[Table]:
    """Its words, and the parts of finetuning."""
    probe, gpu = result["tensorrt_rtx"], result["gpus"][0]
    builds = ("as it is", "for this GPU")
    name = f"{gpu['name']} (compute capability {gpu['compute_capability']})"
    small, large = result["w4a4"], result["sd15"].get("unfinished", {})
    return [
        Table(
            title=f"TensorRT for RTX {probe['version']} on an {name}",
            columns=("build", "builds", "loads", "runs", "last error"),
            rows=tuple(
                (
                    build,
                    "yes" if probe[build]["plan_bytes"] else "no",
                    "yes" if probe[build].get("deserialized") else "no",
                    "yes" if probe[build].get("ran") else "no",
                    errors(probe, build),
                )
                for build in builds
            ),
            labels=1,
            note="One matrix product, by its own Python API (`scripts/probe_tensorrt.py`). No engine has been run yet: "
            "full TensorRT could not be brought to that machine, and this one refuses it.",
        ),
        Table(
            title=f"Finetuning on an {name}",
            columns=(
                "part",
                "bundled model, W4A4",
                "GPU memory",
                "Stable-Diffusion-1.5-sized, W4A8",
                "GPU memory",
            ),
            rows=tuple(
                (part, *_cells(small, part), *_cells(large, part))
                for part in PARTS
                if part in {**small["parts_s"], **large.get("parts_s", {})}
            ),
            labels=1,
            note="TF32. Left: the whole of a run with 2,048 trajectories, 60 and 50 updates of 96 pairs and 24 walks; "
            "another process kept the processor busy for its first minute. Right: 4 prompts of a packaged recipe's 96; "
            "`ff.net` learns, gradient checkpointing, memory_limit_gb 24; the machine's time was up before the second "
            "phase, so its time and that of a whole recipe are **not measured**. Memory is the most that PyTorch held "
            "on the GPU in that part.",
        ),
    ]


def _cells(run: dict[str, Any], part: str) -> tuple[str, str]:
    if part not in run.get("parts_s", {}):
        return MISSING, MISSING
    return f"{number(run['parts_s'][part], 1)} s", f"{run['peak_bytes'][part] / 1e9:.1f} GB"


if __name__ == "__main__":
    write_json(RESULTS / f"{NAME}.json", collect(Path(sys.argv[1])))

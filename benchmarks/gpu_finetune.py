"""Finetuning on a GPU: what a Stable-Diffusion-1.5-sized U-Net takes, and how far W4A4 goes with more passes.

    python -m benchmarks.gpu_finetune cost --output FILE.json [--commit HASH]
    python -m benchmarks.gpu_finetune long --output FILE.json --checkpoint DIR --seconds 240 [--commit HASH]

`cost` runs every part of the packaged W4A8 recipe for a few prompts and updates on random weights, and says what the
whole recipe would take from the seconds of each: an extrapolation, and called one. `long` finetunes the bundled model
to W4A4 with as many updates as the time allows. Both write what is known after each part, so that a run that is
stopped leaves its figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.cpu_speed import write_model
from benchmarks.environment import machine, now
from benchmarks.settings import MODEL
from quest_deploy.config import FinetuneConfig, PhaseConfig, ProgressEvent, Recipe
from quest_deploy.engines.libraries import gpus
from quest_deploy.manifest import tool_versions
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.recipe import load_recipe

# Of runwayml/stable-diffusion-v1-5; everything else is diffusers' default.
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SHORT_PROMPTS, SHORT_VALIDATION, SHORT_UPDATES = 4, 1, 10
SEEDS_PER_PROMPT = 8
PRECISIONS = ("tf32", "float32", "bfloat16")
MEMORY_LIMIT_GB = 24.0
LONG = "w4a4-long"


@dataclass
class Clock:
    """When each part began and ended, and when each update did.

    Attributes:
        seconds: Of each part so far, in order.
        updates: Seconds between events of each part.
        bytes: The GPU's peak in each part.
    """

    seconds: dict[str, float] = field(default_factory=dict)
    updates: dict[str, list[float]] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    losses: list[dict[str, Any]] = field(default_factory=list)
    last: float = field(default_factory=time.perf_counter)

    def __call__(self, event: ProgressEvent) -> None:
        torch.cuda.synchronize()
        moment = time.perf_counter()
        self.updates.setdefault(event.stage, []).append(moment - self.last)
        self.seconds[event.stage] = self.seconds.get(event.stage, 0.0) + moment - self.last
        self.bytes[event.stage] = max(self.bytes.get(event.stage, 0), torch.cuda.max_memory_allocated())
        if event.metrics and event.completed % 50 == 0:
            self.losses.append({"stage": event.stage, "step": event.completed, **event.metrics})
            print(event.stage, event.completed, event.total, event.metrics, flush=True)
        torch.cuda.reset_peak_memory_stats()
        self.last = moment


def short(recipe: Recipe, **changes: Any) -> Recipe:
    """`recipe` with few prompts and updates."""
    return dataclasses.replace(
        recipe,
        calibration_prompts=SHORT_PROMPTS,
        validation_prompts=SHORT_VALIDATION,
        temporal=dataclasses.replace(recipe.temporal, steps=2 * recipe.temporal.network_every),
        sensitive=dataclasses.replace(recipe.sensitive, steps=SHORT_UPDATES),
        **changes,
    )


def timed(model: Path, recipe: Recipe, output: Path, prompts: tuple[str, ...] = ()) -> dict[str, Any]:
    """Finetune on the GPU, and tell what each part took; an error is told as well."""
    clock = Clock()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    found: dict[str, Any] = {"recipe": asdict(recipe)}
    try:
        finetune(
            model,
            output,
            FinetuneConfig(recipe=recipe, prompts=prompts, device="cuda"),
            progress=clock,
            overwrite=True,
        )
    except Exception as error:  # what a GPU answers is the finding
        found["error"] = f"{type(error).__name__}: {error}"[:2000]
        print(found["error"], flush=True)
    gc.collect()
    torch.cuda.empty_cache()
    return found | {
        "seconds": round(time.perf_counter() - started, 2),
        "parts_s": {name: round(value, 3) for name, value in clock.seconds.items()},
        "median_update_s": {name: statistics.median(value) for name, value in clock.updates.items()},
        "least_update_s": {name: min(value) for name, value in clock.updates.items()},
        "peak_bytes": clock.bytes,
        "losses": clock.losses,
    }


def whole(recipe: Recipe, run: dict[str, Any]) -> dict[str, float]:
    """Seconds that all of `recipe` would take, from those of its short run: an extrapolation.

    Recording grows with the prompts, each phase with its updates and validations (nine of all validation prompts); what
    is shown to find scales and Hessians, eight prompts a timestep, was four in the short run.
    """
    # Every other update has a validation behind it, which is no part of the least.
    parts, updates = run["parts_s"], run["least_update_s"]
    prompts = recipe.calibration_prompts / SHORT_PROMPTS
    shown = 8 / SHORT_PROMPTS
    found = {
        "record trajectories": parts["record trajectories"] * prompts,
        "collect activations": parts["collect activations"] * shown,
        "search scales": parts["search scales"],
        "round weights": parts.get("round weights", 0.0) * shown,
    }
    temporal, sensitive = "finetune temporal layers", "finetune sensitive layers"
    judged = max(parts[sensitive] - updates[sensitive] * SHORT_UPDATES, 0.0)
    judging = judged * recipe.validation_prompts / SHORT_VALIDATION
    short_steps = 2 * recipe.temporal.network_every
    found[temporal] = (parts[temporal] - judged) * recipe.temporal.steps / short_steps + judging
    found[sensitive] = updates[sensitive] * recipe.sensitive.steps + judging
    return {name: round(value, 1) for name, value in found.items()}


def cost(output: Path, header: dict[str, Any], seconds: float) -> None:
    """Every part of the packaged recipe, briefly, in each precision until the time is up."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder), SD15, half=True)
        model = Path(folder) / "model"
        print("model written", round(time.perf_counter() - started, 1), flush=True)
        packaged = load_recipe("w4a8")
        variants = {
            "tf32": {"precision": "tf32"},
            "tf32, 24 GB": {"precision": "tf32", "memory_limit_gb": MEMORY_LIMIT_GB, "targets": "disk"},
            "bfloat16": {"precision": "bfloat16"},
            "float32": {"precision": "float32"},
        }
        runs: dict[str, Any] = {}
        for index, (name, changes) in enumerate(variants.items()):
            if time.perf_counter() - started > seconds:
                runs[name] = {"error": "not run: the time was up"}
                write(output, {**header, "unet": SD15, "runs": runs})
                continue
            if index:
                # What comes before training was timed by the first.
                changes = {**changes, "initializer": "nearest"}
            run = timed(model, short(packaged, **changes), Path(folder) / "checkpoint")
            if "error" not in run and not index:
                run["whole_recipe_s"] = whole(packaged, run)
            runs[name] = run
            write(output, {**header, "unet": SD15, "runs": runs})


def long_recipe(updates: int) -> Recipe:
    """W4A4 as packaged, but for the number of samples: all weights, scales, biases and norms learn."""
    packaged = load_recipe("w4a4")
    return dataclasses.replace(
        packaged,
        name=LONG,
        calibration_prompts=SEEDS_PER_PROMPT * 256,
        validation_prompts=24,
        error_mean="geometric",
        precision="tf32",
        temporal=dataclasses.replace(packaged.temporal, batch_size=32, walks=4),
        sensitive=PhaseConfig(
            layers="all",
            steps=updates,
            batch_size=96,
            walks=24,
            learning_rate_weights=0.02,
            learning_rate_scales=0.003,
            learning_rate_floats=0.0005,
        ),
    )


def longer(output: Path, header: dict[str, Any], checkpoint: Path, seconds: float) -> None:
    """As many updates as fit."""
    started = time.perf_counter()
    prompts = load_prompts(default="calibration") * SEEDS_PER_PROMPT
    probe = dataclasses.replace(
        long_recipe(8),
        calibration_prompts=64,
        validation_prompts=2,
        initializer="nearest",
        temporal=dataclasses.replace(long_recipe(8).temporal, steps=4),
    )
    with tempfile.TemporaryDirectory() as folder:
        first = timed(MODEL, probe, Path(folder) / "checkpoint", prompts)
    write(output, {**header, "probe": first})
    update_s = first["median_update_s"]["finetune sensitive layers"]
    # Recording, rounding and validations take what is kept back.
    left = seconds - (time.perf_counter() - started)
    updates = max(50, int(0.62 * left / update_s))
    print(f"{update_s:.3f} s an update: {updates} updates", flush=True)
    run = timed(MODEL, long_recipe(updates), checkpoint, prompts)
    write(output, {**header, "probe": first, "run": run})


def write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_finetune", description=__doc__)
    parser.add_argument("what", choices=("cost", "long"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--commit")
    arguments = parser.parse_args()
    header = {
        "date": now(),
        "machine": machine(),
        "gpus": [asdict(gpu) for gpu in gpus()],
        "versions": tool_versions(),
        "commit": arguments.commit,
    }
    if arguments.what == "cost":
        cost(arguments.output, header, arguments.seconds)
    else:
        longer(arguments.output, header, arguments.checkpoint, arguments.seconds)


if __name__ == "__main__":
    main()

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
from collections.abc import Callable
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
from quest_deploy.model.load import load_model
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize import gptq
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.insert import quantizable_layers
from quest_deploy.quantize.recipe import load_recipe

# Of runwayml/stable-diffusion-v1-5; everything else is diffusers' default.
SD15: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SHORT_PROMPTS, SHORT_VALIDATION, SHORT_UPDATES = 4, 1, 10
SEEDS_PER_PROMPT = 8
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
    save: Callable[[dict[str, Any]], None] = lambda known: None
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
        self.save({"unfinished": {"parts_s": self.seconds, "peak_bytes": self.bytes, "at": event.completed}})
        self.last = time.perf_counter()


def short(recipe: Recipe, **changes: Any) -> Recipe:
    """`recipe` with few prompts and updates."""
    return dataclasses.replace(
        recipe,
        calibration_prompts=SHORT_PROMPTS,
        validation_prompts=SHORT_VALIDATION,
        temporal=dataclasses.replace(recipe.temporal, steps=recipe.temporal.network_every),
        sensitive=dataclasses.replace(recipe.sensitive, steps=SHORT_UPDATES),
        **changes,
    )


def timed(
    model: Path,
    recipe: Recipe,
    output: Path,
    prompts: tuple[str, ...] = (),
    save: Callable[[dict[str, Any]], None] = lambda known: None,
) -> dict[str, Any]:
    """Finetune on the GPU, and tell what each part took; an error is told as well."""
    clock = Clock(save=save)
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
    }
    temporal, sensitive = "finetune temporal layers", "finetune sensitive layers"
    judged = max(parts[sensitive] - updates[sensitive] * SHORT_UPDATES, 0.0)
    # Of one prompt, six times; the whole phase judges nine times.
    judging = judged * recipe.validation_prompts / SHORT_VALIDATION * 9 / 6
    short_steps = recipe.temporal.network_every
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
        # The published choice of layers for text-to-image.
        few = dataclasses.replace(packaged.sensitive, layers="paper-sd")
        frugal = {"gradient_checkpointing": True, "targets": "disk", "precision": "tf32"}
        variants = {
            "ff.net learns, 24 GB": {**frugal, "sensitive": few, "memory_limit_gb": MEMORY_LIMIT_GB},
            "all layers learn": frugal,
            "ff.net learns, 24 GB, bfloat16": {
                **frugal,
                "sensitive": few,
                "memory_limit_gb": MEMORY_LIMIT_GB,
                "precision": "bfloat16",
            },
        }
        runs: dict[str, Any] = {}
        for index, (name, changes) in enumerate(variants.items()):
            if time.perf_counter() - started > seconds:
                runs[name] = {"error": "not run: the time was up"}
                write(output, {**header, "unet": SD15, "runs": runs})
                continue
            recipe = dataclasses.replace(packaged, **changes)
            done = {**header, "unet": SD15, "runs": runs}
            run = timed(
                model,
                short(recipe, initializer="nearest"),
                Path(folder) / "checkpoint",
                save=lambda known, done=done: write(output, {**done, **known}),  # type: ignore[misc]
            )
            if "error" not in run:
                run["whole_recipe_s"] = whole(recipe, run)
            runs[name] = run
            write(output, {**header, "unet": SD15, "runs": runs})
            if not index:
                header["rounding"] = rounding(model)
                for each in runs.values():
                    if "whole_recipe_s" in each:
                        passes = header["rounding"]["chunks"] * each["whole_recipe_s"]["collect activations"]
                        each["whole_recipe_s"]["round weights"] = round(
                            passes + header["rounding"]["columns"] * header["rounding"]["column_s"], 1
                        )
                write(output, {**header, "unet": SD15, "runs": runs})


def rounding(path: Path) -> dict[str, Any]:
    """What error-compensated rounding takes: seconds of a column, and how many there are."""
    denoiser = load_model(path).denoiser
    layers = quantizable_layers(denoiser)
    chunks = list(gptq.chunks(denoiser, list(layers)))
    names = sorted(
        (name for chunk in chunks for name in chunk), key=lambda name: layers[name].weight[0].numel()
    )
    seen, spent = 0, 0.0
    for name in names[:: max(1, len(names) // 8)]:
        weight = layers[name].weight.detach().flatten(1).cuda()
        with weight.device:
            scale, hessian = torch.full([weight.shape[0]], 0.01), torch.eye(weight.shape[1])
        torch.cuda.synchronize()
        started = time.perf_counter()
        gptq.round_with_compensation(weight, scale, hessian, 4)
        torch.cuda.synchronize()
        spent += time.perf_counter() - started
        seen += weight.shape[1]
    columns = sum(layers[name].weight[0].numel() for name in names)
    return {"layers": len(names), "chunks": len(chunks), "columns": columns, "column_s": spent / seen}


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

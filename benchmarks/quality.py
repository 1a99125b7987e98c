"""What each recipe, and each part of the method, costs in quality on prompts that nothing was fitted to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from benchmarks import rows, stages
from benchmarks.environment import header
from benchmarks.rows import MEASURED_BY, Bench
from benchmarks.settings import MODEL, Settings
from benchmarks.stages import identity, made_by
from benchmarks.tables import Table, interval, number
from quest_deploy.config import Recipe, to_dict
from quest_deploy.files import hash_mapping
from quest_deploy.manifest import MANIFEST_NAME

NAME = "quality"
ROWS = {
    "minmax": "(a) round to nearest, min-max",
    "calibrated": "(b) calibrated, not finetuned",
    "start": "(b+) start of finetuning",
    "quest": "(c) QuEST",
}
PAIRS = (("quest", "calibrated"), ("quest", "minmax"), ("start", "calibrated"), ("quest", "start"))
FIGURES = ("raw_snr_db", "guided_snr_db", "psnr_db", "ssim")
GRID_LABELS = {
    "fp32": "fp32",
    "minmax": "(a) min-max",
    "calibrated": "(b) calibrated",
    "start": "(b+) start",
    "quest": "(c) QuEST",
}
GRID_COLUMNS = 8
CALIBRATION_SEEDS = range(96)


def variant(recipe: Recipe, row: str) -> Recipe:
    """The recipe of a row that is not finetuned: without steps, and for (b) without what QuEST's start adds."""
    name = f"{recipe.name}-{row}"
    temporal = dataclasses.replace(recipe.temporal, steps=0)
    sensitive = dataclasses.replace(recipe.sensitive, steps=0)
    start = dataclasses.replace(recipe, name=name, temporal=temporal, sensitive=sensitive)
    if row == "start":
        return start
    plain = {"initializer": "nearest", "time_aware": False, "channel_wise": False, "rotation": None}
    return dataclasses.replace(start, **plain)


def run(settings: Settings) -> dict[str, Any]:
    """Measure all rows of all recipes; go on where an interrupted run stopped."""
    folder = settings.work / rows.FOLDER
    # Finetuning runs in processes of its own, measured, before torch is loaded here.
    paths: dict[str, dict[str, Path]] = {}
    finetuned_by: dict[str, str] = {}
    for name in settings.recipes:
        checkpoint, outcome = stages.finetuned(settings, name)
        paths[name], finetuned_by[name] = {"quest": checkpoint}, outcome["made_by"]
        for row in ("calibrated", "start"):
            paths[name][row] = folder / "checkpoints" / f"{name}-{row}"
            stages.finetune(settings, variant(settings.recipe(name), row), paths[name][row])
    for name in settings.recipes:
        paths[name]["minmax"] = minmax(settings, name, folder)
    bench = rows.bench(settings)
    recipes = {name: _recipe(bench, name, paths[name]) for name in settings.recipes}
    return {
        **header(settings),
        "prompts": list(settings.prompts),
        "torch_threads": threads(),
        "checkpoints_made_by": finetuned_by,
        "recipes": recipes,
    }


def threads() -> int:
    """How many threads torch uses."""
    import torch

    return torch.get_num_threads()


def minmax(settings: Settings, name: str, folder: Path) -> Path:
    """The checkpoint of row (a) of a recipe."""
    recipe = settings.recipe(name)
    calibration = {
        "source": identity(MODEL),
        **made_by(MEASURED_BY),
        "prompts": recipe.calibration_prompts,
        "steps": recipe.calibration_steps,
        "guidance_scale": recipe.guidance_scale,
        "seed": settings.seed,
    }
    cache = folder / f"calibration-{hash_mapping(calibration)[:12]}"
    output = cache / f"{name}-minmax-{hash_mapping(to_dict(recipe))[:12]}"
    if not (output / MANIFEST_NAME).is_file():
        from benchmarks.trajectories import minmax_checkpoint

        print(f"\nmin-max ranges of {name}", flush=True)
        minmax_checkpoint(settings, dataclasses.replace(recipe, name=f"{name}-minmax"), output, cache)
    return output


def _recipe(bench: Bench, name: str, paths: dict[str, Path]) -> dict[str, Any]:
    """All rows of one recipe, their differences, and the grid of images."""
    figures: dict[str, dict[str, Any]] = {}
    images = {"fp32": bench.known[0].images}
    for row, label in ROWS.items():
        figures[row], images[row] = rows.measured_checkpoint(
            bench, f"{name}-{row}", f"{name}, {label}", paths[row]
        )
    _save_grid(bench.settings, name, images)
    return {"rows": figures, "differences": differences(figures)}


def differences(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each pair of rows that is compared."""
    return {_key(pair): difference(rows[pair[0]], rows[pair[1]]) for pair in PAIRS}


def difference(better: dict[str, Any], worse: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Mean and 95 % interval, paired by prompt, of what one row has over another in each figure."""
    from quest_deploy.metrics import paired_interval

    result: dict[str, dict[str, float]] = {}
    for figure in FIGURES:
        pairs = zip(better[figure]["per_prompt"], worse[figure]["per_prompt"], strict=True)
        ends = paired_interval([first - second for first, second in pairs])
        result[figure] = dict(zip(("low", "mean", "high"), ends, strict=True))
    return result


def _save_grid(settings: Settings, name: str, images: dict[str, Any]) -> None:
    from benchmarks.grid import save_grid
    from quest_deploy.pipeline.images import to_pil

    shown = range(min(GRID_COLUMNS, len(settings.prompts)))
    rows = [(GRID_LABELS[row], [to_pil(images[row][i]) for i in shown]) for row in GRID_LABELS]
    save_grid(settings.results / f"{NAME}-{name}.png", rows, [settings.prompts[i] for i in shown])


def tables(result: dict[str, Any]) -> list[Table]:
    """The figures, the differences, and the noise SNR along the schedule."""
    recipes = {name: result["recipes"][name] for name in result["settings"]["recipes"]}
    figures = tuple(
        (name.upper(), ROWS[row], *(number(rows[row][figure]["mean"]) for figure in FIGURES[:3]))
        + (number(rows[row]["ssim"]["mean"], 4),)
        for name, rows in ((name, recipe["rows"]) for name, recipe in recipes.items())
        for row in ROWS
    )
    compared = tuple(
        (name.upper(), _pair(pair), *(interval(values[figure]) for figure in FIGURES[:3]))
        for name, recipe in recipes.items()
        for pair, values in ((pair, recipe["differences"][_key(pair)]) for pair in PAIRS)
    )
    steps = result["settings"]["steps"]
    return [
        Table(
            title="Quality against full precision",
            columns=("recipe", "row", "noise SNR, dB", "noise SNR guided, dB", "image PSNR, dB", "SSIM"),
            rows=figures,
            labels=2,
            note=f"Means over {sample_size(result)}, {steps} DDIM steps, guidance "
            f"{result['settings']['guidance_scale']:g}, same noise. Noise SNR is taken on the full-precision "
            "trajectory: of the network's output, mean of both guidance branches in dB, and of the guided prediction."
            + seen_noise(result)
            + _doubts(result["checkpoints_made_by"]),
        ),
        Table(
            title="Differences, paired by prompt",
            columns=("recipe", "rows", "noise SNR, dB", "noise SNR guided, dB", "image PSNR, dB"),
            rows=compared,
            labels=2,
            note="Mean and 95 % bootstrap interval over prompts, of each the mean over its noise seeds: what another "
            "finetuning would give is not in it.",
        ),
        _per_step(recipes),
    ]


def sample_size(result: dict[str, Any]) -> str:
    """How much was measured, in words."""
    settings = result["settings"]
    seeds = settings.get("noise_seeds", [0])
    return f"{settings['prompts']} held-out prompts" + (
        f" × {len(seeds)} noise seeds" if len(seeds) > 1 else ""
    )


def seen_noise(result: dict[str, Any]) -> str:
    """A sentence on noise that calibration drew from as well; empty where there is none."""
    settings = result["settings"]
    seeds = [first + i for first in settings.get("noise_seeds", [0]) for i in range(settings["prompts"])]
    seen = sum(seed in CALIBRATION_SEEDS for seed in seeds)
    return (
        f" {seen} of these {len(seeds)} noises are calibration's as well, under other prompts."
        if seen
        else ""
    )


def _doubts(made_by: dict[str, str]) -> str:
    """A sentence on checkpoints of which it is not certain that this code makes them."""
    others = [name.upper() for name, code in sorted(made_by.items()) if code != "this code"]
    return f" The code has changed since {', '.join(others)} was finetuned, or may have." if others else ""


def _key(pair: tuple[str, str]) -> str:
    return " - ".join(pair)


def _pair(pair: tuple[str, str]) -> str:
    return " − ".join(ROWS[row].partition(" ")[0] for row in pair)


def _per_step(recipes: dict[str, Any]) -> Table:
    count = max(
        (len(recipe["rows"]["quest"]["raw_snr_db"]["per_step"]) for recipe in recipes.values()), default=1
    )
    chosen = sorted({round(i * (count - 1) / 6) for i in range(7)})
    rows = tuple(
        (
            name.upper(),
            ROWS[row],
            *(number(recipe["rows"][row]["raw_snr_db"]["per_step"][i], 1) for i in chosen),
        )
        for name, recipe in recipes.items()
        for row in ROWS
    )
    return Table(
        title="Noise SNR of the network's output by step, dB",
        columns=("recipe", "row", *(f"step {i + 1}" for i in chosen)),
        rows=rows,
        labels=2,
    )

"""What more prompts and longer training bring at W4A4, to QuEST and to the best baseline that is not finetuned."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks import quality, rows, stages
from benchmarks.baselines.rows import FINETUNED, budget, variant
from benchmarks.baselines.rows import ROWS as LABELS
from benchmarks.environment import header
from benchmarks.settings import Settings
from benchmarks.tables import Table, interval, number

NAME = "longer"
RECIPE = "w4a4-long"
ROWS = ("adaround", "quest")


def run(settings: Settings) -> dict[str, Any]:
    """Make all rows from the same prompts and as many samples, and measure them as :mod:`benchmarks.quality` does."""
    recipe = settings.recipe(RECIPE)
    recipes = {row: recipe if row == "quest" else variant(recipe, row, quick=settings.quick) for row in ROWS}
    paths = {row: made(settings, row) for row in ROWS}
    bench = rows.bench(settings)
    found = {
        row: rows.measured_checkpoint(bench, f"{RECIPE}-{row}", f"{RECIPE}, {LABELS[row]}", path)[0]
        | {"budget": budget(recipes[row], row)}
        for row, path in paths.items()
    }
    differences = {row: quality.difference(found["quest"], found[row]) for row in ROWS if row != "quest"}
    return {**header(settings), "rows": found, "differences": differences}


def made(settings: Settings, row: str) -> Path:
    """The checkpoint of a row."""
    recipe = settings.recipe(RECIPE)
    path = settings.work / rows.FOLDER / "checkpoints" / f"{RECIPE}-{row}"
    stages.finetune(settings, recipe if row == "quest" else variant(recipe, row, quick=settings.quick), path)
    return path


def tables(result: dict[str, Any]) -> list[Table]:
    """A row for each method, with what QuEST has over it."""
    lines = []
    for row in ROWS:
        figures, over = result["rows"][row], result["differences"].get(row, {})
        lines.append(
            (
                f"{LABELS[row]} *" if row in FINETUNED else LABELS[row],
                f"{figures['budget']['training_samples']:,}",
                *(number(figures[figure]["mean"]) for figure in quality.FIGURES[:3]),
                number(figures["ssim"]["mean"], 4),
                *(interval(over.get(figure)) for figure in ("raw_snr_db", "psnr_db")),
            )
        )
    prompts = result["rows"]["quest"]["budget"]["prompts"]
    return [
        Table(
            title=f"W4A4 with more prompts and longer training (`{RECIPE}`)",
            columns=(
                "row",
                "training samples",
                "noise SNR, dB",
                "noise SNR guided, dB",
                "image PSNR, dB",
                "SSIM",
                "QuEST's noise SNR over it, dB",
                "QuEST's image PSNR over it, dB",
            ),
            rows=tuple(lines),
            labels=1,
            note=f"Means over {quality.sample_size(result)}; intervals of 95 %, paired by prompt, in which another "
            f"finetuning is not. Every row has the same {prompts:,} calibration prompts. Rows with * are finetuned; "
            "AdaRound's samples are of each block." + quality.seen_noise(result),
        )
    ]

"""What learning the rounding of weights at the start (AdaRound) brings over compensating its error (GPTQ)."""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks import quality, rows, stages
from benchmarks.baselines.rows import ADAROUND_ITERATIONS
from benchmarks.environment import header
from benchmarks.settings import Settings
from benchmarks.tables import Table, interval, number
from quest_deploy.config import Recipe

NAME = "initializers"
ROWS = {
    "gptq": "GPTQ, as packaged",
    "adaround": "AdaRound by blocks (`initializer: adaround`)",
}


def variant(recipe: Recipe) -> Recipe:
    """The recipe, its weights rounded by AdaRound at the start."""
    name = f"{recipe.name}-from-adaround"
    return dataclasses.replace(
        recipe, name=name, initializer="adaround", adaround_iterations=ADAROUND_ITERATIONS
    )


def run(settings: Settings) -> dict[str, Any]:
    """Finetune from both, and measure both as :mod:`benchmarks.quality` does."""
    folder = settings.work / rows.FOLDER / "checkpoints"
    names = [name for name in settings.recipes if settings.recipe(name).weight_bits == 4]
    paths = {}
    for name in names:
        recipe = variant(settings.recipe(name))
        paths[name] = {"gptq": stages.finetuned(settings, name)[0], "adaround": folder / recipe.name}
        stages.finetune(settings, recipe, paths[name]["adaround"])
    bench = rows.bench(settings)
    recipes = {}
    for name in names:
        # The packaged row is the one of benchmarks.quality, measured once.
        labels = {"gptq": f"{name}-quest", "adaround": f"{name}-from-adaround"}
        found = {
            row: rows.measured_checkpoint(bench, labels[row], f"{name}, {ROWS[row]}", path)[0]
            for row, path in paths[name].items()
        }
        recipes[name] = {"rows": found, "difference": quality.difference(found["adaround"], found["gptq"])}
    return {**header(settings), "iterations": ADAROUND_ITERATIONS, "recipes": recipes}


def tables(result: dict[str, Any]) -> list[Table]:
    """Two rows for each recipe, the second with what it has over the first."""
    recipes = {
        name: result["recipes"][name] for name in result["settings"]["recipes"] if name in result["recipes"]
    }
    lines = []
    for name, recipe in recipes.items():
        for row, label in ROWS.items():
            over = {} if row == "gptq" else recipe["difference"]
            figures = recipe["rows"][row]
            lines.append(
                (
                    name.upper(),
                    label,
                    *(number(figures[figure]["mean"]) for figure in quality.FIGURES[:3]),
                    number(figures["ssim"]["mean"], 4),
                    *(interval(over.get(figure)) for figure in ("raw_snr_db", "psnr_db")),
                )
            )
    return [
        Table(
            title="QuEST from either rounding of the weights",
            columns=(
                "recipe",
                "weights at the start",
                "noise SNR, dB",
                "noise SNR guided, dB",
                "image PSNR, dB",
                "SSIM",
                "noise SNR over GPTQ's, dB",
                "image PSNR over GPTQ's, dB",
            ),
            rows=tuple(lines),
            labels=2,
            note=f"Means over {quality.sample_size(result)}; intervals of 95 %, paired by prompt, in which another "
            f"finetuning is not. {result['iterations']} updates a block; all else is as packaged."
            + quality.seen_noise(result),
        )
    ]

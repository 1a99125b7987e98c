"""The comparison as tables."""

from __future__ import annotations

from typing import Any

from benchmarks.baselines.rows import FINETUNED, ROWS
from benchmarks.quality import FIGURES, sample_size, seen_noise
from benchmarks.tables import MISSING, Table, interval, number


def tables(result: dict[str, Any]) -> list[Table]:
    """The figures, what QuEST has over each row, and what each row was given and made of it."""
    recipes = {name: result["recipes"][name] for name in result["settings"]["recipes"]}
    return [_figures(recipes, result), _differences(recipes), _budgets(recipes)]


def _rows(recipe: dict[str, Any]) -> list[str]:
    """The rows that were measured, in the order of this code and not of JSON."""
    return [row for row in ROWS if row in recipe["rows"]]


def _label(row: str) -> str:
    return f"{ROWS[row]} *" if row in FINETUNED else ROWS[row]


def _figures(recipes: dict[str, Any], result: dict[str, Any]) -> Table:
    return Table(
        title="Baselines against full precision",
        columns=("recipe", "row", "noise SNR, dB", "noise SNR guided, dB", "image PSNR, dB", "SSIM"),
        rows=tuple(
            (
                name.upper(),
                _label(row),
                *(number(recipe["rows"][row][figure]["mean"]) for figure in FIGURES[:3]),
                number(recipe["rows"][row]["ssim"]["mean"], 4),
            )
            for name, recipe in recipes.items()
            for row in _rows(recipe)
        ),
        labels=2,
        note=f"Means over {sample_size(result)} as above. Rows with * are finetuned. Every row has "
        "the same calibration prompts and the same layers at 8 bits. 8-bit activations of our own rows cover every "
        "value, also where a row is named after percentiles: those are of weights, and of activations below 8 bits. "
        f"Model-Optimizer {result['modelopt']} simulates its own quantizers; its shipped INT8 configurations leave the "
        "transformers' `proj_out` in float, and it smooths at 8 bits only. Q-Diffusion and EfficientDM are methods on "
        "this project's grid, not the published code." + seen_noise(result),
    )


def _differences(recipes: dict[str, Any]) -> Table:
    return Table(
        title="What QuEST has over each baseline, paired by prompt",
        columns=("recipe", "row", "noise SNR, dB", "noise SNR guided, dB", "image PSNR, dB"),
        rows=tuple(
            (
                name.upper(),
                _label(row),
                *(interval(recipe["differences"][row][figure]) for figure in FIGURES[:3]),
            )
            for name, recipe in recipes.items()
            for row in _rows(recipe)
            if row != "quest"
        ),
        labels=2,
        note="Mean and 95 % bootstrap interval over prompts: what another finetuning would give is not in it.",
    )


def _budgets(recipes: dict[str, Any]) -> Table:
    return Table(
        title="What each row was given, and its losses",
        columns=(
            "recipe",
            "row",
            "prompts × steps",
            "calibration samples",
            "training samples",
            "own loss, end (start 1)",
            "error of predictions",
        ),
        rows=tuple(
            (name.upper(), _label(row), *_budget(recipe["rows"][row]))
            for name, recipe in recipes.items()
            for row in _rows(recipe)
        ),
        labels=2,
        note="A sample is one latent at one timestep in one guidance branch; training samples are those that gradients "
        "were taken of, AdaRound's for each block. (Seconds are in the JSON alone, since rows are made beside other "
        "work.) The own loss is what a "
        "method minimizes: AdaRound the mean over blocks of their outputs' error, the finetuned rows their loss on the "
        "prompts that choose the result. The error of predictions is the same for all rows: squared "
        "error of the network's output over its power, on the calibration prompts that choose the finetuned rows' "
        "result.",
    )


def _budget(row: dict[str, Any]) -> tuple[str, ...]:
    given, own = row["budget"], row["own_loss"]
    return (
        f"{given['prompts']} × {given['steps']}",
        f"{given['calibration_samples']:,}",
        f"{given['training_samples']:,}",
        MISSING if own is None else number(own["after"] / own["before"], 3),
        f"{row['validation_loss']:.5f}",
    )

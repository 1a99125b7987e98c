"""The rows of the comparison: what each baseline is, and what it was allowed to spend."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from benchmarks import quality
from quest_deploy.config import PhaseConfig, Recipe

ROWS = {
    "minmax": "round to nearest, min-max",
    "calibrated": "percentiles and least squared error",
    "modelopt-max": "Model-Optimizer, max",
    "modelopt-smoothquant": "Model-Optimizer, SmoothQuant",
    "modelopt-mse": "Model-Optimizer, weights by squared error",
    "adaround": "AdaRound by blocks (Q-Diffusion)",
    "efficientdm": "low-rank QAT (EfficientDM)",
    "quest": "QuEST",
}
MADE_BY_FINETUNE = ("calibrated", "adaround", "efficientdm")
FINETUNED = ("efficientdm", "quest")
ADAROUND_ITERATIONS = 500
LOW_RANK = 32
# Samples of an update while rounding is learned (quest_deploy.quantize.adaround, which imports torch).
ADAROUND_BATCH = 32
BRANCHES = 2


def rows_of(recipe: Recipe) -> tuple[str, ...]:
    """The rows that there are at a recipe's bits: Model-Optimizer smooths at 8 bits only, and searches below."""
    left_out = (
        "modelopt-mse" if (recipe.weight_bits, recipe.activation_bits) == (8, 8) else "modelopt-smoothquant"
    )
    return tuple(row for row in ROWS if row != left_out)


def variant(recipe: Recipe, row: str, *, quick: bool = False) -> Recipe:
    """The recipe of a row that `quest-deploy finetune` makes, with the bits of `recipe`.

    "calibrated": scales from percentiles and shrunken ranges of least squared error, weights rounded to nearest.
    "adaround": the same scales, rounding learned block by block.
    "efficientdm": an update of low rank and one activation step for each timestep, learned from the full-precision
    network's own outputs; no phase of its own for the temporal layers, no walks, no own trajectories, no channel rows.
    """
    if row == "calibrated":
        return quality.variant(recipe, row)
    name = f"{recipe.name}-{row}"
    if row == "adaround":
        plain = quality.variant(recipe, "calibrated")
        iterations = (
            2 if quick else max(ADAROUND_ITERATIONS, math.ceil(_training_samples(recipe) / ADAROUND_BATCH))
        )
        return dataclasses.replace(plain, name=name, initializer="adaround", adaround_iterations=iterations)
    return dataclasses.replace(
        recipe,
        name=name,
        initializer="nearest",
        channel_wise=False,
        rotation=None,
        on_policy_prompts=0,
        walk_share=0.0,
        temporal=dataclasses.replace(recipe.temporal, steps=0),
        sensitive=dataclasses.replace(
            recipe.sensitive,
            layers="all",
            low_rank=LOW_RANK,
            # As many samples as QuEST has, in its start, in both phases and with its walks.
            steps=math.ceil(_training_samples(recipe) / (_pairs(recipe, recipe.sensitive) * BRANCHES)),
            batch_size=_pairs(recipe, recipe.sensitive),
        ),
    )


def _network_updates(phase: PhaseConfig) -> int:
    """Updates of a phase that see the network's output."""
    return math.ceil(phase.steps / phase.network_every)


def _training_samples(recipe: Recipe) -> int:
    """Samples of one branch whose gradients `finetune` takes: while rounding is learned, and in both phases."""
    start = recipe.adaround_iterations * ADAROUND_BATCH if recipe.initializer == "adaround" else 0
    updates = ((phase, _network_updates(phase)) for phase in (recipe.temporal, recipe.sensitive))
    return start + sum(count * _pairs(recipe, phase) for phase, count in updates) * BRANCHES


def _pairs(recipe: Recipe, phase: PhaseConfig) -> int:
    """Pairs of a latent and a timestep whose gradients an update takes."""
    walked = phase.walks * recipe.walk_length if recipe.walk_share else 0
    return phase.batch_size + walked


def budget(recipe: Recipe, row: str) -> dict[str, Any]:
    """What a row may look at, as samples of one latent at one timestep.

    Args:
        recipe: The one that the row was made with.
        row: Its name.

    Returns:
        `prompts` and `steps` of the recorded trajectories, `calibration_samples` that went through the network without
        gradients beside recording them, and `training_samples` whose gradients were taken.
    """
    from quest_deploy.quantize.parts import PROMPTS_PER_STEP

    steps = recipe.calibration_steps
    sampled = min(PROMPTS_PER_STEP, recipe.calibration_prompts) * steps * BRANCHES
    looks = 1 if recipe.initializer == "nearest" else 2
    whole = recipe.calibration_prompts * steps * BRANCHES
    # Both networks look at every latent that the quantized one draws.
    own = 2 * recipe.on_policy_prompts * steps * BRANCHES if recipe.sensitive.steps else 0
    made = row in MADE_BY_FINETUNE or row == "quest"
    return {
        "prompts": recipe.calibration_prompts,
        "steps": steps,
        "calibration_samples": looks * sampled + own if made else whole,
        "training_samples": _training_samples(recipe) if made else 0,
    }

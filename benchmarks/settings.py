"""What every benchmark is run with, and where its files lie."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from quest_deploy.config import HELD_OUT_SEED, PhaseConfig, Recipe, to_dict
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize.recipe import PACKAGED, load_recipe

ROOT = Path(__file__).resolve().parent.parent
MODEL = Path("reference-model") / "pipeline"
WORK = Path("artifacts") / "bench"
RESULTS = Path("benchmarks") / "results"
DOCUMENT = Path("docs") / "results.md"
QUICK_PROMPTS, QUICK_STEPS = 3, 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Prompts, schedule and paths (relative to the checkout) of one run.

    Attributes:
        recipes: Packaged recipes, in the order of the tables.
        quick: Whether only to see that everything runs: few prompts, few steps, results outside of the repository.
        checkpoints: Where finetuned checkpoints lie, by recipe; missing ones are made there. None: in `work`.
        steps: Of the model's own scheduler, DDIM.
        guidance_scale: Of classifier-free guidance.
        batch_size: Images at a time.
        seed: Of finetuning.
        noise_seeds: Of the first prompt's noise (prompt `i` has the next but i); every row is drawn from each of them.
            Calibration draws from the seeds 0 to 95 itself.
    """

    recipes: tuple[str, ...] = PACKAGED
    quick: bool = False
    checkpoints: Path | None = None
    steps: int = 25
    guidance_scale: float = 3.0
    batch_size: int = 16
    seed: int = 0
    noise_seeds: tuple[int, ...] = (HELD_OUT_SEED, HELD_OUT_SEED + 64, HELD_OUT_SEED + 128)

    @property
    def work(self) -> Path:
        """What an interrupted benchmark goes on from."""
        return WORK / "quick" if self.quick else WORK

    @property
    def results(self) -> Path:
        """Where the results are written."""
        return self.work / "results" if self.quick else RESULTS

    @property
    def denoising_steps(self) -> int:
        """Steps of every trajectory."""
        return QUICK_STEPS if self.quick else self.steps

    @property
    def prompts(self) -> tuple[str, ...]:
        """The packaged held-out prompts, which no finetuning sees."""
        heldout = load_prompts(default="heldout")
        return heldout[:QUICK_PROMPTS] if self.quick else heldout

    def checkpoint(self, recipe: str) -> Path:
        """The finetuned checkpoint of a recipe."""
        return (self.checkpoints or self.work / "checkpoints") / recipe

    def recipe(self, name: str) -> Recipe:
        """A packaged recipe; in a quick run with next to no finetuning."""
        recipe = load_recipe(name)
        if not self.quick:
            return recipe
        return dataclasses.replace(
            recipe,
            calibration_prompts=3,
            validation_prompts=1,
            calibration_steps=QUICK_STEPS,
            temporal=dataclasses.replace(recipe.temporal, steps=2, batch_size=2),
            sensitive=dataclasses.replace(recipe.sensitive, steps=2, batch_size=2),
        )

    def describe(self) -> dict[str, Any]:
        """For the results."""
        return {
            "model": str(MODEL),
            "recipes": list(self.recipes),
            "prompts": len(self.prompts),
            "steps": self.denoising_steps,
            "guidance_scale": self.guidance_scale,
            "batch_size": self.batch_size,
            "seed": self.seed,
            "noise_seeds": list(self.noise_seeds),
            "quick": self.quick,
        }


def write_recipe(recipe: Recipe, folder: Path) -> Path:
    """`recipe` as the file that `quest-deploy finetune --recipe` reads."""
    path = folder / f"{recipe.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    fields = {key: value for key, value in to_dict(recipe).items() if key != "name"}
    path.write_text(yaml.safe_dump(fields, sort_keys=False), encoding="utf-8")
    return path


def one_update(*, weight_bits: int, batch_size: int) -> Recipe:
    """8-bit activations and one update in each phase: for what codes and kernels are, not pictures."""
    return Recipe(
        name=f"w{weight_bits}a8-one-update",
        weight_bits=weight_bits,
        activation_bits=8,
        calibration_prompts=2,
        validation_prompts=1,
        calibration_steps=2,
        initializer="nearest",
        temporal=PhaseConfig(layers="temporal", steps=1, batch_size=batch_size),
        sensitive=PhaseConfig(layers="all", steps=1, batch_size=batch_size),
    )

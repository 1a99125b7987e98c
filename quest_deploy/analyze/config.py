"""The configuration of an analysis."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import Recipe, are_text, count_of, is_whole, raise_if_any, seeds_fit, whole_at_least
from quest_deploy.errors import ConfigError
from quest_deploy.quantize.allocate import Bits
from quest_deploy.quantize.recipe import recipe_from_dict

ACTIVATION_BITS = ("a4", "a8")
"""Of an input alone, the fewest first."""

DEFAULT_BITS = ("w8", "w4", "a8", "a4", "w8a8", "w4a8", "w8a4", "w4a4")


@dataclass(frozen=True, kw_only=True)
class AnalyzeConfig:
    """What is measured, and on how much.

    Attributes:
        recipe: How layers are quantized, and the bits of the quantized time embedding.
        prompts: Trajectory `i` is that of prompt `i`, from the noise of seed `seed + i`. Empty means what the model's
            kind suggests: the packaged list, every class in turn, or none.
        num_prompts: How many of the prompts are recorded.
        steps: Denoising steps of the recorded trajectories, hence timestep groups.
        sensitivity_prompts: Trajectories that every timestep of the sensitivity takes its latents from.
        sensitivity_steps: How many timesteps, evenly spread, the sensitivity is averaged over.
        bits: What each layer is quantized to on its own, for example "w4" or "w4a8".
        seed: Of noise and of samples.
    """

    recipe: Recipe
    prompts: tuple[str, ...] = ()
    num_prompts: int = 8
    steps: int = 25
    sensitivity_prompts: int = 2
    sensitivity_steps: int = 8
    bits: tuple[str, ...] = DEFAULT_BITS
    seed: int = 0

    def __post_init__(self) -> None:
        problems: list[str] = []
        whole_at_least(problems, 1, num_prompts=self.num_prompts, sensitivity_steps=self.sensitivity_steps)
        whole_at_least(problems, 1, sensitivity_prompts=self.sensitivity_prompts)
        whole_at_least(problems, 2, steps=self.steps)
        number = self.num_prompts if is_whole(self.num_prompts) else 1
        seeds_fit(problems, self.seed, number)
        are_text(problems, "prompt", self.prompts)
        if 0 < count_of(self.prompts) < number:
            problems.append(f"{len(self.prompts)} prompts were given, num_prompts is {self.num_prompts}")
        if not self.bits:
            problems.append("bits is empty, expected for example w4 and a4")
        for name in self.bits:
            try:
                Bits.parse(name)
            except ConfigError as error:
                problems.append(str(error))
        raise_if_any(problems, "analyze")


def recipe_of(checkpoint: Path) -> Recipe:
    """What a checkpoint was made with.

    Raises:
        ArtifactError: it is none.
    """
    return recipe_from_dict(read_artifact(checkpoint, stage="checkpoint").manifest.config["recipe"])

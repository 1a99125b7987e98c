"""Configurations refuse what no stage can use, all of it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from quest_deploy.analyze.config import AnalyzeConfig
from quest_deploy.config import BenchConfig, FinetuneConfig, GenerateConfig, ParityConfig, PhaseConfig, Recipe
from quest_deploy.errors import ConfigError

PHASE = PhaseConfig(layers="all", steps=1)
RECIPE = Recipe(
    name="tiny",
    weight_bits=4,
    activation_bits=8,
    calibration_prompts=3,
    validation_prompts=1,
    temporal=PHASE,
    sensitive=PHASE,
)


def finetune(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig(recipe=RECIPE, **changes)


def analyze(**changes: Any) -> AnalyzeConfig:
    return AnalyzeConfig(recipe=RECIPE, num_prompts=3, **changes)


@pytest.mark.parametrize(
    "make",
    [
        lambda seed: GenerateConfig(seed=seed, num_images=3),
        lambda seed: GenerateConfig(seed=seed, prompts=("a", "b", "c")),
        lambda seed: ParityConfig(seed=seed, num_prompts=3),
        lambda seed: ParityConfig(seed=seed, prompts=("a", "b", "c")),
        lambda seed: finetune(seed=seed),
        lambda seed: analyze(seed=seed),
    ],
    ids=["images", "prompts", "parity", "parity-prompts", "finetune", "analyze"],
)
def test_the_seed_of_the_last_image_fits_in_64_bits(make: Callable[[int], object]) -> None:
    make(2**64 - 3)
    with pytest.raises(ConfigError, match=f"seed is {2**64 - 2}, expected at most {2**64 - 3}"):
        make(2**64 - 2)


@pytest.mark.parametrize("make", [GenerateConfig, ParityConfig, BenchConfig, finetune, analyze])
def test_a_prompt_that_is_no_text_is_refused(make: Callable[..., object]) -> None:
    with pytest.raises(ConfigError, match=r"prompt 'caf\\udce9' is not UTF-8 text"):
        make(prompts=("tea", "caf\udce9", "cocoa"))

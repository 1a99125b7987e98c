"""Configurations refuse what no stage can use, all of it at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from quest_deploy.analyze.config import AnalyzeConfig
from quest_deploy.config import (
    BenchConfig,
    FinetuneConfig,
    GenerateConfig,
    ParityConfig,
    PhaseConfig,
    Recipe,
    RunConfig,
)
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


@pytest.mark.parametrize("make", [GenerateConfig, ParityConfig, BenchConfig, finetune, analyze])
@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("rocket", r"prompts are 'rocket', expected a tuple of texts: \('rocket',\)"),
        ((1, 2), "prompt is 1, expected a text"),
    ],
)
def test_prompts_are_several_texts(make: Callable[..., object], prompts: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(prompts=prompts)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        *((GenerateConfig, field) for field in ("steps", "seed", "num_images", "batch_size")),
        *((ParityConfig, field) for field in ("steps", "seed", "num_prompts", "batch_size")),
        *((BenchConfig, field) for field in ("steps", "runs", "rounds", "warmup", "threads")),
        (finetune, "seed"),
        (analyze, "steps"),
    ],
)
@pytest.mark.parametrize("value", [2.5, "3", None, True])
def test_counts_are_whole_numbers(make: Callable[..., object], field: str, value: object) -> None:
    if (field, value) == ("threads", None):
        return
    with pytest.raises(ConfigError, match=f"{field} is {value!r}, expected a whole number"):
        make(**{field: value})


@pytest.mark.parametrize("height", [64.0, "64", 12, 0])
def test_sizes_are_whole_multiples(height: object) -> None:
    with pytest.raises(ConfigError, match=f"height is {height!r}, expected a positive multiple of 8"):
        GenerateConfig(height=height)  # type: ignore[arg-type]


def test_what_numpy_counts_is_a_whole_number() -> None:
    GenerateConfig(steps=np.int64(3), seed=np.uint8(1), guidance_scale=np.float32(2.0))  # type: ignore[arg-type]


def test_a_negative_prompt_is_a_text() -> None:
    with pytest.raises(ConfigError, match="negative_prompt is None, expected a text"):
        GenerateConfig(negative_prompt=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("much", [-1, 1e300, float("inf"), float("nan"), "much"])
def test_weights_on_the_gpu_are_what_a_gpu_may_hold(much: Any) -> None:
    with pytest.raises(ConfigError, match="gpu_weights_gb is "):
        RunConfig(gpu_weights_gb=much)

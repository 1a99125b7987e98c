"""Every part of a run is told the recipe's memory limit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.config import FinetuneConfig, PhaseConfig
from quest_deploy.errors import ConfigError
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import estimate, finetune
from quest_deploy.quantize.insert import quantizable_layers
from quest_deploy.quantize.memory import GIGABYTE, placeholder
from quest_deploy.quantize.parts import seen_bytes
from tests.quantize.limited_run import CONFIG, RECIPE, limited


@pytest.mark.thorough
def test_a_run_gives_the_limit_to_every_part(
    float_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No part after rounding runs 16 pairs together where the limit has room for a few."""
    at_once: dict[str, int] = {}

    def choose(*args: Any) -> tuple[FinetuneConfig, dict[str, Any]]:
        at_once["choose"] = args[-1]
        return args[5], {}

    def collapse(*args: Any, **options: Any) -> Any:
        at_once["collapse"] = options["at_once"]
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "choose_layers", choose)
    monkeypatch.setattr(finetune, "collapse_groups", collapse)
    auto = PhaseConfig(layers="auto", steps=0)
    recipe = dataclasses.replace(RECIPE, initializer="nearest", collapse_loss_db=0.1, sensitive=auto)
    config = dataclasses.replace(CONFIG, recipe=limited(float_model, 9.5, recipe))
    monkeypatch.setattr(finetune, "asked", lambda recipe: {"sensitive": auto})
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(float_model.path, tmp_path / "out", config)
    assert 1 <= at_once["collapse"] < at_once["choose"] == 9


PHASE = PhaseConfig(layers="all", steps=1, batch_size=1)
# Enough for everything before.
TOO_LITTLE = dataclasses.replace(
    RECIPE, initializer="nearest", sensitive=PHASE, walk_share=0.0, memory_limit_gb=0.0018
)
NEEDED = r"expected at least \S+ for .*set gradient_checkpointing"


def test_a_limit_that_training_cannot_keep_is_told_before_anything_is_recorded(
    float_model: LoadedModel, tmp_path: Path
) -> None:
    """With another limit, what was recorded and rounded until then could not be gone on with."""
    with pytest.raises(ConfigError, match=NEEDED):
        finetune.finetune(float_model.path, tmp_path / "out", dataclasses.replace(CONFIG, recipe=TOO_LITTLE))
    assert not list(tmp_path.glob(".out.finetune/*"))


@pytest.mark.thorough
def test_a_limit_that_adaround_cannot_keep_is_told_before_anything_is_recorded(
    float_model: LoadedModel, tmp_path: Path
) -> None:
    """It has room for all before."""
    recipe = dataclasses.replace(RECIPE, initializer="adaround")
    layers = list(quantizable_layers(float_model.denoiser))
    seen = seen_bytes(float_model, placeholder(float_model, CONFIG), layers)
    limit_gb = limited(float_model, 1.5, recipe).memory_limit_gb
    assert limit_gb is not None
    little = dataclasses.replace(recipe, memory_limit_gb=limit_gb + seen / GIGABYTE)
    with pytest.raises(ConfigError, match=r"expected at least \S+ for"):
        finetune.finetune(float_model.path, tmp_path / "out", dataclasses.replace(CONFIG, recipe=little))
    assert not list(tmp_path.glob(".out.finetune/*"))


def test_what_was_checked_is_not_checked_again_by_resume(
    float_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[object] = []

    def record(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(finetune, "check_limit", lambda *args: checked.append(args))
    monkeypatch.setattr(finetune, "record", record)
    for resume in (False, True):
        with pytest.raises(KeyboardInterrupt):
            finetune.finetune(float_model.path, tmp_path / "out", CONFIG, resume=resume)
        assert len(checked) == 1


@pytest.mark.thorough
def test_a_limit_that_training_cannot_keep_is_told_by_a_dry_run(
    float_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = estimate.Speed(forward_s=0.0, judged_s=0.0, update_s=1.0, more_s=0.0, measured=True)
    monkeypatch.setattr(estimate, "measure_speed", lambda *args: speed)
    with pytest.raises(ConfigError, match=NEEDED):
        estimate.estimate(float_model.path, dataclasses.replace(CONFIG, recipe=TOO_LITTLE))

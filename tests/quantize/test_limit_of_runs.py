"""Every part of a run is told the recipe's memory limit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.config import FinetuneConfig, PhaseConfig, Recipe
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import finetune
from quest_deploy.quantize.memory import GIGABYTE, forward_memory, held_bytes, placeholder


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
    recipe = Recipe(
        name="limited",
        weight_bits=4,
        activation_bits=8,
        calibration_prompts=8,
        validation_prompts=1,
        calibration_steps=2,
        initializer="nearest",
        collapse_loss_db=0.1,
        temporal=dataclasses.replace(auto, layers="none"),
        sensitive=auto,
    )
    config = FinetuneConfig(recipe=recipe, prompts=tuple("abcdefgh"))
    data = placeholder(float_model, config)
    each = forward_memory(float_model.denoiser, data)
    needed = held_bytes(float_model, data, recipe) + each.fixed + 9.5 * each.each
    recipe = dataclasses.replace(recipe, memory_limit_gb=needed / GIGABYTE)
    monkeypatch.setattr(finetune, "asked", lambda recipe: {"sensitive": auto})
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(float_model.path, tmp_path / "out", dataclasses.replace(config, recipe=recipe))
    assert 1 <= at_once["collapse"] < at_once["choose"] == 9

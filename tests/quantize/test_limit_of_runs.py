"""Every part of a run is told the recipe's memory limit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.config import FinetuneConfig, PhaseConfig
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import finetune
from tests.quantize.limited_run import CONFIG, RECIPE, limited


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

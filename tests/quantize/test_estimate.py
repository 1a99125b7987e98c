"""What a run will take: counted without writing anything."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from quest_deploy.config import FinetuneConfig
from quest_deploy.quantize import estimate as module
from quest_deploy.quantize.estimate import PartEstimate, Speed, estimate
from quest_deploy.quantize.recipe import load_recipe


@pytest.fixture(scope="module")
def config(tiny_recipe: Path) -> FinetuneConfig:
    return FinetuneConfig(recipe=load_recipe(str(tiny_recipe)), prompts=("rocket", "pizza"))


@pytest.fixture(scope="module")
def found(tiny_model: Path, config: FinetuneConfig) -> tuple[list[PartEstimate], Speed]:
    return estimate(tiny_model, config)


def test_every_part_has_time_memory_and_disk(found: tuple[list[PartEstimate], Speed]) -> None:
    parts = {part.part: part for part in found[0]}
    assert list(parts) == [
        "record trajectories",
        "collect activations",
        "search scales",
        "round weights",
        "finetune temporal layers",
        "finetune sensitive layers",
        "write checkpoint",
    ]
    assert all(part.memory_bytes > 0 for part in parts.values())
    assert all(part.seconds > 0 for name, part in parts.items() if name != "write checkpoint")


def test_the_checkpoint_has_the_size_that_was_told(
    found: tuple[list[PartEstimate], Speed], tiny_checkpoint: Path
) -> None:
    size = sum(path.stat().st_size for path in tiny_checkpoint.rglob("*.safetensors"))
    # A model this small is mostly the headers of its files.
    assert found[0][-1].disk_bytes == pytest.approx(size, rel=0.25)


@pytest.mark.thorough
def test_what_would_take_long_is_counted(
    tiny_model: Path, config: FinetuneConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST_MEASUREMENT_S", 0.0)
    monkeypatch.setattr(module, "_products_per_second", lambda device: 1e6)
    recipe = dataclasses.replace(config.recipe, memory_limit_gb=0.5, initializer="nearest")
    parts, speed = estimate(tiny_model, dataclasses.replace(config, recipe=recipe))
    assert not speed.measured
    assert speed.update_s == 3 * speed.forward_s > 0
    assert max(part.memory_bytes for part in parts if "finetune" in part.part) <= 5e8

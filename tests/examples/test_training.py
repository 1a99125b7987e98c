"""The examples' training loop: what was interrupted ends as if it had not been."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

STEPS = 40


@pytest.fixture(scope="module")
def training(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("training", repository / "examples" / "training.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 1)


def loss(module: nn.Module, generator: torch.Generator) -> Tensor:
    x = torch.randn(16, 4, generator=generator)
    return (module(x) - x.sum(dim=1, keepdim=True)).square().mean()


def plan(training: ModuleType, path: Path, seconds: float = 60.0) -> object:
    return training.Plan(state=path, steps=STEPS, deadline=time.monotonic() + seconds, learning_rate=0.1)


def test_a_killed_training_ends_in_the_weights_of_one_that_was_not(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = model()
    seen = training.train(whole, lambda g: loss(whole, g), plan(training, tmp_path / "whole"), "line")

    monkeypatch.setattr(training, "SAVE_EVERY_SECONDS", 0.0)
    killed, calls = model(), iter(range(STEPS))

    def until_killed(generator: torch.Generator) -> Tensor:
        if next(calls) == 17:
            raise KeyboardInterrupt
        return loss(killed, generator)

    with pytest.raises(KeyboardInterrupt):
        training.train(killed, until_killed, plan(training, tmp_path / "state"), "line")
    again = model()
    history = training.train(again, lambda g: loss(again, g), plan(training, tmp_path / "state"), "line")
    assert torch.equal(again.weight, whole.weight) and torch.equal(again.bias, whole.bias)
    assert history.losses == seen.losses and history.step == STEPS


def test_an_output_that_nothing_can_be_written_to_is_told_before_training(
    training: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="is a file; give a directory"):
        training.state_beside(tmp_path / "file", "training")
    monkeypatch.chdir(tmp_path)
    assert training.state_beside(Path(), "training") == tmp_path.with_name(f".{tmp_path.name}.training")


def test_no_steps_are_refused(training: ModuleType, tmp_path: Path) -> None:
    """They left random weights, and "finished"."""
    module = model()
    nothing = dataclasses.replace(plan(training, tmp_path / "state"), steps=0)
    with pytest.raises(SystemExit, match="got 0 steps, expected 1 or more"):
        training.train(module, lambda g: loss(module, g), nothing, "line")


def test_losses_are_recorded_and_fall(training: ModuleType, tmp_path: Path) -> None:
    module = model()
    history = training.train(module, lambda g: loss(module, g), plan(training, tmp_path / "state"), "all")
    losses = [value for _, value in history.losses]
    assert len(losses) == training.RECORDS and losses[-1] < 0.1 * losses[0]
    assert history.record(STEPS)["steps"] == history.record(STEPS)["of"] == STEPS


def test_a_training_without_time_makes_no_step(training: ModuleType, tmp_path: Path) -> None:
    module = model()
    before = module.weight.clone()
    history = training.train(module, lambda g: loss(module, g), plan(training, tmp_path / "s", 0.0), "none")
    assert history.step == 0 and torch.equal(module.weight, before)
    # A state says that training has begun: the emoji's autoencoder stays as it is once there is one of the U-Net.
    assert not (tmp_path / "s").exists()


def test_a_state_of_something_else_is_refused(training: ModuleType, tmp_path: Path) -> None:
    module = model()
    training.train(module, lambda g: loss(module, g), plan(training, tmp_path / "state"), "unconditional")
    with pytest.raises(SystemExit, match="is the state of unconditional, expected class-conditional; give"):
        training.train(
            module, lambda g: loss(module, g), plan(training, tmp_path / "state"), "class-conditional"
        )


@pytest.mark.parametrize("change", [{"steps": 7}, {"seed": 5}, {"learning_rate": 0.2}])
def test_a_state_of_another_plan_is_refused(
    training: ModuleType, tmp_path: Path, change: dict[str, float]
) -> None:
    """Its cosine, or its numbers, would be another's from there on."""
    module, before = model(), plan(training, tmp_path / "state")
    training.train(module, lambda g: loss(module, g), before, "line")
    other = dataclasses.replace(before, **change)
    with pytest.raises(SystemExit, match=f"is of a run with {min(change)} .*; give the same"):
        training.train(module, lambda g: loss(module, g), other, "line")
    longer = dataclasses.replace(before, deadline=before.deadline + 1)
    assert training.train(module, lambda g: loss(module, g), longer, "line").step == before.steps

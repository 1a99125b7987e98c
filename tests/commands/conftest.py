"""Artifacts made from the tiny model by the verbs, and copies of them to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from quest_deploy.commands import main


def make(*arguments: object) -> None:
    """Run a verb that has to succeed."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that takes a second: it has to make a checkpoint, not a good one."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.yaml"
    phase = "{layers: all, steps: 2, batch_size: 1}"
    path.write_text(
        "weight_bits: 4\nactivation_bits: 8\ncalibration_prompts: 2\nvalidation_prompts: 1\n"
        f"calibration_steps: 2\ntemporal: {phase}\nsensitive: {phase}\n"
    )
    return path


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_recipe: Path) -> Path:
    """The tiny model, quantized."""
    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    make("finetune", tiny_model, "-o", path, "--recipe", tiny_recipe)
    return path


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy of the tiny model, to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "in" / "model")

"""A small analysis of the tiny model and its checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.analyze import figures
from quest_deploy.analyze.config import AnalyzeConfig
from quest_deploy.analyze.stage import analyze
from quest_deploy.files import read_json
from quest_deploy.quantize.recipe import load_recipe


@contextmanager
def undrawn_plots() -> Iterator[None]:
    """Figures are made, but not drawn, which takes longer than everything else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "to_svg", lambda figure: "<svg/>")
        yield


@pytest.fixture
def quick_plots() -> Iterator[None]:
    """For one test, see `undrawn_plots`."""
    with undrawn_plots():
        yield


@pytest.fixture(scope="session")
def analyze_config(tiny_recipe: Path) -> AnalyzeConfig:
    """Two trajectories of two steps, weights at 4 and activations at 8 bits."""
    return AnalyzeConfig(
        recipe=load_recipe(str(tiny_recipe)),
        prompts=("rocket", "pizza", "moon"),
        num_prompts=2,
        steps=2,
        sensitivity_prompts=1,
        sensitivity_steps=2,
        bits=("W4", "w8", "a8", "w8"),  # 8 for both ends of the network
    )


@pytest.fixture(scope="session")
def analysis(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    tiny_checkpoint: Path,
    analyze_config: AnalyzeConfig,
) -> Path:
    """The artifact."""
    path = tmp_path_factory.mktemp("analysis") / "analysis"
    with undrawn_plots():
        analyze(tiny_model, path, analyze_config, checkpoint=tiny_checkpoint)
    return path


@pytest.fixture(scope="session")
def document(analysis: Path) -> dict[str, Any]:
    """Its content."""
    content: dict[str, Any] = read_json(analysis / "analysis.json")
    return content

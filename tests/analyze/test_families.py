"""Models that read no text: class-conditional and unconditional ones are analyzed like any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.analyze.config import AnalyzeConfig
from quest_deploy.analyze.stage import analyze
from quest_deploy.errors import ConfigError
from quest_deploy.files import read_json
from tests.families.models import save_model
from tests.families.text_models import save_text_model

KINDS = {"unconditional": "ddpm", "class-conditional": "dit"}


@pytest.mark.parametrize("kind", KINDS)
def test_model_that_reads_no_text_is_analyzed(
    kind: str, tmp_path: Path, analyze_config: AnalyzeConfig, quick_plots: None
) -> None:
    save_model(KINDS[kind], tmp_path / "model")
    recipe = dataclasses.replace(analyze_config.recipe, split=True)
    config = dataclasses.replace(analyze_config, recipe=recipe, prompts=(), bits=("a4",))
    result: dict[str, Any] = read_json(
        analyze(tmp_path / "model", tmp_path / "out", config).path / "analysis.json"
    )
    roles = {layer["name"]: layer["role"] for layer in result["sensitivity"]["layers"]}
    assert roles[result["temporal"]["embedding"]] == "temporal"
    assert set(result["temporal"]["start"]["layers"]) == {
        name for name, role in roles.items() if role == "temporal"
    }
    # A transformer has no skip connections to split.
    assert any(name.endswith(".first") for name in roles) == (kind == "unconditional")
    harmed = [layer["damage"]["a4"]["relative_error"] > 0 for layer in result["sensitivity"]["layers"]]
    assert sum(harmed) > 0.9 * len(harmed)


def test_prompt_that_is_no_class_is_refused(tmp_path: Path, analyze_config: AnalyzeConfig) -> None:
    save_model("dit", tmp_path / "model")
    with pytest.raises(ConfigError, match="is no class of this model"):
        analyze(tmp_path / "model", tmp_path / "out", analyze_config)


def test_layers_that_the_timestep_does_not_reach_are_analyzed_too(
    tmp_path: Path, analyze_config: AnalyzeConfig, quick_plots: None
) -> None:
    """PixArt embeds the size of an image in layers that run twice for each, and never hear of the timestep."""
    save_text_model("pixart-sized", tmp_path / "model")
    result: dict[str, Any] = read_json(
        analyze(tmp_path / "model", tmp_path / "out", analyze_config).path / "analysis.json"
    )
    damage = {layer["name"]: layer["damage"] for layer in result["sensitivity"]["layers"]}
    sizes = [name for name in damage if "resolution_embedder" in name]
    assert sizes and all(damage[name]["a8"]["relative_error"] > 0 for name in sizes)

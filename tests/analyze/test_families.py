"""Models that read no text: class-conditional and unconditional ones are analyzed like any other."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from quest_deploy.analyze.config import AnalyzeConfig
from quest_deploy.analyze.stage import analyze
from quest_deploy.errors import ConfigError
from quest_deploy.files import read_json
from tests.families.models import shaken


def unconditional(folder: Path) -> None:
    """Pixels, no guidance."""
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
        add_attention=False,
    )
    DDPMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(folder)


def class_conditional(folder: Path) -> None:
    """A transformer with learned variance, whose time embedding depends on the class."""
    from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=3,
        norm_num_groups=1,
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    DiTPipeline(transformer=shaken(transformer), vae=vae, scheduler=DDIMScheduler()).save_pretrained(folder)


MODELS = {"unconditional": unconditional, "class-conditional": class_conditional}


@pytest.mark.parametrize("kind", MODELS)
def test_model_that_reads_no_text_is_analyzed(
    kind: str, tmp_path: Path, analyze_config: AnalyzeConfig, quick_plots: None
) -> None:
    torch.manual_seed(0)
    MODELS[kind](tmp_path / "model")
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
    class_conditional(tmp_path / "model")
    with pytest.raises(ConfigError, match="is no class of this model"):
        analyze(tmp_path / "model", tmp_path / "out", analyze_config)

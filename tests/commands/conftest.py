"""A model small enough to run every verb on, and artifacts made from it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from quest_deploy.commands import main


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, reference_model: Path) -> Path:
    """The reference model's architecture with a few thousand random weights."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    text = json.loads((reference_model / "text_encoder" / "config.json").read_text())
    text |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=16,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )
    pipeline = StableDiffusionPipeline(
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)),
        tokenizer=CLIPTokenizer.from_pretrained(reference_model / "tokenizer"),
        unet=unet,
        vae=vae,
        scheduler=DDIMScheduler.from_pretrained(reference_model / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    path = tmp_path_factory.mktemp("tiny") / "model"
    pipeline.save_pretrained(path)
    return path


def make(*arguments: object) -> None:
    """Run a verb that has to succeed."""
    done = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.stderr


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model as ONNX, in full precision."""
    path = tmp_path_factory.mktemp("tiny") / "onnx"
    make("export", tiny_model, "-o", path)
    return path


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

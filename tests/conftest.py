"""Fixtures and settings that every test shares."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path

# Before torch or ONNX Runtime are imported: two threads are as fast as many on models this small, and give the same
# bits on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
# A shell starts background jobs with SIGINT ignored, which children would inherit and tests of Ctrl-C would miss.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def reference_model() -> Path:
    """The bundled diffusers pipeline."""
    return ROOT / "reference-model" / "pipeline"


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


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model as ONNX, in full precision."""
    from quest_deploy.config import ExportConfig
    from quest_deploy.export.to_onnx import export

    path = tmp_path_factory.mktemp("tiny") / "onnx"
    export(tiny_model, path, ExportConfig(mode="none"))
    return path


@pytest.fixture(scope="session")
def tiny_recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A W4A8 recipe that takes seconds: it has to make a checkpoint, not a good one."""
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
    from quest_deploy.config import FinetuneConfig
    from quest_deploy.quantize.finetune import finetune
    from quest_deploy.quantize.recipe import load_recipe

    path = tmp_path_factory.mktemp("tiny") / "checkpoint"
    finetune(
        tiny_model, path, FinetuneConfig(recipe=load_recipe(str(tiny_recipe)), prompts=("rocket", "pizza"))
    )
    return path


@pytest.fixture(scope="session")
def table_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_recipe: Path) -> Path:
    """The tiny model, quantized, its time path in tables."""
    from quest_deploy.config import FinetuneConfig
    from quest_deploy.quantize.finetune import finetune
    from quest_deploy.quantize.recipe import load_recipe

    path = tmp_path_factory.mktemp("tiny") / "table"
    recipe = dataclasses.replace(load_recipe(str(tiny_recipe)), temporal_path="table")
    finetune(tiny_model, path, FinetuneConfig(recipe=recipe, prompts=("rocket", "pizza")))
    return path


@pytest.fixture(scope="session")
def lora_checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_recipe: Path) -> Path:
    """The tiny model, quantized with a LoRA whose change of the noise prediction is larger than the prediction."""
    pytest.importorskip("peft", reason="needs the extra lora")
    from safetensors.torch import save_file

    from quest_deploy.config import FinetuneConfig, LoraConfig
    from quest_deploy.model.load import load_model
    from quest_deploy.quantize.finetune import finetune
    from quest_deploy.quantize.recipe import load_recipe

    folder = tmp_path_factory.mktemp("lora")
    torch.manual_seed(0)
    tensors = {}
    for name, layer in load_model(tiny_model).denoiser.named_modules():
        if name.endswith(("to_v", "to_out.0")):
            tensors[f"unet.{name}.lora_A.weight"] = torch.randn(2, layer.in_features)
            tensors[f"unet.{name}.lora_B.weight"] = torch.randn(layer.out_features, 2)
    save_file(tensors, folder / "style.safetensors")
    config = FinetuneConfig(
        recipe=load_recipe(str(tiny_recipe)),
        prompts=("rocket", "pizza"),
        loras=(LoraConfig(file=str(folder / "style.safetensors"), scale=0.7),),
    )
    finetune(tiny_model, folder / "checkpoint", config)
    return folder / "checkpoint"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)

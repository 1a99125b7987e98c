"""Write a model of the size and architecture of Stable Diffusion XL with random weights in fp16.

    python -m scripts.random_model DIR

Its U-Net has 2.6 billion parameters. The text encoders have one layer each (their width is real, so that the U-Net's
inputs are), the vocabulary is the bundled model's, and the autoencoder is of the real size.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, EulerDiscreteScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "reference-model" / "pipeline" / "tokenizer"
STANDARD_DEVIATION = 0.02
SHARD_SIZE = "2GB"
UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "sample_size": 1024,
    "scaling_factor": 0.13025,
    "force_upcast": True,
}
WIDTHS = {"text_encoder": 768, "text_encoder_2": 1280}


def text_config(width: int) -> CLIPTextConfig:
    """One layer of the real width, for the bundled tokenizer."""
    vocabulary = json.loads((TOKENIZER / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    size = len(vocabulary)
    settings = json.loads((TOKENIZER / "tokenizer_config.json").read_text(encoding="utf-8"))
    return CLIPTextConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=1,
        num_attention_heads=width // 64,
        projection_dim=1280,
        max_position_embeddings=settings["model_max_length"],
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )


@torch.no_grad()
def filled(module: nn.Module, seed: int) -> nn.Module:
    """A module on "meta" with random weights, in fp16; norms scale by 1, biases are 0."""
    module.half().to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=STANDARD_DEVIATION, generator=generator)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
    return module


def write(folder: Path) -> None:
    """Write the model."""
    classes = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    for seed, (name, kind) in enumerate(classes.items()):
        # Small: its buffers are made as usual.
        torch.manual_seed(seed)
        kind(text_config(WIDTHS[name])).half().save_pretrained(folder / name)
    for name in ("tokenizer", "tokenizer_2"):
        shutil.copytree(TOKENIZER, folder / name)
    with init_empty_weights():
        vae, unet = AutoencoderKL(**VAE), UNet2DConditionModel(**UNET)
    filled(vae, 2).save_pretrained(folder / "vae", max_shard_size=SHARD_SIZE)
    filled(unet, 3).save_pretrained(folder / "unet", max_shard_size=SHARD_SIZE)
    EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
    ).save_pretrained(folder / "scheduler")
    parts = {name: ["transformers", kind.__name__] for name, kind in classes.items()}
    parts |= {name: ["transformers", "CLIPTokenizer"] for name in ("tokenizer", "tokenizer_2")}
    parts |= {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    }
    index = {"_class_name": "StableDiffusionXLPipeline", "force_zeros_for_empty_prompt": True, **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]))

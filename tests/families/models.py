"""A model of every kind that draws without text, with a few thousand random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.families.text_parts import VAE, shaken, vae

CLASSES = {"0": "zero, nought", "1": "one", "2": "two"}
UNET = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


def dit() -> Any:
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=3,
    )
    return DiTPipeline(transformer=shaken(transformer), vae=vae(), scheduler=DDIMScheduler())


def class_unet() -> Any:
    from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel

    unet = UNet2DModel(
        in_channels=1,
        out_channels=1,
        sample_size=16,
        num_class_embeds=4,
        resnet_time_scale_shift="scale_shift",
        **UNET,
    )
    return DDPMPipeline(unet=shaken(unet), scheduler=DDIMScheduler(prediction_type="v_prediction"))


def ldm() -> Any:
    from diffusers import DDIMScheduler, LDMPipeline, UNet2DModel, VQModel

    unet = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, **UNET)
    vqvae = VQModel(num_vq_embeddings=32, **(VAE | {"latent_channels": 3}))
    return LDMPipeline(vqvae=vqvae, unet=shaken(unet), scheduler=DDIMScheduler(clip_sample=False))


def ddpm() -> Any:
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = UNet2DModel(sample_size=16, in_channels=3, out_channels=3, **UNET)
    return DDPMPipeline(unet=shaken(unet), scheduler=DDPMScheduler())


MAKERS: dict[str, Callable[[], Any]] = {"dit": dit, "class-unet": class_unet, "ldm": ldm, "ddpm": ddpm}
CONDITIONAL = ("dit", "class-unet")


def save_model(kind: str, path: Path) -> Path:
    """Write the model of that kind to `path`."""
    torch.manual_seed(0)
    MAKERS[kind]().save_pretrained(path)
    if kind in CONDITIONAL:
        index = path / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": CLASSES}))
    return path

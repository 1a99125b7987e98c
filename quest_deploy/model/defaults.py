"""What a field is that a component's configuration leaves out: the default of the class that reads it.

Files need not name every field: those of Stable Diffusion 1.x are older than the autoencoder's ``scaling_factor``. The
classes themselves are not asked, since a configuration is read where torch is not imported. Fields whose default is
None are not listed, nor those that nothing here reads. Values are those of diffusers 0.42 and transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_UNET_WIDTHS = (320, 640, 1280, 1280)
_RENAMED = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}

DIFFUSERS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "AutoencoderKL": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (64,),
        "latent_channels": 4,
        "scaling_factor": 0.18215,
    },
    "VQModel": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (64,),
        "latent_channels": 3,
        "scaling_factor": 0.18215,
    },
    "AutoencoderDC": {
        "in_channels": 3,
        "latent_channels": 32,
        "attention_head_dim": 32,
        "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
        "scaling_factor": 1.0,
    },
    "AutoencoderTiny": {
        "in_channels": 3,
        "out_channels": 3,
        "encoder_block_out_channels": (64, 64, 64, 64),
        "latent_channels": 4,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
    },
    "UNet2DConditionModel": {
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": _UNET_WIDTHS,
        "layers_per_block": 2,
        "cross_attention_dim": 1280,
    },
    "UNet2DModel": {
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (224, 448, 672, 896),
    },
    "ControlNetModel": {
        "in_channels": 4,
        "conditioning_channels": 3,
        "block_out_channels": _UNET_WIDTHS,
        "layers_per_block": 2,
        "cross_attention_dim": 1280,
        "conditioning_embedding_out_channels": (16, 32, 96, 256),
    },
    "DiTTransformer2DModel": {
        "in_channels": 4,
        "sample_size": 32,
        "patch_size": 2,
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_zero",
    },
    "PixArtTransformer2DModel": {
        "in_channels": 4,
        "out_channels": 8,
        "sample_size": 128,
        "patch_size": 2,
        "cross_attention_dim": 1152,
    },
    "SD3Transformer2DModel": {
        "in_channels": 16,
        "out_channels": 16,
        "sample_size": 128,
        "patch_size": 2,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 96,
    },
    "SanaTransformer2DModel": {
        "in_channels": 32,
        "out_channels": 32,
        "sample_size": 32,
        "patch_size": 1,
        "caption_channels": 2304,
    },
    "FluxTransformer2DModel": {
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "axes_dims_rope": (16, 56, 56),
    },
}
"""By class, then by field."""

TRANSFORMERS_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip": {
        "hidden_size": 512,
        "max_position_embeddings": 77,
        "num_hidden_layers": 12,
        "projection_dim": 512,
    },
    "t5": {"d_model": 512},
    "gemma": {"hidden_size": 2304, "num_hidden_layers": 26},
}
"""By kind of text encoder, then by field."""


def class_read_by(kind: object, config: Mapping[str, Any]) -> str:
    """The class that diffusers makes for a configuration of the class `kind`.

    DiT and PixArt were one class at first, and models on the hub still say so; their norms tell them apart.
    """
    return (
        _RENAMED.get(str(config.get("norm_type")), str(kind)) if kind == "Transformer2DModel" else str(kind)
    )

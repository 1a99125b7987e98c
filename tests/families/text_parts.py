"""Tokenizers, text encoders, autoencoders and schedulers of tiny models, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

TOKENIZER = Path(__file__).parents[2] / "reference-model" / "pipeline" / "tokenizer"
HIDDEN, PROJECTED = 16, 12
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "mid_block_add_attention": False,
}


def shaken(module: nn.Module) -> Any:
    """`module` with no parameter left at zero: a fresh transformer would ignore whatever it is given."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return module


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(TOKENIZER)


def clip(*, projection: bool = False) -> Any:
    """A CLIP text model that reads what the reference model's tokenizer writes."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=tokenizer.model_max_length,
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        projection_dim=PROJECTED,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return shaken((CLIPTextModelWithProjection if projection else CLIPTextModel)(config))


def vae(**changes: Any) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(**(VAE | changes))


def euler() -> Any:
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, steps_offset=1
    )


def t5_tokenizer() -> Any:
    """A unigram tokenizer that knows letters and a few words."""
    from transformers import T5Tokenizer

    words = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789", "▁a", "▁red", "heart", "rocket", "pizza"]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(
        vocab=[*special, *((word, -2.0 - len(word) % 3) for word in words)], extra_ids=0, model_max_length=512
    )


def t5(width: int = HIDDEN) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(t5_tokenizer()),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return shaken(T5EncoderModel(config))


def flow(**changes: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**changes)


def gemma_tokenizer() -> Any:
    """A tokenizer of letters and bytes."""
    from transformers import GemmaTokenizer

    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz0123456789"]
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    return GemmaTokenizer(vocab={token: index for index, token in enumerate([*special, *letters])}, merges=[])

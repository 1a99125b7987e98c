"""Latents as tokens, where a denoiser takes them packed: FLUX, whose tokens are squares of 2x2 latents.

The denoising loop, calibration and parity have latents [b, c, h, w]; they are packed where the denoiser is called.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quest_deploy.model.denoisers import SIDE

AXES = 3


def pack(latents: Tensor) -> Tensor:
    """Latents [b, c, h, w] -> tokens [b, h/2 w/2, 4 c], row by row."""
    batch, channels, height, width = latents.shape
    squares = latents.view(batch, channels, height // SIDE, SIDE, width // SIDE, SIDE)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(batch, (height // SIDE) * (width // SIDE), -1)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack` for latents of that size."""
    batch, _, channels = tokens.shape
    squares = tokens.view(batch, height // SIDE, width // SIDE, channels // SIDE**2, SIDE, SIDE)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels // SIDE**2, height, width)


def positions(latents: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Where each token is, by input name: `txt_ids` [l, 3], all zero, and `img_ids` [h/2 w/2, 3], row and column.

    Args:
        latents: [b, c, h, w].
        text: Embeddings, [b, l, d].
    """
    height, width = (side // SIDE for side in latents.shape[-2:])
    image = torch.zeros(height, width, AXES)
    image[..., 1] = torch.arange(height)[:, None]
    image[..., 2] = torch.arange(width)[None, :]
    return {
        "txt_ids": torch.zeros(text.shape[1], AXES, device=latents.device),
        "img_ids": image.reshape(height * width, AXES).to(latents.device),
    }

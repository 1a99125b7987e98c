"""What a denoiser is told of the image that is drawn: its size, and how strongly to follow the prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quest_deploy.model.tensors import TensorSpec

# What diffusers tells the refiner of Stable Diffusion XL by default.
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5
GUIDANCE_TIMESCALE = 1000.0
MAX_PERIOD = 10000.0


@dataclass(frozen=True, kw_only=True)
class ImageRequest:
    """One image, as the denoiser is told of it.

    Attributes:
        height: In pixels.
        width: In pixels.
        guidance_scale: For models with an input for it.
        negative: Whether this is for the negative branch.
    """

    height: int
    width: int
    guidance_scale: float
    negative: bool = False


def time_ids(request: ImageRequest, tensor: TensorSpec) -> Tensor:
    """[1, 6]: original size, crop and target size; [1, 5]: original size, crop and aesthetic score."""
    size = [request.height, request.width]
    score = NEGATIVE_AESTHETIC_SCORE if request.negative else AESTHETIC_SCORE
    ends = [score] if tensor.shape[-1] == 5 else size
    return torch.tensor([[*size, 0, 0, *ends]], dtype=torch.float32)


def timestep_cond(request: ImageRequest, tensor: TensorSpec) -> Tensor:
    """[1, d]: sines and cosines of the guidance scale, which latent consistency models were distilled with.

    Operations and their order are those of `get_guidance_scale_embedding` of diffusers.
    """
    size = int(tensor.shape[-1])
    scale = torch.tensor(request.guidance_scale - 1).repeat(1) * GUIDANCE_TIMESCALE
    half = size // 2
    step = torch.log(torch.tensor(MAX_PERIOD)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -step)
    angle = scale.to(torch.float32)[:, None] * frequencies[None, :]
    embedding = torch.cat([torch.sin(angle), torch.cos(angle)], dim=1)
    return torch.nn.functional.pad(embedding, (0, size % 2))


def guidance(request: ImageRequest, tensor: TensorSpec) -> Tensor:
    """[1]: the guidance scale itself."""
    return torch.full([1], request.guidance_scale, dtype=torch.float32)


def resolution(request: ImageRequest, tensor: TensorSpec) -> Tensor:
    """[1, 2]: height and width."""
    return torch.tensor([[request.height, request.width]], dtype=torch.float32)


def aspect_ratio(request: ImageRequest, tensor: TensorSpec) -> Tensor:
    """[1, 1]: height over width."""
    return torch.tensor([[request.height / request.width]], dtype=torch.float32)


def everything_masked(latents: Tensor) -> Tensor:
    """A mask of ones and latents of zeros, [1, 1 + c, h, w], for `latents` [n, c, h, w]: nothing is there yet."""
    mask = torch.ones(1, 1, *latents.shape[-2:])
    return torch.cat([mask, torch.zeros(1, *latents.shape[1:])], dim=1)


REQUEST_INPUTS: dict[str, Callable[[ImageRequest, TensorSpec], Tensor]] = {
    "time_ids": time_ids,
    "timestep_cond": timestep_cond,
    "guidance": guidance,
    "resolution": resolution,
    "aspect_ratio": aspect_ratio,
}
"""How each such input is filled, [1, ...], by its name."""

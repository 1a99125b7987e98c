"""Pictures for calibrating models that look at some: inpainting models and ControlNets.

Users show them all kinds. Here a model sees its own: each prompt is drawn once without a picture, and then recorded
with one that is made of what was drawn, so that nothing but the model is needed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from quest_deploy.model.components import MASKED, VaeDecoder, VaeEncoder, first_device, scaled, unscaled
from quest_deploy.model.denoisers import CONTROL
from quest_deploy.model.load import LoadedModel

PICTURES = (MASKED, CONTROL)
"""Inputs that show a picture: the same for both guidance branches."""
LEAST_SIDE = 0.25
EDGES = 0.1


def sees_pictures(model: LoadedModel) -> bool:
    """Whether the denoiser is told of a picture beside the prompt."""
    if model.controlnet is not None or not model.family.reads_images:
        return model.controlnet is not None
    return int(model.denoiser_spec.inputs[0].shape[1]) > model.latent_shape[0]


def without_pictures(told: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a branch is told, less the pictures."""
    return {name: value for name, value in told.items() if name not in PICTURES}


@torch.no_grad()
def pictures(model: LoadedModel, latents: Tensor, seeds: Sequence[int]) -> dict[str, Tensor]:
    """What the denoiser, or the ControlNet before it, is shown, [n, ...] by input name.

    Args:
        model: One that :func:`sees_pictures`.
        latents: Of the pictures, float32 [n, c, h, w].
        seeds: n of them: what is shown of a picture depends on its own alone.
    """
    vae: Any = model.vae
    drawn = VaeDecoder(vae)(unscaled(vae.config, latents.to(first_device(vae))))[0].clamp(-1, 1)
    if model.controlnet is None:
        masks = torch.stack([random_mask(latents.shape[-2:], seed) for seed in seeds])
        kept = drawn * (1 - F.interpolate(masks, size=drawn.shape[-2:])).to(drawn)
        found = VaeEncoder(vae)(kept)[0].chunk(2, dim=1)[0]
        return {MASKED: torch.cat([masks, scaled(vae.config, found).cpu()], dim=1)}
    shape = control_shape(model, latents.shape[-2:])
    whole = F.interpolate(drawn.cpu() / 2 + 0.5, size=shape[1:], mode="bilinear", antialias=True).clamp(0, 1)
    # ControlNets read lines (edges, poses) or whole pictures (depth, tiles): every other one is of each kind.
    shown = torch.stack([edges(one) if seed % 2 else one for one, seed in zip(whole, seeds, strict=True)])
    if shape[0] != shown.shape[1]:
        shown = shown.mean(dim=1, keepdim=True).expand(-1, shape[0], -1, -1)
    return {CONTROL: shown.contiguous()}


def random_mask(size: Sequence[int], seed: int) -> Tensor:
    """A box of ones on zeros, float32 [1, h, w], each side from a quarter to all of it; one in four is all ones."""
    if seed % 4 == 3:
        return torch.ones(1, *size)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.zeros(1, *size)
    box = []
    for side in size:
        share = LEAST_SIDE + (1 - LEAST_SIDE) * float(torch.rand((), generator=generator))
        length = max(1, round(share * side))
        start = int(torch.randint(side - length + 1, (), generator=generator))
        box.append(slice(start, start + length))
    mask[:, box[0], box[1]] = 1
    return mask


def edges(picture: Tensor) -> Tensor:
    """White lines on black where a picture [c, h, w] changes most, of the same shape."""
    grey = picture.mean(dim=0)
    change = F.pad(grey.diff(dim=0).abs(), (0, 0, 0, 1)) + F.pad(grey.diff(dim=1).abs(), (0, 1))
    lines = (change >= change.flatten().quantile(1 - EDGES)) & (change > 0)
    return lines.to(picture.dtype).expand_as(picture)


def control_shape(model: LoadedModel, size: Sequence[int]) -> tuple[int, int, int]:
    """Channels, height and width of what the ControlNet of a model looks at, for latents of that height and width."""
    network: Any = model.controlnet
    scale = 2 ** (len(network.config.conditioning_embedding_out_channels) - 1)
    height, width = (side * scale for side in size)
    return (int(network.config.conditioning_channels), height, width)

"""The three components as modules whose positional inputs and outputs are those of :mod:`quest_deploy.model.spec`.

The exporter traces them and the torch backend runs them, so that both rungs of the parity ladder have one signature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TextEncoder(nn.Module):
    """CLIP text model: token ids -> hidden states."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`input_ids` int64 [b, l] -> `last_hidden_state` [b, l, d], `pooler_output` [b, d]."""
        output = self.text_encoder(input_ids)
        return output.last_hidden_state, output.pooler_output


class Denoiser(nn.Module):
    """U-Net: latents, timestep, text -> predicted noise."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        """`sample` [b, c, h, w], `timestep` [1] or [b], `encoder_hidden_states` [b, l, d] -> [b, c, h, w]."""
        return (self.unet(sample, timestep, encoder_hidden_states, return_dict=False)[0],)


class VaeDecoder(nn.Module):
    """Autoencoder's decoder: unscaled latents -> pixels in [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        """`latent_sample` [b, c, h, w] -> `sample` [b, 3, H, W]."""
        return (self.vae.decode(latent_sample, return_dict=False)[0],)


def parameters_frozen(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode, with no parameter asking for a gradient."""
    return module.eval().requires_grad_(False)


def first_device(module: nn.Module) -> torch.device:
    """The device of the module's first parameter or buffer (CPU for a module that has none)."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")

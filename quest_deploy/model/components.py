"""The components as modules whose positional inputs and outputs are those of :mod:`quest_deploy.model.spec`.

The exporter traces them and the torch backend runs them, so that both rungs of the parity ladder have one signature.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.model.spec import TIMESTEP, ComponentSpec

Conditioning = Mapping[str, Tensor]
"""What a denoiser is told besides latents and timestep: [n, ...] by input name; empty where it is told nothing."""


class TextEncoder(nn.Module):
    """CLIP text model: token ids -> hidden states."""

    def __init__(self, text_encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """`input_ids` int64 [b, l] -> `last_hidden_state` [b, l, d], `pooler_output` [b, d]."""
        output = self.text_encoder(input_ids)
        return output.last_hidden_state, output.pooler_output


def call_denoiser(
    denoiser: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
) -> Tensor:
    """What a denoiser of diffusers answers, its variance channels included.

    Args:
        denoiser: The module; may hold quantized layers.
        sample: float32 [b, c, h, w].
        timestep: float32 [1] or [b].
        conditioning: [b, ...] by input name.
    """
    # One timestep for a batch makes another product than one for each sample, in the last bits.
    if timestep.shape[0] != sample.shape[0]:
        timestep = timestep.expand(sample.shape[0])
    output: Tensor = denoiser(sample, timestep=timestep, **conditioning, return_dict=False)[0]
    return output


def predict(denoiser: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """The prediction of a denoiser of diffusers [b, c, h, w]: a learned variance, which no sampler uses, is cut off."""
    return without_variance(call_denoiser(denoiser, sample, timestep, conditioning), sample.shape[1])


def without_variance(output: Tensor, channels: int) -> Tensor:
    """The first `channels` of a denoiser's output [b, c', h, w]: a DiT's variance follows its prediction."""
    return output[:, :channels] if output.shape[1] == 2 * channels else output


class Denoiser(nn.Module):
    """U-Net or transformer: latents, timestep and what it is told -> prediction.

    Args:
        denoiser: The module of diffusers.
        spec: Names its inputs.
    """

    def __init__(self, denoiser: nn.Module, spec: ComponentSpec) -> None:
        super().__init__()
        # Paths of layers inside this component then are their paths inside the pipeline.
        self.add_module(spec.name, denoiser)
        self.name = spec.name
        self.inputs = tuple(tensor.name for tensor in spec.inputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor]:
        """`inputs` of the specification, in its order -> [b, c, h, w]."""
        sample, timestep, *rest = inputs
        conditioning = dict(zip(self.inputs[2:], rest, strict=True))
        return (call_denoiser(self.get_submodule(self.name), sample, timestep, conditioning),)


def denoiser_inputs(
    spec: ComponentSpec, sample: Tensor, timestep: Tensor, conditioning: Conditioning
) -> dict[str, Tensor]:
    """All inputs of a denoiser by name, in the order of its specification."""
    given = {spec.inputs[0].name: sample, TIMESTEP: timestep, **conditioning}
    names = [tensor.name for tensor in spec.inputs]
    return {name: given[name] for name in (*(n for n in names if n in given), *(given.keys() - set(names)))}


class VaeDecoder(nn.Module):
    """Autoencoder's decoder: unscaled latents -> pixels in [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        """`latent_sample` [b, c, h, w] -> `sample` [b, 3, H, W]."""
        return (self.vae.decode(latent_sample, return_dict=False)[0],)


def join_conditioning(parts: Sequence[Conditioning]) -> dict[str, Tensor]:
    """Several batches as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def parameters_frozen(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode, with no parameter asking for a gradient."""
    return module.eval().requires_grad_(False)


def first_device(module: nn.Module) -> torch.device:
    """The device of the module's first parameter or buffer (CPU for a module that has none)."""
    for tensor in (*module.parameters(), *module.buffers()):
        return tensor.device
    return torch.device("cpu")

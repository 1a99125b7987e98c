"""The components as modules whose positional inputs and outputs are those of :mod:`quest_deploy.model.spec`.

The exporter traces them and the torch backend runs them, so that both rungs of the parity ladder have one signature.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.model.denoisers import CONTROL, DOWN_RESIDUAL, MID_RESIDUAL, is_packed
from quest_deploy.model.packing import pack, positions, unpack
from quest_deploy.model.tensors import TIMESTEP, ComponentSpec

Conditioning = Mapping[str, Tensor]
"""What a denoiser is told besides latents and timestep: [n, ...] by input name; empty where it is told nothing."""


# Inputs that diffusers takes in one mapping, `added_cond_kwargs`.
ADDED_CONDITIONS = ("text_embeds", "time_ids", "resolution", "aspect_ratio")
# What an inpainting denoiser is told in channels beside the latents: a mask, and the latents of what is not masked.
MASKED = "masked_latents"
HIDDEN_STATES = "hidden_states."
CLIP_OUTPUTS = ("last_hidden_state", "pooler_output")


class TextEncoder(nn.Module):
    """Text model of transformers: token ids -> hidden states.

    Args:
        text_encoder: The module.
        outputs: Names of those of its outputs that are given; ``hidden_states.3`` is the output of the third layer.
    """

    def __init__(self, text_encoder: nn.Module, outputs: Sequence[str] = CLIP_OUTPUTS) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.outputs = tuple(outputs)
        self.options: dict[str, Any] = {}
        if any(map(_is_inner, outputs)):
            self.options["output_hidden_states"] = True
        if "use_cache" in inspect.signature(text_encoder.forward).parameters:
            # Of a language model, which is not asked for a next token.
            self.options["use_cache"] = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """`input_ids` int64 [b, l], and where the model reads one its mask -> `outputs`, [b, l, d] or [b, d]."""
        options: dict[str, Any] = dict(self.options)
        if attention_mask is not None:
            options["attention_mask"] = attention_mask
        output = self.text_encoder(input_ids, **options)
        return tuple(
            output.hidden_states[int(name.removeprefix(HIDDEN_STATES))]
            if _is_inner(name)
            else getattr(output, name)
            for name in self.outputs
        )


def _is_inner(name: str) -> bool:
    return name.startswith(HIDDEN_STATES)


def expanded(timestep: Tensor, sample: Tensor) -> Tensor:
    """A timestep for each sample: one for a batch makes another product, in the last bits."""
    return timestep if timestep.shape[0] == sample.shape[0] else timestep.expand(sample.shape[0])


def diffusers_arguments(conditioning: Conditioning) -> dict[str, Any]:
    """Tensors by input name as diffusers' modules take them: some in a mapping, residuals as a tuple."""
    told: dict[str, Any] = dict(conditioning)
    added = {name: told.pop(name) for name in ADDED_CONDITIONS if name in told}
    if added:
        told["added_cond_kwargs"] = added
    residuals = [told.pop(name) for name in conditioning if name.startswith(DOWN_RESIDUAL)]
    if residuals:
        told[DOWN_RESIDUAL.rstrip(".")] = tuple(residuals)
    return told


def call_denoiser(
    denoiser: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Conditioning
) -> Tensor:
    """What a denoiser of diffusers answers, its variance channels included.

    Args:
        denoiser: The module; may hold quantized layers.
        sample: float32 [b, c, h, w]; or [b, tokens, c], where the denoiser takes packed latents.
        timestep: float32 [1] or [b].
        conditioning: [b, ...] by input name; with the positions of all tokens for packed latents.

    Returns:
        Of the shape of `sample`, but for its channels.
    """
    if MASKED in conditioning:
        sample = torch.cat([sample, conditioning[MASKED]], dim=1)
        conditioning = {name: value for name, value in conditioning.items() if name != MASKED}
    if sample.ndim == 4 and is_packed(getattr(denoiser, "config", {})):
        conditioning = {**conditioning, **positions(sample, conditioning["encoder_hidden_states"])}
        tokens = call_denoiser(denoiser, pack(sample), timestep, conditioning)
        return unpack(tokens, *sample.shape[-2:])
    timestep, told = expanded(timestep, sample), diffusers_arguments(conditioning)
    output: Tensor = denoiser(sample, timestep=timestep, **told, return_dict=False)[0]
    return output


class ControlNet(nn.Module):
    """What a picture adds to a U-Net's skip connections.

    Args:
        controlnet: The module of diffusers.
        spec: Names its inputs.
    """

    def __init__(self, controlnet: nn.Module, spec: ComponentSpec) -> None:
        super().__init__()
        self.controlnet = controlnet
        self.inputs = tuple(tensor.name for tensor in spec.inputs)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`inputs` of the specification, in its order -> the residuals, [b, c, h / 2^k, w / 2^k]."""
        sample, timestep, *rest = inputs
        told = diffusers_arguments(dict(zip(self.inputs[2:], rest, strict=True)))
        down, mid = self.controlnet(sample, timestep=expanded(timestep, sample), **told, return_dict=False)
        return (*down, mid)


def with_residuals(
    controlnet: ControlNet, sample: Tensor, timestep: Tensor, conditioning: Conditioning
) -> dict[str, Tensor]:
    """`conditioning` with what a ControlNet sees in the picture, in place of it.

    Args:
        controlnet: The network.
        sample: float32 [b, c, h, w].
        timestep: float32 [1] or [b].
        conditioning: [b, ...] by input name, with `controlnet_cond` in [0, 1], [b, 3, H, W].
    """
    given = {"sample": sample, TIMESTEP: timestep, **conditioning}
    *down, mid = controlnet(*(given[name] for name in controlnet.inputs))
    rest = {name: value for name, value in conditioning.items() if name != CONTROL}
    return {**rest, **{f"{DOWN_RESIDUAL}{i}": value for i, value in enumerate(down)}, MID_RESIDUAL: mid}


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
    names = [tensor.name for tensor in spec.inputs]
    given = {spec.inputs[0].name: sample, TIMESTEP: timestep, **conditioning}
    if MASKED in given:
        given[spec.inputs[0].name] = torch.cat([sample, given.pop(MASKED)], dim=1)
    if len(spec.inputs[0].shape) < sample.ndim:
        given |= {spec.inputs[0].name: pack(sample)}
        given |= positions(sample, conditioning["encoder_hidden_states"])
    return {name: given[name] for name in (*(n for n in names if n in given), *(given.keys() - set(names)))}


def like_latents(output: Tensor, latents: Tensor) -> Tensor:
    """A denoiser's output as latents [b, c, h, w] are, without the variance that no sampler uses."""
    unpacked = unpack(output, *latents.shape[-2:]) if output.ndim < latents.ndim else output
    return without_variance(unpacked, latents.shape[1])


class VaeDecoder(nn.Module):
    """Autoencoder's decoder: unscaled latents -> pixels in [-1, 1]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        """`latent_sample` [b, c, h, w] -> `sample` [b, 3, H, W]."""
        return (self.vae.decode(latent_sample, return_dict=False)[0],)


class VaeEncoder(nn.Module):
    """Autoencoder's encoder: pixels in [-1, 1] -> mean and logarithm of the variance of unscaled latents."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        """`sample` [b, 3, H, W] -> `latent_parameters` [b, 2 c, h, w]."""
        return (self.vae.encode(sample, return_dict=False)[0].parameters,)


# Both components of an autoencoder hold all of it.
_OTHER_HALF: Mapping[type[nn.Module], tuple[str, ...]] = {
    VaeDecoder: ("vae.encoder.", "vae.quant_conv."),
    VaeEncoder: ("vae.decoder.", "vae.post_quant_conv."),
}


def runs(component: nn.Module, name: str) -> bool:
    """Whether a component runs its layer, or uses its tensor, of that name."""
    return not f"{name}.".startswith(_OTHER_HALF.get(type(component), ()))


def scaled(config: Mapping[str, Any], latents: Tensor) -> Tensor:
    """The inverse of :func:`unscaled`."""
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and deviation is not None:
        shape = (1, -1, 1, 1)
        centred = latents - torch.tensor(mean).view(shape).to(latents)
        return centred * config["scaling_factor"] / torch.tensor(deviation).view(shape).to(latents)
    shift = config.get("shift_factor")
    return (latents if shift is None else latents - shift) * config["scaling_factor"]


def unscaled(config: Mapping[str, Any], latents: Tensor) -> Tensor:
    """What the decoder of an autoencoder of that configuration is given for `latents` [b, c, h, w].

    Operations and their order are those of diffusers' pipelines.
    """
    mean, deviation = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and deviation is not None:
        shape = (1, -1, 1, 1)
        spread = torch.tensor(deviation).view(shape).to(latents)
        return latents * spread / config["scaling_factor"] + torch.tensor(mean).view(shape).to(latents)
    result = latents / config["scaling_factor"]
    return result if config.get("shift_factor") is None else result + config["shift_factor"]


def join_conditioning(parts: Sequence[Conditioning]) -> dict[str, Tensor]:
    """Several batches as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def parameters_frozen(module: nn.Module) -> nn.Module:
    """`module` in evaluation mode, with no parameter asking for a gradient."""
    return module.eval().requires_grad_(False)


def first_device(module: nn.Module) -> torch.device:
    """The device of the module's first parameter or buffer that is in memory (CPU for a module that has none)."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    return torch.device("cpu")

"""Quantization of what runs once an image: the text encoders, and the autoencoder's decoder.

They see no timestep, so a layer has one activation scale (G = 1), and nothing learns: 8 bits, per output channel for
weights, calibrated on the recipe's prompts and on the latents that they lead to. "int8-weight-only" leaves activations
in float; "w8a8" is the grid of the denoiser's layers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy import sampling
from quest_deploy.config import FinetuneConfig, Recipe, StaticMode
from quest_deploy.errors import ConfigError
from quest_deploy.model.components import (
    Conditioning,
    VaeDecoder,
    first_device,
    parameters_frozen,
    predict,
    unscaled,
)
from quest_deploy.model.families import TextPart
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import affine
from quest_deploy.quantize.calibrate import told_to
from quest_deploy.quantize.initialize import initialize_layer
from quest_deploy.quantize.insert import (
    LayerQParams,
    channel_axis,
    quantizable_layers,
    quantized_layers,
    replace_layers,
)
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.schedule import flow_of, recording_config

BITS = 8
BATCH_PROMPTS = 8
MAX_IMAGES = 16
POSITIONS_PER_BATCH = 128
DECODED = ("decoder", "post_quant_conv")
Run = Callable[[], object]


def static_context() -> TimestepContext:
    """The timestep groups of a component that sees no timestep: one."""
    return TimestepContext(torch.empty(0))


def check_companions(model: LoadedModel, recipe: Recipe) -> None:
    """See that the model has the components that the recipe wants quantized.

    Raises:
        ConfigError: lists those that it does not have.
    """
    problems = []
    if recipe.text_encoder is not None and not model.text_encoders:
        problems.append("the model has no text encoder; set text_encoder to null in the recipe")
    if recipe.vae_decoder is not None and model.vae is None:
        problems.append("the model has no autoencoder; set vae_decoder to null in the recipe")
    if problems:
        raise ConfigError("; ".join(problems))


def quantize_companions(model: LoadedModel, config: FinetuneConfig) -> dict[str, nn.Module]:
    """The text encoders and the autoencoder as the recipe wants them, by folder; without those that stay in float.

    Args:
        model: Full precision; left as it is.
        config: Recipe, prompts and seed.

    Raises:
        ConfigError: the recipe asks for a component that the model does not have.
    """
    recipe = config.recipe
    check_companions(model, recipe)
    prompts = config.prompts[: recipe.calibration_prompts]
    result: dict[str, nn.Module] = {}
    if recipe.text_encoder is not None:
        for part in model.family.text:
            encoder = copy.deepcopy(model.text_encoders[part.name]).to("cpu")
            runs = _encoding(encoder, part, model, prompts)
            result[part.name] = quantize_static(
                encoder, list(quantizable_layers(encoder)), recipe.text_encoder, runs, config
            )
    if recipe.vae_decoder is not None:
        assert model.vae is not None and model.family.autoencoder is not None
        vae = copy.deepcopy(model.vae).to("cpu")
        names = [name for name in quantizable_layers(vae) if name.split(".")[0] in DECODED]
        runs = _decoding(vae, final_latents(model, prompts[:MAX_IMAGES], config))
        result[model.family.autoencoder] = quantize_static(vae, names, recipe.vae_decoder, runs, config)
    return result


@torch.no_grad()
def quantize_static(
    component: nn.Module, names: Sequence[str], mode: StaticMode, runs: Iterator[Run], config: FinetuneConfig
) -> nn.Module:
    """Quantize the layers `names` of `component` in place, and freeze them.

    Args:
        component: Full precision.
        names: Of its layers.
        mode: Whether activations are quantized.
        runs: Each runs the component on one calibration batch.
        config: Channel rows, and the seed.

    Returns:
        The component.
    """
    layers = {name: quantizable_layers(component)[name] for name in names}
    qparams: dict[str, LayerQParams] = {}
    if mode == "int8-weight-only":
        qparams = {name: _weight_only(layer.weight.detach()) for name, layer in layers.items()}
    else:
        for name, rows in _collect(layers, runs, config.seed).items():
            qparams[name] = initialize_layer(
                layers[name],
                rows[None],
                BITS,
                BITS,
                method="search",
                time_aware=False,
                channel_wise=config.recipe.channel_wise,
            )
    replace_layers(component, qparams, static_context())
    for layer in quantized_layers(component).values():
        layer.freeze()
    return parameters_frozen(component)


def _weight_only(weight: Tensor) -> LayerQParams:
    scale = affine.search_weight_scale(weight, BITS)
    return LayerQParams(weight_bits=BITS, weight_scale=scale, activation_bits=None, group_scale=None)


def _collect(layers: Mapping[str, nn.Module], runs: Iterator[Run], seed: int) -> dict[str, Tensor]:
    """Samples of every layer's input over all runs, float32 [s + 2, c_in], the last two each channel's extremes.

    Layers that are not run are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, axis: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].movedim(axis, -1).flatten(0, -2).cpu()
            chosen = torch.randint(rows.shape[0], (POSITIONS_PER_BATCH,), generator=generator)
            kept[name].append(torch.cat([rows[chosen], rows.amin(dim=0)[None], rows.amax(dim=0)[None]]))

        return hook

    handles = [
        layer.register_forward_pre_hook(keep(name, channel_axis(layer))) for name, layer in layers.items()
    ]
    try:
        for run in runs:
            run()
    finally:
        for handle in handles:
            handle.remove()
    result = {}
    for name, batches in kept.items():
        if batches:
            every = torch.stack(batches)
            low, high = every[:, -2].amin(dim=0), every[:, -1].amax(dim=0)
            result[name] = torch.cat([every[:, :-2].flatten(0, 1), low[None], high[None]])
    return result


def _encoding(
    encoder: nn.Module, part: TextPart, model: LoadedModel, prompts: Sequence[str]
) -> Iterator[Run]:
    encoders = {**model.text_encoders, part.name: encoder}
    conditioner = dataclasses.replace(model, text_encoders=encoders).conditioner
    everything = ["", *prompts]
    for start in range(0, len(everything), BATCH_PROMPTS):
        yield functools.partial(conditioner.encode, everything[start : start + BATCH_PROMPTS])


def _decoding(vae: Any, latents: Tensor) -> Iterator[Run]:
    module = VaeDecoder(vae)
    for chunk in unscaled(vae.config, latents).split(BATCH_PROMPTS):
        yield functools.partial(module, chunk)


@torch.no_grad()
def final_latents(model: LoadedModel, prompts: Sequence[str], config: FinetuneConfig) -> Tensor:
    """What the autoencoder is given for `prompts`, [n, c, h, w]: drawn as the trajectories are recorded."""
    device = first_device(model.denoiser)
    schedule = recording_config(model, config.recipe.calibration_steps)

    def told(conditioning: Conditioning, count: int) -> dict[str, Tensor]:
        return {
            name: value.expand(count, *value.shape[1:]).to(device) for name, value in conditioning.items()
        }

    parts = []
    for start in range(0, len(prompts), BATCH_PROMPTS):
        chunk = prompts[start : start + BATCH_PROMPTS]
        positive, negative = told_to(model, chunk, config.recipe.guidance_scale)
        generators = sampling.generators_of(range(config.seed + start, config.seed + start + len(chunk)))
        parts.append(
            sampling.denoise(
                lambda sample, timestep, conditioning: predict(
                    model.denoiser, sample, model.denoiser_time(timestep), conditioning
                ),
                sampling.make_scheduler(None, schedule),
                sampling.draw_noise(generators, model.latent_shape).to(device),
                told(positive, len(chunk)),
                None if negative is None else told(negative, len(chunk)),
                steps=config.recipe.calibration_steps,
                guidance_scale=config.recipe.guidance_scale,
                flow=flow_of(model),
                generators=generators,
            )
        )
    return torch.cat(parts).cpu()

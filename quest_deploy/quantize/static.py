"""Quantization of what runs once an image: the text encoders, and the autoencoder's decoder.

They see no timestep, so a layer has one activation scale (G = 1), and nothing learns: 8 bits, per output channel for
weights, calibrated on the recipe's prompts and on the latents that they lead to. "int8-weight-only" leaves activations
in float; "w8a8" is the grid of the denoiser's layers.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from quest_deploy.model.conditioning import Conditioner
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
from quest_deploy.quantize.layers import Quantizable, TimestepContext
from quest_deploy.quantize.memory import (
    META,
    PassMemory,
    PeakMemory,
    forward_memory,
    limit_count,
    placeholder,
    size_bytes,
    weight_bytes,
    without_values,
)
from quest_deploy.quantize.rows import RowChoice
from quest_deploy.quantize.schedule import flow_of, recording_config

BITS = 8
BATCH_PROMPTS = 8
MAX_IMAGES = 16
POSITIONS_PER_BATCH = 128
DECODED = ("decoder", "post_quant_conv")


@dataclass(frozen=True)
class Batch:
    """Samples that calibrate a component.

    Attributes:
        count: How many.
        at_once: The most that are run together; which rows of them are looked at does not depend on it.
        run: Runs the component on some, int64 [n].
    """

    count: int
    at_once: int
    run: Callable[[Tensor], object]


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
        names = list(decoder_layers(vae))
        decoding: Iterable[Batch] = ()
        if recipe.vae_decoder == "w8a8":
            latents = final_latents(model, prompts[:MAX_IMAGES], config)
            decoding = _decoding(vae, latents, latents_at_once(model, recipe))
        result[model.family.autoencoder] = quantize_static(vae, names, recipe.vae_decoder, decoding, config)
    return result


def decoder_layers(vae: nn.Module) -> dict[str, Quantizable]:
    """The layers of an autoencoder that decode, by name."""
    return {name: layer for name, layer in quantizable_layers(vae).items() if name.split(".")[0] in DECODED}


def latents_at_once(model: LoadedModel, recipe: Recipe) -> int:
    """How many latents are decoded together.

    Raises:
        ConfigError: not even one fits into the recipe's limit.
    """
    limit, vae = recipe.memory_limit_gb, model.vae
    if limit is None or vae is None:
        return BATCH_PROMPTS
    return limit_count(BATCH_PROMPTS, held_bytes(model, vae), limit, decode_memory(model))


def held_bytes(model: LoadedModel, component: nn.Module) -> int:
    """Of the model, its quantized denoiser, and a copy of `component`, which is quantized in its turn."""
    copies = (model.denoiser, component)
    copied = size_bytes([x for module in copies for x in (*module.parameters(), *module.buffers())])
    return weight_bytes(model) + copied


def decode_memory(model: LoadedModel) -> PassMemory:
    """What decoding takes for each latent, beside the parameters."""

    def peak(count: int) -> int:
        with PeakMemory() as memory:
            decode_shapes(model, count)
        return memory.peak

    return PassMemory.measured(peak, BATCH_PROMPTS)


@torch.no_grad()
def decode_shapes(model: LoadedModel, count: int) -> None:
    """Decode `count` latents without values."""
    assert model.vae is not None
    bare = without_values(model.vae, static_context())
    VaeDecoder(bare)(torch.empty(count, *model.latent_shape, device=META))


@torch.no_grad()
def quantize_static(
    component: nn.Module,
    names: Sequence[str],
    mode: StaticMode,
    runs: Iterable[Batch],
    config: FinetuneConfig,
) -> nn.Module:
    """Quantize the layers `names` of `component` in place, and freeze them.

    Args:
        component: Full precision.
        names: Of its layers.
        mode: Whether activations are quantized.
        runs: The calibration batches, which "int8-weight-only" does not look at.
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


def _collect(layers: Mapping[str, nn.Module], runs: Iterable[Batch], seed: int) -> dict[str, Tensor]:
    """Samples of every layer's input over all runs, float32 [s + 2, c_in], the last two each channel's extremes.

    Layers that are not run are left out.
    """
    choice = RowChoice(torch.Generator().manual_seed(seed), branches=1)
    kept: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str, axis: int) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].movedim(axis, -1).flatten(0, -2).cpu()
            run, places, chosen = choice.of(name, rows.shape[0], POSITIONS_PER_BATCH)
            low, high = rows.amin(dim=0), rows.amax(dim=0)
            if choice.first == 0:
                kept[name].append(
                    torch.cat([rows.new_empty(POSITIONS_PER_BATCH, len(low)), low[None], high[None]])
                )
            seen = kept[name][choice.place(name, run)]
            seen[places] = rows[chosen]
            seen[-2], seen[-1] = torch.minimum(seen[-2], low), torch.maximum(seen[-1], high)

        return hook

    handles = [
        layer.register_forward_pre_hook(keep(name, channel_axis(layer))) for name, layer in layers.items()
    ]
    try:
        for batch in runs:
            for chunk in choice.chunks(torch.arange(batch.count), batch.at_once):
                batch.run(chunk)
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
) -> Iterator[Batch]:
    encoders = {**model.text_encoders, part.name: encoder}
    conditioner = dataclasses.replace(model, text_encoders=encoders).conditioner
    everything = ["", *prompts]
    for start in range(0, len(everything), BATCH_PROMPTS):
        texts = everything[start : start + BATCH_PROMPTS]
        yield Batch(len(texts), len(texts), functools.partial(_encode, conditioner, texts))


def _encode(conditioner: Conditioner, texts: Sequence[str], chosen: Tensor) -> None:
    conditioner.encode([texts[index] for index in chosen])


def _decoding(vae: Any, latents: Tensor, at_once: int) -> Iterator[Batch]:
    module = VaeDecoder(vae)
    for batch in unscaled(vae.config, latents).split(BATCH_PROMPTS):
        yield Batch(len(batch), at_once, functools.partial(_decode, module, batch))


def _decode(module: VaeDecoder, latents: Tensor, chosen: Tensor) -> None:
    module(latents[chosen])


@torch.no_grad()
def final_latents(model: LoadedModel, prompts: Sequence[str], config: FinetuneConfig) -> Tensor:
    """What the autoencoder is given for `prompts`, [n, c, h, w]: drawn as the trajectories are recorded."""
    device = first_device(model.denoiser)
    schedule = recording_config(model, config.recipe.calibration_steps)

    def told(conditioning: Conditioning, count: int) -> dict[str, Tensor]:
        return {
            name: value.expand(count, *value.shape[1:]).to(device) for name, value in conditioning.items()
        }

    parts, at_once = [], BATCH_PROMPTS
    if config.recipe.memory_limit_gb is not None:
        assert model.vae is not None
        forward = forward_memory(model.denoiser, placeholder(model, config))
        held = held_bytes(model, model.vae)
        at_once = limit_count(at_once, held, config.recipe.memory_limit_gb, forward)
    for start in range(0, len(prompts), at_once):
        chunk = prompts[start : start + at_once]
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

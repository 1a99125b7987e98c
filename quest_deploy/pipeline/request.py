"""Whether a model can draw what is asked for, from its configuration files alone: no weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from quest_deploy import sampling
from quest_deploy.checks import are_text, at_least, raise_if_any, seeds_fit, whole_at_least
from quest_deploy.config import GenerateConfig
from quest_deploy.errors import ArtifactError, ConfigError, ModelLoadError
from quest_deploy.model.corrections import corrected_scheduler
from quest_deploy.model.families import VAE_DECODER, Classes, Family
from quest_deploy.model.load import loading_errors
from quest_deploy.model.spec import (
    ComponentSpec,
    check_multiple,
    classes_of,
    component_configs,
    component_specs,
    family_of,
    has_patches,
    is_resizable,
    latent_channels,
    latent_granularity,
    latent_size,
    read_config,
    scheduler_config,
    vae_scale_factor,
)
from quest_deploy.sampling import Flow


def check_request(path: Path, config: GenerateConfig, backend: str) -> None:
    """Check a request before anything heavy is loaded.

    Args:
        path: A model, checkpoint, ONNX or engine directory; of a single file, nothing is known yet.
        config: Prompts, schedule and size.
        backend: What will run it.

    Raises:
        ConfigError: the prompts, the scheduler, the number of steps or the size does not fit the model.
    """
    try:
        family, classes, specs = family_of(path), classes_of(path), component_specs(path)
        configs, own = component_configs(path), own_scheduler(path)
    except (ArtifactError, ModelLoadError):
        # Loading compares the files with their digests first, and says more.
        return
    check_prompts(family, classes, config)
    denoiser = specs[family.denoiser]
    size = latent_shape(configs, denoiser, backend, config.height, config.width)[-2:]
    scheduler = sampling.make_scheduler(config.scheduler, own.config)
    sampling.timesteps(scheduler, config.steps, flow=flow_of(family, configs), size=size)


def own_scheduler(path: Path) -> Any:
    """The scheduler that lies in a model, checkpoint, ONNX or engine directory, as diffusers would load it.

    Raises:
        ArtifactError: its file, or another that says what lies there, is missing or corrupt.
        ModelLoadError: it does not take what its file says.
        ConfigError: it is of a class that diffusers does not have.
    """
    config = scheduler_config(path / "scheduler")
    # The file may be of another class: diffusers goes by the index.
    entry = read_config(path / "model_index.json").get("scheduler")
    own = entry[-1] if isinstance(entry, list) and entry else None
    with loading_errors(path / "scheduler" / "scheduler_config.json"):
        scheduler = sampling.make_scheduler(None, config, own=own)
    return corrected_scheduler(scheduler, family_of(path))


def check_prompts(family: Family, classes: Classes | None, config: GenerateConfig) -> None:
    """Check that the prompts are what the model takes: texts, classes or none.

    Raises:
        ConfigError: they are not.
    """
    if classes is None and not family.has_text:
        if config.prompts:
            raise ConfigError(
                "prompts were given, but this model draws without any; "
                "leave them out, and say how many images with --num-images"
            )
        return
    if not config.prompts:
        wanted = "a prompt" if classes is None else "the name or number of a class"
        raise ConfigError(f"no prompt was given; give {wanted}")
    if classes is not None:
        for prompt in config.prompts:
            classes.number(prompt)


def check_texts(name: str, texts: Sequence[str]) -> None:
    """Check that there are texts, which a tokenizer takes.

    Raises:
        ConfigError: there are none, or one is no text.
    """
    problems: list[str] = []
    are_text(problems, name, texts)
    if not texts:
        problems.append(f"no {name} was given, expected one for each image; the empty one stands for no text")
    raise_if_any(problems, "encode")


def check_seeds(seeds: Sequence[int]) -> None:
    """Check that there are seeds, and that generators take them.

    Raises:
        ConfigError: there are none, or one is none that torch takes.
    """
    problems: list[str] = [] if len(seeds) else ["no seed was given, expected one for each image"]
    for seed in seeds:
        seeds_fit(problems, seed, 1)
    raise_if_any(problems, "initial_noise")


def check_drawing(
    images: int, steps: int, guidance_scale: float, generators: Sequence[torch.Generator] | None
) -> None:
    """Check what the denoising loop is asked for.

    Raises:
        ConfigError: there is nothing to draw, a number is none, or there is not one generator for each image.
    """
    problems: list[str] = []
    whole_at_least(problems, 1, images=images, steps=steps)
    at_least(problems, 0, guidance_scale=guidance_scale)
    # diffusers draws all images with the first of fewer, so that they depend on their batch.
    got = 1 if isinstance(generators, torch.Generator) else images if generators is None else len(generators)
    if got != images or isinstance(generators, torch.Generator):
        problems.append(f"got {got} generators for {images} images, expected a list of one for each")
    raise_if_any(problems, "denoise")


def flow_of(family: Family, configs: Mapping[str, Mapping[str, Any]]) -> Flow:
    """How a flow's noise levels are made for a model whose components have these configurations."""
    patch = latent_granularity(configs[family.denoiser])
    return Flow(patch=patch, even_sigmas=family.even_sigmas, max_shift=family.max_shift)


def latent_shape(
    configs: Mapping[str, Mapping[str, Any]],
    denoiser: ComponentSpec,
    backend: str,
    height: int | None,
    width: int | None,
) -> tuple[int, int, int]:
    """Channels, height and width of the latents of an image of the given pixels (None: the model's own size).

    Args:
        configs: The configuration of each component, by its name.
        denoiser: Its inputs and outputs.
        backend: What runs it; torch alone takes latents that a U-Net cannot halve.
        height: In pixels.
        width: In pixels.

    Raises:
        ConfigError: the size is not a multiple of what the model divides it by, or the model has one size only.
        ModelLoadError: a side is left out, and the model does not say its own.
    """
    config, scale = configs[denoiser.name], vae_scale_factor(configs.get(VAE_DECODER))
    resizable = is_resizable(denoiser)
    sides, asked = [], height is not None and width is not None
    own = (0, 0) if resizable and asked else latent_size(config)
    for name, pixels, side in zip(("height", "width"), (height, width), own, strict=True):
        if pixels is not None and not resizable and pixels != side * scale:
            raise ConfigError(
                f"{name} is {pixels} pixels, but this model draws {side * scale} only; leave it out"
            )
        if pixels is not None and (pixels < scale or pixels % scale):
            raise ConfigError(
                f"{name} is {pixels} pixels, expected a multiple of {scale}, the pixels of one latent; "
                f"use {max(1, round(pixels / scale)) * scale}"
            )
        if pixels is not None and resizable and (backend != "torch" or has_patches(config)):
            check_multiple(name, (pixels,), scale * latent_granularity(config))
        sides.append(side if pixels is None else pixels // scale)
        positions = config.get("pos_embed_max_size")
        largest = None if positions is None else positions * scale * latent_granularity(config)
        if largest is not None and sides[-1] * scale > largest:
            raise ConfigError(
                f"{name} is {sides[-1] * scale} pixels, and the model has positions for {largest} at most; "
                f"use {largest} or less"
            )
    return (latent_channels(config), sides[0], sides[1])

"""Optimization profiles: which input shapes a TensorRT engine accepts, from the images a user wants to draw.

A user thinks in images and pixels; the denoiser sees twice the images (guidance runs both branches in one batch)
and latents. Everything here is plain arithmetic on :mod:`quest_deploy.model.spec`; no TensorRT.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from quest_deploy.config import BuildConfig, ProfileConfig, ShapeRange
from quest_deploy.errors import ConfigError, EngineInputError
from quest_deploy.model.denoisers import SIDE, is_packed
from quest_deploy.model.families import VAE_DECODER, VAE_ENCODER
from quest_deploy.model.spec import (
    ComponentSpec,
    check_multiple,
    classes_of,
    component_configs,
    component_specs,
    family_of,
    has_negative,
    is_resizable,
    latent_granularity,
    latent_size,
    token_count,
    vae_scale_factor,
)
from quest_deploy.model.tensors import base_of

Shape = tuple[int, ...]
# Tokens of a text encoder that takes any number of them: a negative prompt up to instructions and a prompt.
LONG_TEXT = ShapeRange(min=1, opt=512, max=1024)


@dataclass(frozen=True, kw_only=True)
class InputRange:
    """Smallest, optimal and largest shape of one input."""

    min: Shape
    opt: Shape
    max: Shape


Profile = Mapping[str, InputRange]
"""One optimization profile: a range for each input, by name."""


def all_profiles(
    model_dir: Path, config: BuildConfig, graphs: Mapping[str, ComponentSpec] = MappingProxyType({})
) -> dict[str, list[Profile]]:
    """The optimization profiles of every component, in the configuration's order; equal ones once.

    A component that does not see what profiles differ in, as a text encoder does not see sizes, has fewer.

    Raises:
        ConfigError: as :func:`component_profiles`.
    """
    found: dict[str, list[Profile]] = {}
    for one in config.profiles():
        for name, profile in component_profiles(model_dir, one, graphs).items():
            known = found.setdefault(name, [])
            if profile not in known:
                known.append(profile)
    return found


def component_profiles(
    model_dir: Path, config: ProfileConfig, graphs: Mapping[str, ComponentSpec] = MappingProxyType({})
) -> dict[str, Profile]:
    """The optimization profile of every component.

    Args:
        model_dir: Directory with the components' configuration files.
        config: What the engines must be able to draw.
        graphs: What the graphs take, where that differs from what the configuration files say.

    Raises:
        ConfigError: a requested size does not divide into the model's latents, or prompts do not fit.
    """
    specs = {**component_specs(model_dir), **graphs}
    ranges = dimension_ranges(model_dir, specs, config)
    return {name: profile_of(spec, ranges[name]) for name, spec in specs.items()}


def dimension_ranges(
    model_dir: Path, specs: Mapping[str, ComponentSpec], config: ProfileConfig
) -> dict[str, dict[str, ShapeRange]]:
    """The range of every symbolic dimension, by component: the same symbol means another range in each.

    The denoiser's batch starts at 1 (one image without guidance) and ends at twice the largest image batch, if the
    model knows guidance; its optimum is the guided one. A text encoder takes prompts and negative ones in one call.
    """
    family, classes = family_of(model_dir), classes_of(model_dir)
    latents = latent_ranges(model_dir, specs[family.denoiser], config)
    batch = config.batch
    branches = 2 if has_negative(family, classes, specs[family.denoiser]) else 1
    ranges = {
        family.denoiser: {
            "batch": ShapeRange(min=batch.min, opt=branches * batch.opt, max=branches * batch.max),
            # The pipeline gives one timestep for the whole batch; a comparison may give one for each sample.
            "steps": ShapeRange(min=1, opt=1, max=branches * batch.max),
            **latents,
        },
        VAE_DECODER: {"batch": batch, **latents},
        VAE_ENCODER: {"batch": batch, **latents},
    }
    for name in family.text_encoders:
        ranges[name] = {
            "batch": ShapeRange(min=1, opt=batch.opt, max=2 * batch.max),
            # What reads any number of tokens reads instructions, too, of which the denoiser is told nothing.
            "sequence": LONG_TEXT,
        }
    if family.has_text:
        ranges[family.denoiser]["sequence"] = sequence_range(token_count(family, specs), config)
    if family.controlnet is not None:
        ranges[family.controlnet] = ranges[family.denoiser]
    if not config.static:
        return ranges
    return {
        name: own if name in family.text_encoders else {symbol: _fixed(size) for symbol, size in own.items()}
        for name, own in ranges.items()
    }


def sequence_range(tokens: int, config: ProfileConfig) -> ShapeRange:
    """The range of text tokens of a denoiser that the pipeline tells of `tokens`.

    Raises:
        ConfigError: the range asked for leaves them out.
    """
    wanted = config.sequence or ShapeRange(min=tokens, opt=tokens, max=tokens)
    if not wanted.min <= tokens <= wanted.max:
        raise ConfigError(
            f"sequence: got {wanted.min}..{wanted.max} text tokens, but this model's prompts have {tokens}; "
            "choose a range that holds them"
        )
    return wanted


def _fixed(size: ShapeRange) -> ShapeRange:
    return ShapeRange(min=size.opt, opt=size.opt, max=size.opt)


def latent_ranges(model_dir: Path, denoiser: ComponentSpec, config: ProfileConfig) -> dict[str, ShapeRange]:
    """The ranges of the latents' height and width for ranges in pixels; None is the model's own size alone.

    Raises:
        ConfigError: a size is not a multiple of what the VAE and the denoiser divide it by, or the model has one size.
        ModelLoadError: a range is left out, and the model does not say its own size.
    """
    configs = component_configs(model_dir)
    denoiser_config = configs[denoiser.name]
    scale = vae_scale_factor(configs.get(VAE_DECODER))
    step = scale * latent_granularity(denoiser_config)
    resizable = is_resizable(denoiser)
    ranges = {}
    asked = config.height is not None and config.width is not None
    sides = (0, 0) if resizable and asked else latent_size(denoiser_config)
    for axis, own in zip(("height", "width"), sides, strict=True):
        wanted: ShapeRange | None = getattr(config, axis)
        pixels = wanted or ShapeRange(min=own * scale, opt=own * scale, max=own * scale)
        if not resizable and {pixels.min, pixels.max} != {own * scale}:
            raise ConfigError(
                f"{axis}: got {pixels.min}..{pixels.max} pixels, but this model draws {own * scale} only"
            )
        check_multiple(axis, (pixels.min, pixels.opt, pixels.max), step)
        ranges[axis] = ShapeRange(min=pixels.min // scale, opt=pixels.opt // scale, max=pixels.max // scale)
    if is_packed(denoiser_config):
        edges = {
            edge: math.prod(getattr(size, edge) // SIDE for size in ranges.values())
            for edge in ("min", "opt", "max")
        }
        ranges["image_tokens"] = ShapeRange(**edges)
    return ranges


def profile_of(spec: ComponentSpec, ranges: Mapping[str, ShapeRange]) -> dict[str, InputRange]:
    """The shapes of every input of `spec`, with `ranges` put in for its symbols."""

    def shape(dimensions: Sequence[int | str], edge: str) -> Shape:
        return tuple(size if isinstance(size, int) else length(size, edge) for size in dimensions)

    def length(symbol: str, edge: str) -> int:
        base, factor = base_of(symbol)
        return int(getattr(ranges[base], edge) * factor)

    return {
        tensor.name: InputRange(
            min=shape(tensor.shape, "min"), opt=shape(tensor.shape, "opt"), max=shape(tensor.shape, "max")
        )
        for tensor in spec.inputs
    }


def limits_of(spec: ComponentSpec, profiles: Sequence[Profile]) -> dict[str, tuple[int, int]]:
    """Smallest and largest value of each symbolic dimension over all `profiles`."""
    limits: dict[str, tuple[int, int]] = {}
    for profile in profiles:
        for tensor in spec.inputs:
            allowed = profile[tensor.name]
            for symbol, low, high in zip(tensor.shape, allowed.min, allowed.max, strict=True):
                if isinstance(symbol, str):
                    known = limits.get(symbol, (low, high))
                    limits[symbol] = (min(known[0], low), max(known[1], high))
    return limits


def batch_ranges(
    spec: ComponentSpec, profiles: Sequence[Profile], shapes: Mapping[str, Shape]
) -> list[tuple[int, int]]:
    """Fewest and most samples at once by each of `profiles` that holds all sizes of `shapes` beside the batch.

    Several timesteps are one for each sample.
    """
    found = (_batch_range(spec, profile, shapes) for profile in profiles)
    return [(low, high) for low, high in found if low <= high]


def _batch_range(spec: ComponentSpec, profile: Profile, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """The batches that a profile takes of these shapes; empty, (1, 0), where it does not hold them."""
    least, most = [1], []
    for tensor in spec.inputs:
        allowed, shape = profile[tensor.name], shapes.get(tensor.name, ())
        if len(shape) != len(tensor.shape):
            return 1, 0
        for symbol, low, size, high in zip(tensor.shape, allowed.min, shape, allowed.max, strict=True):
            if symbol == "batch" or (symbol == "steps" and size > 1):
                least.append(low)
                most.append(high)
            elif not low <= size <= high:
                return 1, 0
    return max(least), min(most)


def select_profile(component: str, profiles: Sequence[Profile], shapes: Mapping[str, Shape]) -> int:
    """Index of the profile that holds `shapes` and whose optimum is nearest (summed |log ratio| of sizes).

    Raises:
        EngineInputError: no profile holds these shapes.
    """
    fitting = [index for index, profile in enumerate(profiles) if _holds(profile, shapes)]
    if not fitting:
        got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        allowed = "; ".join(
            ", ".join(f"{name} {list(a.min)}..{list(a.max)}" for name, a in profile.items())
            for profile in profiles
        )
        raise EngineInputError(
            f"{component}: got {got}, engine allows {allowed}; "
            "rebuild it with `quest-deploy build-engine` and a profile that covers these shapes"
        )
    return min(fitting, key=lambda index: _distance(profiles[index], shapes))


def _holds(profile: Profile, shapes: Mapping[str, Shape]) -> bool:
    return all(
        len(shape) == len(profile[name].min)
        and all(
            low <= size <= high
            for low, size, high in zip(profile[name].min, shape, profile[name].max, strict=True)
        )
        for name, shape in shapes.items()
    )


def _distance(profile: Profile, shapes: Mapping[str, Shape]) -> float:
    return sum(
        abs(math.log(size / best))
        for name, shape in shapes.items()
        for size, best in zip(shape, profile[name].opt, strict=True)
    )

"""Names for sets of layers: presets and shell patterns, and the bits that a recipe gives to each layer."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence

from quest_deploy.config import Recipe
from quest_deploy.errors import ConfigError
from quest_deploy.quantize.insert import Role

BOUNDARY_BITS = 8


def _parts(name: str, *wanted: str) -> bool:
    return any(part in name.split(".") for part in wanted)


def _feed_forward(name: str) -> bool:
    return ".ff.net." in f".{name}."


def _residual_projection(name: str) -> bool:
    """1x1 projections that the residual stream itself passes through, so that their noise is everyone's noise."""
    return _parts(name, "conv_shortcut") or (
        _parts(name, "attentions") and name.endswith((".proj_in", ".proj_out"))
    )


Preset = Callable[[str, Role], bool]
"""Whether a preset stands for the layer of that name and role."""

PRESETS: dict[str, Preset] = {
    "none": lambda name, role: False,
    "temporal": lambda name, role: role == "temporal",
    # The lists of the published runs: Stable Diffusion, class-conditional LDM, unconditional LDM.
    "paper-sd": lambda name, role: _feed_forward(name),
    "paper-cldm": lambda name, role: (
        _feed_forward(name)
        or _parts(name, "to_q")
        or (_parts(name, "attn1") and _parts(name, "to_k", "to_v"))
    ),
    # What the published code has in one layer, qkv, diffusers has in three.
    "paper-uncond": lambda name, role: _parts(name, "qkv", "to_q", "to_k", "to_v"),
    "attention-and-feed-forward": lambda name, role: "transformer_blocks" in name,
    "residual-projections": lambda name, role: _residual_projection(name),
    "all": lambda name, role: True,
}


AUTO = "auto"
"""In a phase: the layers that quantization damages most, which are found while finetuning."""


def patterns(layers: str | Sequence[str]) -> list[str]:
    """What a phase names, one by one."""
    return [layers] if isinstance(layers, str) else list(layers)


def select(roles: Mapping[str, Role], layers: str | Sequence[str]) -> set[str]:
    """The layers among those of `roles` that `layers` stands for.

    Args:
        roles: The part that each of a model's layers plays, as `quest_deploy.quantize.trace` finds it.
        layers: A preset, a shell pattern (``up_blocks.2.*``) or a layer's name; or several of them.

    Raises:
        ConfigError: lists those that stand for no layer of this model.
    """
    found = {wanted: matching(roles, wanted) for wanted in patterns(layers)}
    missing = [repr(wanted) for wanted, names in found.items() if not names and wanted != "none"]
    if missing:
        raise ConfigError(
            f"layers {', '.join(missing)} {'stands' if len(missing) == 1 else 'stand'} for no layer of this model; "
            f"give a preset ({', '.join(PRESETS)}), or a pattern of layer names such as 'mid_block.*'"
        )
    return set().union(*found.values())


def check_layers(roles: Mapping[str, Role], recipe: Recipe) -> None:
    """See that all patterns of a recipe's overrides and phases stand for some layer.

    Raises:
        ConfigError: lists those that do not.
    """
    # A preset of an override may stand for nothing: see `layer_bits`.
    named = [override.layers for override in recipe.overrides if override.layers not in PRESETS]
    for phase in (recipe.temporal, recipe.sensitive):
        named += [pattern for pattern in patterns(phase.layers) if pattern != AUTO]
    select(roles, named)


def matching(roles: Mapping[str, Role], wanted: str) -> set[str]:
    """The layers that one preset, pattern or name stands for; perhaps none."""
    preset = PRESETS.get(wanted)
    return {
        name
        for name, role in roles.items()
        if (preset(name, role) if preset else fnmatch.fnmatchcase(name, wanted))
    }


def layer_bits(roles: Mapping[str, Role], recipe: Recipe) -> dict[str, tuple[int, int]]:
    """(weight bits, activation bits) of every layer: the recipe's, 8 at both ends of the network, then its overrides.

    Layers that carry time have none where tables take their place.

    Raises:
        ConfigError: the pattern of an override stands for no layer of this model.
    """
    bits = {
        name: (BOUNDARY_BITS, BOUNDARY_BITS)
        if role == "boundary"
        else (recipe.weight_bits, recipe.activation_bits)
        for name, role in roles.items()
        if role != "temporal" or recipe.temporal_path == "quantized"
    }
    for override in recipe.overrides:
        # A preset may stand for nothing: a packaged recipe serves models that do not have such layers.
        find = matching if override.layers in PRESETS else select
        for name in find(roles, override.layers) & bits.keys():
            weight, activation = bits[name]
            bits[name] = (override.weight_bits or weight, override.activation_bits or activation)
    return bits


def for_layer(recipe: Recipe, name: str, timeless: Collection[str]) -> Recipe:
    """`recipe` as it holds for one layer: those that the timestep does not reach have one activation scale."""
    return dataclasses.replace(recipe, time_aware=False) if name in timeless else recipe

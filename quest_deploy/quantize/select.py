"""Names for sets of layers: presets and shell patterns, and the bits that a recipe gives to each layer."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence

from quest_deploy.config import Recipe
from quest_deploy.errors import ConfigError
from quest_deploy.quantize.insert import Role, Roles

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


Preset = Callable[[str, Mapping[str, Role]], bool]
"""Whether a preset stands for the layer of that name, one of those whose roles are given."""

PRESETS: dict[str, Preset] = {
    "none": lambda name, roles: False,
    "temporal": lambda name, roles: roles[name] == "temporal",
    # What the published runs call embedding layers: the `time_emb_proj` of a U-Net's residual blocks, the modulations
    # of a transformer's.
    "time-projections": lambda name, roles: isinstance(roles, Roles) and name in roles.outlets,
    # The lists of the published runs: Stable Diffusion, class-conditional LDM, unconditional LDM.
    "paper-sd": lambda name, roles: _feed_forward(name),
    "paper-cldm": lambda name, roles: (
        _feed_forward(name)
        or _parts(name, "to_q")
        or (_parts(name, "attn1") and _parts(name, "to_k", "to_v"))
    ),
    # What the published code has in one layer, qkv, diffusers has in three.
    "paper-uncond": lambda name, roles: _parts(name, "qkv", "to_q", "to_k", "to_v"),
    "attention-and-feed-forward": lambda name, roles: "transformer_blocks" in name,
    "residual-projections": lambda name, roles: _residual_projection(name),
    "all": lambda name, roles: True,
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
    lost = [repr(wanted) for wanted, names in found.items() if not names and wanted != "none"]
    if lost:
        raise ConfigError(
            f"layers {', '.join(lost)} {'stand' if len(lost) > 1 else 'stands'} for no layer of this model; "
            f"give a preset ({', '.join(PRESETS)}), or a pattern of layer names such as 'mid_block.*'"
        )
    return set[str]().union(*found.values())


def check_layers(roles: Mapping[str, Role], recipe: Recipe) -> None:
    """See that all patterns of a recipe's overrides and phases stand for some layer.

    Raises:
        ConfigError: lists those that do not.
    """
    named = _named_by_overrides(recipe)
    for phase in (recipe.temporal, recipe.sensitive):
        named += [pattern for pattern in patterns(phase.layers) if pattern != AUTO]
    select(roles, named)


def _named_by_overrides(recipe: Recipe) -> list[str]:
    """But for presets, which may stand for nothing: a packaged recipe serves models that do not have such layers."""
    return [override.layers for override in recipe.overrides if override.layers not in PRESETS]


def matching(roles: Mapping[str, Role], wanted: str) -> set[str]:
    """The layers that one preset, pattern or name stands for; perhaps none."""
    preset = PRESETS.get(wanted)
    return {name for name in roles if (preset(name, roles) if preset else fnmatch.fnmatchcase(name, wanted))}


def layer_bits(roles: Mapping[str, Role], recipe: Recipe) -> dict[str, tuple[int, int]]:
    """(weight bits, activation bits) of every layer: the recipe's, 8 at both ends of the network, then its overrides.

    Layers that carry time have none where tables take their place.

    Raises:
        ConfigError: lists the patterns of overrides that stand for no layer of this model.
    """
    bits = {
        name: (BOUNDARY_BITS, BOUNDARY_BITS)
        if role == "boundary"
        else (recipe.weight_bits, recipe.activation_bits)
        for name, role in roles.items()
        if role != "temporal" or recipe.temporal_path == "quantized"
    }
    select(roles, _named_by_overrides(recipe))
    for override in recipe.overrides:
        for name in matching(roles, override.layers) & bits.keys():
            weight, activation = bits[name]
            bits[name] = (override.weight_bits or weight, override.activation_bits or activation)
    return bits


def for_layer(recipe: Recipe, name: str, timeless: Collection[str]) -> Recipe:
    """`recipe` as it holds for one layer: those that the timestep does not reach have one activation scale."""
    return dataclasses.replace(recipe, time_aware=False) if name in timeless else recipe

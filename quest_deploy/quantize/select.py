"""Names for sets of layers: presets and shell patterns, and the bits that a recipe gives to each layer."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence

from quest_deploy.config import Recipe
from quest_deploy.errors import ConfigError
from quest_deploy.quantize.insert import role_of

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


PRESETS: dict[str, Callable[[str], bool]] = {
    "none": lambda name: False,
    "temporal": lambda name: role_of(name) == "temporal",
    # The lists of the published runs: Stable Diffusion, class-conditional LDM, unconditional LDM.
    "paper-sd": _feed_forward,
    "paper-cldm": lambda name: (
        _feed_forward(name)
        or _parts(name, "to_q")
        or (_parts(name, "attn1") and _parts(name, "to_k", "to_v"))
    ),
    "paper-uncond": lambda name: _parts(name, "qkv"),
    "attention-and-feed-forward": lambda name: "transformer_blocks" in name,
    "residual-projections": _residual_projection,
    "all": lambda name: True,
}


def select(names: Iterable[str], layers: str | Sequence[str]) -> set[str]:
    """The layers among `names` that `layers` stands for.

    Args:
        names: Of a model's layers.
        layers: A preset, a shell pattern (``up_blocks.2.*``) or a layer's name; or several of them.

    Raises:
        ConfigError: one of them stands for no layer of this model.
    """
    known = list(names)
    chosen: set[str] = set()
    for wanted in [layers] if isinstance(layers, str) else layers:
        preset = PRESETS.get(wanted)
        found = {n for n in known if (preset(n) if preset else fnmatch.fnmatchcase(n, wanted))}
        if not found and wanted != "none":
            raise ConfigError(
                f"layers {wanted!r} stands for no layer of this model; give a preset ({', '.join(PRESETS)}), "
                "or a pattern of layer names such as 'mid_block.*'"
            )
        chosen |= found
    return chosen


def layer_bits(names: Iterable[str], recipe: Recipe) -> dict[str, tuple[int, int]]:
    """(weight bits, activation bits) of every layer: the recipe's, 8 at both ends of the network, then its overrides.

    Raises:
        ConfigError: the pattern of an override stands for no layer of this model.
    """
    bits = {
        name: (BOUNDARY_BITS, BOUNDARY_BITS)
        if role_of(name) == "boundary"
        else (recipe.weight_bits, recipe.activation_bits)
        for name in names
    }
    for override in recipe.overrides:
        # A preset may stand for nothing: a packaged recipe serves models that do not have such layers.
        chosen = {n for n in bits if PRESETS[override.layers](n)} if override.layers in PRESETS else None
        for name in select(bits, override.layers) if chosen is None else chosen:
            weight, activation = bits[name]
            bits[name] = (override.weight_bits or weight, override.activation_bits or activation)
    return bits

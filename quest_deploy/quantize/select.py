"""Which layers' weights a phase finetunes."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from quest_deploy.errors import ConfigError
from quest_deploy.quantize.insert import role_of


def _parts(name: str, *wanted: str) -> bool:
    return any(part in name.split(".") for part in wanted)


def _feed_forward(name: str) -> bool:
    return ".ff.net." in f".{name}."


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
    "all": lambda name: True,
}


def select(names: Iterable[str], preset: str) -> set[str]:
    """The layers among `names` that `preset` stands for.

    Raises:
        ConfigError: the preset is unknown, or stands for no layer of this model.
    """
    if preset not in PRESETS:
        raise ConfigError(f"layers {preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    chosen = {name for name in names if PRESETS[preset](name)}
    if not chosen and preset != "none":
        raise ConfigError(
            f"layers {preset!r} stands for no layer of this model; choose another preset, or all"
        )
    return chosen

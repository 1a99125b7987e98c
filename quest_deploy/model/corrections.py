"""What diffusers' pipelines change in the configurations of their first models as they load them.

The files say otherwise, and exported directories hold files alone: what is read from them goes through here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from quest_deploy.model.families import Family
from quest_deploy.model.libraries import class_of

SCHEDULER: Mapping[str, Mapping[str, Any]] = {
    "StableDiffusionPipeline": {"steps_offset": 1, "clip_sample": False},
    "StableDiffusionInpaintPipeline": {"steps_offset": 1, "skip_prk_steps": True},
}
"""By pipeline, what those settings of a scheduler are whatever its file says, where it has them."""

MIN_SAMPLE_SIZE = 64
FIRST_RIGHT_VERSION = (0, 9)
"""Of diffusers: U-Nets that earlier ones saved have their sample size raised."""


def corrected_scheduler(scheduler: Any, family: Family) -> Any:
    """A scheduler of diffusers as the family's pipeline has it; the one given where that is the same."""
    if family.pipeline == "DDIMPipeline" and type(scheduler).__name__ != "DDIMScheduler":
        return class_of("diffusers", "DDIMScheduler").from_config(scheduler.config)
    changes = {
        key: value for key, value in SCHEDULER.get(family.pipeline, {}).items() if key in scheduler.config
    }
    if not changes:
        return scheduler
    # diffusers takes what is listed there for unset when it makes a scheduler from this configuration.
    unset = [name for name in scheduler.config.get("_use_default_values", ()) if name not in changes]
    return type(scheduler).from_config({**scheduler.config, **changes, "_use_default_values": unset})


def corrected_denoiser(config: Mapping[str, Any], family: Family) -> Mapping[str, Any]:
    """A denoiser's configuration as the family's pipeline has it; the one given where that is the same."""
    size = config.get("sample_size")
    if family.pipeline in SCHEDULER and isinstance(size, int) and size < MIN_SAMPLE_SIZE and _is_old(config):
        return {**config, "sample_size": MIN_SAMPLE_SIZE}
    return config


def _is_old(config: Mapping[str, Any]) -> bool:
    saved_by = re.match(r"(\d+)\.(\d+)", str(config.get("_diffusers_version")))
    return saved_by is not None and tuple(map(int, saved_by.groups())) < FIRST_RIGHT_VERSION

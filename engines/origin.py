"""Where engines were built, against where they are: what differs, and the options that build them here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from quest_deploy.config import PROFILE_RANGES, BuildConfig, ProfileConfig, ShapeRange
from quest_deploy.engines.arithmetic import RTX_BY_DEFAULT, covers
from quest_deploy.engines.libraries import Gpu
from quest_deploy.errors import ConfigError


def differing(
    details: Mapping[str, Any], config: BuildConfig, library: str, gpu: Gpu, driver: str
) -> list[str]:
    """What a manifest says about the origin of engines that is otherwise here: how "it was built", a phrase each.

    Args:
        details: Of the manifest.
        config: Its configuration.
        library: Title and version of TensorRT here.
        gpu: The one that is here.
        driver: Its driver's version; "" where it is not known.
    """
    found = []
    was = f"{details.get('library')} {details.get('library_version')}"
    if was != library:
        found.append(f"with {was} (this is {library})")
    for_one_gpu = config.backend == "tensorrt" and config.hardware_compatible == "none"
    if for_one_gpu and details.get("target_gpu") != gpu.name:
        found.append(f"for {details.get('target_gpu')} (this is {gpu.name})")
    capability = built_for(details, config.backend)
    if not covers(capability, gpu.compute_capability):
        found.append(f"for compute capability {capability} (this is {gpu.compute_capability})")
    if driver and details.get("driver") not in (None, "", driver):
        found.append(f"under driver {details['driver']} (this is {driver})")
    return found


def built_for(details: Mapping[str, Any], backend: str) -> str:
    """The compute capabilities of engines, by their manifest's details."""
    said = str(details.get("compute_capability"))
    # Earlier versions said so of engines of TensorRT for RTX that run on fewer.
    return RTX_BY_DEFAULT if (backend, said) == ("tensorrt-rtx", "8.0 and later") else said


def read_config(content: Mapping[str, Any]) -> BuildConfig:
    """The configuration in a manifest of engines; the backend's default where it is damaged."""
    names = {field.name for field in dataclasses.fields(BuildConfig)}
    given = {name: value for name, value in content.items() if name in names}
    try:
        more = tuple(ProfileConfig(**_ranges(one)) for one in given.pop("more_profiles", ()))
        capabilities = tuple(given.pop("compute_capabilities", ()))
        return BuildConfig(**_ranges(given), more_profiles=more, compute_capabilities=capabilities)
    except (TypeError, AttributeError, ConfigError):
        return BuildConfig(backend="tensorrt" if content.get("backend") == "tensorrt" else "tensorrt-rtx")


def _ranges(content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a profile, with its ranges of sizes read."""
    sizes = {name: ShapeRange(**content[name]) for name in PROFILE_RANGES if content.get(name) is not None}
    return {**content, **sizes}


def build_options(config: BuildConfig) -> str:
    """The options of `build-engine` that make the engines of `config`.

    How they were made (jobs, memory, timing cache) is left out.
    """
    batch = config.batch
    words = ["--backend", config.backend]
    words += _given("--min-batch", batch.min, 1)
    words += _given("--opt-batch", batch.opt, batch.min)
    words += _given("--max-batch", batch.max, max(4, batch.opt))
    for axis in ("height", "width"):
        size: ShapeRange | None = getattr(config, axis)
        if size is not None:
            words += _given(f"--min-{axis}", size.min, size.opt)
            words += [f"--opt-{axis}", str(size.opt)]
            words += _given(f"--max-{axis}", size.max, size.opt)
    for profile in config.more_profiles:
        sizes = {name: getattr(profile, name) for name in PROFILE_RANGES}
        given = [f"{name}={one.min}:{one.opt}:{one.max}" for name, one in sizes.items() if one is not None]
        words += ["--profile", ",".join(given)]
    words += _given("--optimization-level", config.optimization_level, None)
    words += _given("--workspace", config.workspace_mb, None)
    words += _given("--hardware-compatible", config.hardware_compatible, "none")
    for capability in config.compute_capabilities:
        words += ["--compute-capability", capability]
    for name in ("static", "version_compatible", "weight_streaming", "strip_weights", "auto_fallback"):
        words += [f"--{name.replace('_', '-')}"] if getattr(config, name) else []
    return " ".join(words)


def _given(option: str, value: object, default: object) -> list[str]:
    return [] if value == default else [option, str(value)]


def options_here(config: BuildConfig, gpu: Gpu) -> str:
    """The options of `build-engine` that make engines as `config` does, but for this GPU and with their weights."""
    capabilities = config.compute_capabilities
    made_for = ", ".join(capabilities) or RTX_BY_DEFAULT
    if config.backend == "tensorrt-rtx" and not covers(made_for, gpu.compute_capability):
        capabilities = (gpu.compute_capability,)
    return build_options(dataclasses.replace(config, compute_capabilities=capabilities, strip_weights=False))

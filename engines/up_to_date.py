"""Which engines of an earlier build still are what a new build would make, and what is different about the others."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quest_deploy.artifacts import Artifact, read_artifact
from quest_deploy.config import BuildConfig, to_dict
from quest_deploy.engines.origin import built_for
from quest_deploy.errors import ArtifactError
from quest_deploy.files import hash_mapping
from quest_deploy.manifest import MANIFEST_NAME, Manifest, made_by, read_manifest

PLAN_NAME = "model.plan"
CONFIGURATIONS = (".json", ".txt", ".md")
"""What lies beside a graph and is none of its weights."""

logger = logging.getLogger(__name__)

# What a manifest says about an engine, by type.
_NEEDED: dict[str, type | tuple[type, ...]] = {"size_bytes": int, "seconds": (int, float), "verified": bool}
_OPTIONAL: dict[str, type] = {"graph_digest": str, "fallback": list, "auto_fallback": dict}

COMPANIONS = "other files"
"""Stands for everything beside the engines: tokenizer, scheduler, configuration files."""


def existing_engines(output: Path) -> Artifact | None:
    """The `engines` artifact at `output`, with all its hashes verified; None where there is none to rely on."""
    if not (Path(output) / MANIFEST_NAME).is_file():
        return None
    try:
        if read_manifest(Path(output)).stage != "engines":
            return None
        engines = read_artifact(Path(output), stage="engines")
        check_reports(engines)
        return engines
    except ArtifactError as error:
        logger.warning("nothing of the engines that are there is used again: %s", error)
        return None


def check_reports(engines: Artifact) -> None:
    """Check what the manifest says about each engine, as far as it is relied on.

    Raises:
        ArtifactError: it is damaged.
    """
    components = engines.manifest.details.get("components")
    if not isinstance(components, dict):
        raise _damaged(engines, f"'components' is {components!r}")
    for name, report in components.items():
        if not isinstance(report, dict):
            raise _damaged(engines, f"'{name}' is {report!r}")
        if f"{name}/{PLAN_NAME}" not in engines.manifest.files:
            raise _damaged(engines, f"'{name}/{PLAN_NAME}' is not among its files")
        for field, kind in _NEEDED.items():
            if not isinstance(report.get(field), kind):
                raise _damaged(engines, f"'{field}' of '{name}' is {report.get(field)!r}")
        for field, kind in _OPTIONAL.items():
            if not isinstance(report.get(field, kind()), kind):
                raise _damaged(engines, f"'{field}' of '{name}' is {report[field]!r}")


def _damaged(engines: Artifact, what: str) -> ArtifactError:
    return ArtifactError(
        f"'{engines.path / MANIFEST_NAME}': {what}; the manifest is damaged, make the engines again with "
        f"{made_by('engines')}"
    )


def reports_of(engines: Manifest) -> dict[str, dict[str, Any]]:
    """What a manifest says about each engine, with the memory limit that this engine was built with.

    A later build may have kept it under another limit, which is that of the configuration.
    """
    limit = engines.config.get("memory_limit_gb")
    reports = engines.details.get("components", {})
    return {name: {"memory_limit_gb": limit, **report} for name, report in reports.items()}


def graph_digest(source: Manifest, component: str) -> str:
    """Identity of a component's graph and of its weights, which may lie in files of any name beside it."""
    return hash_mapping(
        {
            name: entry.sha256
            for name, entry in source.files.items()
            if component_of_graph(source, name) == component
        }
    )


def companions_digest(source: Manifest) -> str:
    """Identity of what is copied beside the engines."""
    return hash_mapping(
        {
            name: entry.sha256
            for name, entry in source.files.items()
            if component_of_graph(source, name) is None
        }
    )


def component_of_graph(source: Manifest, name: str) -> str | None:
    """The component whose graph or weights a file holds; None for configurations and all else."""
    component, _, _ = name.partition("/")
    if f"{component}/model.onnx" not in source.files or Path(name).suffix in CONFIGURATIONS:
        return None
    return component


def differences(
    old: Manifest,
    source: Manifest,
    profiles: Mapping[str, Sequence[Any]],
    config: Mapping[str, Any],
    *,
    options: Sequence[str],
    library: str,
    target: Mapping[str, Any],
    driver: str = "",
) -> dict[str, str]:
    """The first difference of every component that has to be built again, in words; empty where all is up to date.

    Args:
        old: Of the engines that are there.
        source: Of the `onnx` artifact.
        profiles: By component, in JSON types.
        config: The new build's, in JSON types.
        options: Names in `config` that every engine depends on.
        library: Title and version of TensorRT.
        target: The entries of the manifest's details that say for which GPUs engines are.
        driver: The version that engines have to be built under; "" where any will do.
    """
    common = _common(old, config, options, library, target, driver)
    found: dict[str, str] = {}
    built = reports_of(old)
    for name, wanted in profiles.items():
        if common is not None:
            found[name] = common
        elif name not in built:
            found[name] = "there is no engine of it"
        elif built[name].get("graph_digest") != graph_digest(source, name):
            found[name] = "its ONNX graph or weights changed"
        elif _in_any_order(built[name].get("requested_profiles")) != _in_any_order(list(wanted)):
            found[name] = "other shapes are asked for"
        elif built[name].get("auto_fallback", {}).get("left_in_float") and not config.get("auto_fallback"):
            found[name] = "some of its products were left in floats, for --auto-fallback"
        elif built[name].get("fallback") and _may_take_more(built[name]["memory_limit_gb"], config):
            found[name] = "it was built with less, for want of memory"
    if not found and (
        old.details.get("companions_digest") != companions_digest(source) or built.keys() != profiles.keys()
    ):
        found[COMPANIONS] = "they changed in the ONNX directory"
    return found


def _common(
    old: Manifest,
    config: Mapping[str, Any],
    options: Sequence[str],
    library: str,
    target: Mapping[str, Any],
    driver: str,
) -> str | None:
    was = f"{old.details.get('library')} {old.details.get('library_version')}"
    if was != library:
        return f"it was built with {was}, this is {library}"
    before_this = {
        **old.details,
        "compute_capability": built_for(old.details, str(old.config.get("backend"))),
    }
    for name, value in target.items():
        if _as_set(before_this.get(name)) != _as_set(value):
            return f"it was built for {before_this.get(name)}, this is {value}"
    if driver and old.details.get("driver") not in (None, "", driver):
        return f"it was built under driver {old.details['driver']}, this is {driver}"
    # Engines of a version without an option are what its default makes.
    defaults = json.loads(json.dumps(to_dict(BuildConfig())))
    for name in options:
        before, now = old.config.get(name, defaults.get(name)), config.get(name)
        if _as_set(before) != _as_set(now):
            return f"{name} was {before}, is {now}"
    return None


def _as_set(value: Any) -> Any:
    """Several compute capabilities, which a manifest lists or joins, without their order; all else as it is."""
    several = value.split(", ") if isinstance(value, str) else value
    return {str(one) for one in several} if isinstance(several, list) else value


def _in_any_order(profiles: Any) -> Any:
    """Optimization profiles, those after the first in an order of their own: as they were given means nothing."""
    if not isinstance(profiles, list):
        return profiles
    return [*profiles[:1], *sorted(profiles[1:], key=lambda profile: json.dumps(profile, sort_keys=True))]


def _may_take_more(before: Any, config: Mapping[str, Any]) -> bool:
    """Whether a build may take more memory than the one before, which had a limit."""
    now = config.get("memory_limit_gb")
    return isinstance(before, int | float) and (now is None or now > before)


def in_words(found: Mapping[str, str]) -> str:
    """All differences in one line, each once."""
    reasons = dict.fromkeys(found.values())
    return "; ".join(
        f"{', '.join(name for name, why in found.items() if why == reason)}: {reason}" for reason in reasons
    )

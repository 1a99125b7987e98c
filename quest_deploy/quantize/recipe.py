"""Recipes: packaged ones by name, others as YAML files."""

from __future__ import annotations

import dataclasses
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from quest_deploy.config import BitsOverride, PhaseConfig, Recipe, raise_if_any
from quest_deploy.errors import ConfigError

PACKAGED = ("w8a8", "w4a8", "w4a4")
# The published runs' settings, one for each of the paper's tasks.
PAPER = ("paper-sd", "paper-cldm", "paper-uncond")
NAMES = (*PACKAGED, *PAPER)
PHASES = ("temporal", "sensitive")
# A union with a Literal in it is another type than one of plain types.
UNIONS = (types.UnionType, typing.Union)


def load_recipe(source: str) -> Recipe:
    """A packaged recipe by name, or the recipe in a YAML file.

    Raises:
        ConfigError: lists everything that is wrong with it.
    """
    if source in NAMES:
        text = (resources.files("quest_deploy") / "recipes" / f"{source}.yaml").read_text(encoding="utf-8")
    else:
        text = _read(source)
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {source}: is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"recipe {source}: got {type(fields).__name__}, expected a mapping of fields")
    return recipe_from_dict({"name": Path(source).stem, **fields})


def recipe_from_dict(fields: dict[str, Any]) -> Recipe:
    """A recipe from plain types, as written into manifests.

    Raises:
        ConfigError: lists every unknown, missing or mistyped field.
    """
    what = f"recipe {fields.get('name', '')}".rstrip()
    problems = _problems(Recipe, fields, "")
    for phase in PHASES:
        value = fields.get(phase)
        if isinstance(value, dict):
            problems += _problems(PhaseConfig, value, f"{phase}.")
        elif phase in fields:
            problems.append(f"{phase} is {value!r}, expected a mapping of fields")
    overrides = fields.get("overrides", ())
    if isinstance(overrides, list | tuple):
        for index, entry in enumerate(overrides):
            if isinstance(entry, dict):
                problems += _problems(BitsOverride, entry, f"overrides[{index}].")
            else:
                problems.append(f"overrides[{index}] is {entry!r}, expected a mapping of fields")
    raise_if_any(problems, what)
    parts: dict[str, Any] = {"overrides": ()}
    for phase in PHASES:
        try:
            layers = fields[phase]["layers"]
            layers = layers if isinstance(layers, str) else tuple(layers)
            parts[phase] = PhaseConfig(**{**fields[phase], "layers": layers})
        except ConfigError as error:
            problems.append(f"{phase}: {error}")
            # Stands in, so that what is wrong elsewhere is found as well.
            parts[phase] = PhaseConfig(layers="none", steps=0)
    try:
        parts["overrides"] = tuple(BitsOverride(**entry) for entry in overrides)
    except ConfigError as error:
        problems.append(str(error))
    try:
        recipe = Recipe(**{**fields, **parts})
    except ConfigError as error:
        problems.append(str(error).removeprefix(f"{what}: "))
    raise_if_any(problems, what)
    return recipe


def _problems(kind: type, fields: dict[str, Any], prefix: str) -> list[str]:
    known = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    problems = [f"{prefix}{name} is unknown" for name in fields if name not in known]
    for name, field in known.items():
        if name not in fields:
            if field.default is dataclasses.MISSING:
                problems.append(f"{prefix}{name} is missing")
        elif not _fits(fields[name], hints[name]):
            problems.append(f"{prefix}{name} is {fields[name]!r}, expected {_describe(hints[name])}")
    return problems


def _fits(value: object, hint: Any) -> bool:
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if typing.get_origin(hint) in UNIONS:
        return any(_fits(value, kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        return isinstance(value, list | tuple) and all(_fits(item, kind) for item in value)
    return not isinstance(hint, type) or dataclasses.is_dataclass(hint) or isinstance(value, hint)


def _describe(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return "one of " + ", ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in UNIONS:
        return " or ".join(_describe(kind) for kind in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return "a list"
    return {
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "str": "text",
        "NoneType": "nothing",
    }.get(getattr(hint, "__name__", ""), str(hint))


def _read(source: str) -> str:
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"recipe {source!r} is unknown; choose {', '.join(NAMES)}, or give a YAML file")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {source}: cannot be read ({error}); choose {', '.join(NAMES)}") from error

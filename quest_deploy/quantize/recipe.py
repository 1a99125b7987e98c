"""Recipes: packaged ones by name, others as YAML files."""

from __future__ import annotations

import dataclasses
import sys
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
# What takes the place of a field that cannot be used, so that what is wrong elsewhere is found as well, and nothing
# is found that is not. All others have a default that does.
STAND_INS = {
    "name": "",
    "layers": "none",
    "steps": 0,
    "weight_bits": 8,
    "activation_bits": 8,
    "attention_bits": 8,
    "calibration_prompts": sys.maxsize,
    "temporal": PhaseConfig(layers="none", steps=0),
    "sensitive": PhaseConfig(layers="none", steps=0),
}
Part = typing.TypeVar("Part", PhaseConfig, BitsOverride)


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
        loader = NotingLoader(text)
        fields = loader.get_single_data()
    # A date that no calendar has is a ValueError.
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"recipe {source}: is not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"recipe {source}: got {type(fields).__name__}, expected a mapping of fields")
    return _recipe({"name": Path(source).stem, **fields}, loader.repeated)


def recipe_from_dict(fields: dict[str, Any]) -> Recipe:
    """A recipe from plain types, as written into manifests.

    Raises:
        ConfigError: lists everything that is wrong with it.
    """
    return _recipe(fields, [])


class NotingLoader(yaml.SafeLoader):
    """Notes in `repeated` the keys that a mapping has twice, of which YAML's loaders keep the last."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.repeated: list[str] = []

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                continue
            if key.value in lines:
                self.repeated.append(f"{key.value} is in lines {lines[key.value]} and {line}, expected once")
            lines[key.value] = line
        return node


def _recipe(fields: dict[str, Any], problems: list[str]) -> Recipe:
    what = f"recipe {fields.get('name', '')}".rstrip()
    given = _sound(Recipe, fields, "", problems)
    for phase in PHASES:
        if phase in fields:
            given[phase] = _part(PhaseConfig, fields[phase], phase, problems) or given[phase]
    overrides = (
        _part(BitsOverride, entry, f"overrides[{index}]", problems)
        for index, entry in enumerate(given.get("overrides", ()))
    )
    given["overrides"] = tuple(override for override in overrides if override is not None)
    try:
        recipe = Recipe(**given)
    except ConfigError as error:
        problems.append(str(error).removeprefix(f"recipe {given['name']}: "))
    raise_if_any(problems, what)
    return recipe


def _part(kind: type[Part], value: object, place: str, problems: list[str]) -> Part | None:
    """A phase or an override; None, and what is wrong is noted, where it cannot be made."""
    if not isinstance(value, dict):
        problems.append(f"{place} is {value!r}, expected a mapping of fields")
        return None
    given = _sound(kind, value, f"{place}.", problems)
    try:
        return kind(**given)
    except ConfigError as error:
        problems.append(f"{place}: {error}")
        return None


def _sound(kind: type, fields: dict[str, Any], prefix: str, problems: list[str]) -> dict[str, Any]:
    """What `kind` can be made of: `fields`, but for those of wrong types, which are noted."""
    known = {field.name: field for field in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    problems += [f"{prefix}{name} is unknown" for name in fields if name not in known]
    sound: dict[str, Any] = {}
    for name, field in known.items():
        if name in fields and _fits(fields[name], hints[name]):
            value = fields[name]
            sound[name] = tuple(value) if isinstance(value, list) else value
            continue
        if name in fields:
            problems.append(f"{prefix}{name} is {fields[name]!r}, expected {_describe(hints[name])}")
        elif field.default is dataclasses.MISSING:
            problems.append(f"{prefix}{name} is missing")
        if name in STAND_INS and (name in fields or field.default is dataclasses.MISSING):
            sound[name] = STAND_INS[name]
    return sound


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

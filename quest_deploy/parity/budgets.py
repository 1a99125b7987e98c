"""Budgets: what quantization may cost, read from YAML; every mistake in a file is reported at once."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from quest_deploy.errors import ConfigError
from quest_deploy.quantize.recipe import NotingLoader


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Floors for one recipe; None is not gated."""

    noise_snr_db_min: float | None = None
    image_psnr_db_min: float | None = None
    image_ssim_min: float | None = None


_FLOORS = tuple(field.name for field in fields(Budget))


def packaged_budget() -> Any:
    """The file whose floors hold where the user gives none."""
    return resources.files("quest_deploy") / "data" / "budgets.yaml"


def load_budget(path: Path | None, recipe: str | None) -> Budget:
    """The floors for `recipe`.

    Args:
        path: A YAML file with floors at the top level, under ``recipes: {NAME: {...}}``, or both; None means the
            packaged file.
        recipe: Name of the recipe; None gives the floors of the top level alone.

    Raises:
        ConfigError: the file cannot be read or holds mistakes (it names all of them).
    """
    content = _read(path or packaged_budget())
    floors = {**content, **(_recipes(content).get(recipe) or {})}
    return Budget(**{name: float(floors[name]) for name in _FLOORS if floors.get(name) is not None})


def check_names(path: Path, recipes: Collection[str]) -> None:
    """Refuse a budget whose names are not those of the recipes that it is given for: such floors would hold nothing.

    Names of other recipes may stand beside the right ones. Where a recipe is not named, floors of the top level hold
    for it, and then names of packaged recipes may be there too; any other is taken for a mistyped one.

    Args:
        path: The budget of the user.
        recipes: Those of all quantized rungs.

    Raises:
        ConfigError: a name stands for nothing, or the file cannot be used.
    """
    content = _read(path)
    names = [str(name) for name in _recipes(content)]
    missing = sorted(set(recipes) - set(names))
    known = {*recipes, *_recipes(_read(packaged_budget()))}
    general = any(content.get(name) is not None for name in _FLOORS)
    idle = [name for name in names if name not in (known if general else recipes)]
    if missing and idle:
        raise ConfigError(
            f"budget {path}: recipes.{idle[0]} stands for no recipe here, expected {' or '.join(missing)}; correct "
            "the name"
        )


def _recipes(content: Mapping[str, Any]) -> Mapping[Any, Any]:
    return content.get("recipes") or {}


def _read(source: Any) -> Mapping[str, Any]:
    """The content of a budget without mistakes.

    Raises:
        ConfigError: see :func:`load_budget`.
    """
    try:
        loader = NotingLoader(source.read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except OSError as error:
        raise ConfigError(f"budget {source}: cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"budget {source}: got binary data, expected YAML text") from error
    # A date that no calendar has is a ValueError.
    except (yaml.YAMLError, ValueError) as error:
        first, *_ = str(error).splitlines()
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or first
        raise ConfigError(
            f"budget {source}: is not valid YAML ({problem}{where}); correct the file"
        ) from error
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"budget {source}: got {_kind(content)}, expected floors ({', '.join(_FLOORS)}) or recipes"
        )
    problems = loader.repeated + _problems(content)
    if problems:
        raise ConfigError(f"budget {source}: " + "; ".join(problems))
    return content


def _problems(content: Mapping[str, Any]) -> list[str]:
    problems = _floor_problems("", {key: value for key, value in content.items() if key != "recipes"})
    recipes = content.get("recipes")
    if recipes is None:
        return problems
    if not isinstance(recipes, Mapping):
        return [*problems, f"recipes: got {_kind(recipes)}, expected recipe names with their floors"]
    for name, floors in recipes.items():
        if not isinstance(name, str):
            # No recipe would find its floors under it.
            problems.append(f"recipes.{name}: got {_kind(name)} for a name, expected text; put it in quotes")
        if isinstance(floors, Mapping):
            problems += _floor_problems(f"recipes.{name}.", floors)
        else:
            problems.append(f"recipes.{name}: got {_kind(floors)}, expected floors")
    return problems


def _floor_problems(prefix: str, floors: Mapping[Any, Any]) -> list[str]:
    problems = []
    for name, value in floors.items():
        if name not in _FLOORS:
            problems.append(f"{prefix}{name} is unknown, expected one of {', '.join(_FLOORS)}")
        elif value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            problems.append(f"{prefix}{name} is {value!r}, expected a number")
        # A NaN or an infinity would make a gate that always, or never, passes.
        elif value is not None and not abs(value) <= 1000:
            problems.append(f"{prefix}{name} is {value}, expected a number between -1000 and 1000")
        elif name == "image_ssim_min" and value is not None and not -1 <= value <= 1:
            problems.append(f"{prefix}{name} is {value}, expected a number between -1 and 1")
    return problems


def _kind(value: object) -> str:
    return "an empty file" if value is None else f"a {type(value).__name__}"

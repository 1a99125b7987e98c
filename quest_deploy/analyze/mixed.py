"""A recipe of mixed precision from a measured sensitivity."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from quest_deploy.config import Recipe, raise_if_any, to_dict
from quest_deploy.errors import ConfigError
from quest_deploy.files import write_text
from quest_deploy.quantize.allocate import (
    BOUNDARY,
    WIDTHS,
    Allocation,
    Bits,
    Budget,
    allocate,
    layers_to_finetune,
    literal,
    overrides,
    read_table,
    roles_of,
    summarize,
)

YAML_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class RecipeRequest:
    """What a recipe is asked for.

    Attributes:
        path: Where it is written.
        budget: Of bits; None keeps those of the recipe that it is based on.
        finetune_share: Share of all weights that the second phase trains; None keeps the recipe's layers.
    """

    path: Path
    budget: Budget | None
    finetune_share: float | None

    def __post_init__(self) -> None:
        problems = []
        if self.path.suffix not in YAML_SUFFIXES:
            problems.append(f"'{self.path}' is no YAML file; give a name that ends in .yaml")
        if not self.path.absolute().parent.is_dir():
            problems.append(f"'{self.path.parent}' is no directory; make it first")
        if self.budget is None and self.finetune_share is None:
            problems.append("there is nothing to choose; give a budget of bits, or --finetune-share")
        if self.finetune_share is not None and not 0 < self.finetune_share <= 1:
            problems.append(f"finetune share is {self.finetune_share:g}, expected above 0 and at most 1")
        raise_if_any(problems, "write-recipe")


def request_of(
    path: Path | None,
    finetune_share: float | None,
    recipe: Recipe,
    bits: Sequence[str],
    **budget: float | None,
) -> RecipeRequest | None:
    """The request of the given options; None where nothing is asked for.

    Args:
        path: Where the recipe is written.
        finetune_share: As of :class:`RecipeRequest`.
        recipe: What the new one is based on.
        bits: What each layer's damage will be measured at.
        budget: As of :class:`Budget`.

    Raises:
        ConfigError: a budget without a file to write, or the other way round, or without the damages that it needs.
    """
    given = {name: value for name, value in budget.items() if value is not None}
    if path is None:
        asked = [*given, *(["finetune_share"] if finetune_share is not None else [])]
        raise_if_any(
            [f"{', '.join(asked)} is given, but no file for the recipe; add --write-recipe FILE.yaml"]
            if asked
            else [],
            "analyze",
        )
        return None
    if finetune_share is not None and not recipe.sensitive.steps:
        raise ConfigError(
            "analyze: --finetune-share chooses layers for the second phase, which recipe "
            f"{recipe.name} has no steps for; give sensitive.steps in the recipe, or leave the share out"
        )
    needed = set(itertools.product(WIDTHS, WIDTHS)) if given else bits_of(recipe)
    missing = missing_bits(bits, needed)
    what = "a budget chooses among 4 and 8" if given else f"layers of recipe {recipe.name} have them"
    raise_if_any(
        [f"bits lack {', '.join(missing)}, and {what}; add them, or leave --bits out"] if missing else [],
        "analyze",
    )
    return RecipeRequest(
        path=path,
        budget=Budget(**given) if given else None,  # type: ignore[arg-type]
        finetune_share=finetune_share,
    )


def bits_of(recipe: Recipe) -> set[tuple[int, int]]:
    """(weight bits, activation bits) that layers of a recipe have where no two overrides are for one layer."""
    own = (recipe.weight_bits, recipe.activation_bits)
    overrides = recipe.overrides
    return {own, BOUNDARY} | {(one.weight_bits or own[0], one.activation_bits or own[1]) for one in overrides}


def missing_bits(bits: Sequence[str], needed: Iterable[tuple[int, int]]) -> list[str]:
    """Which of the `needed` (weight bits, activation bits) have no damage, where layers are measured at `bits`.

    Both together, or each alone.
    """
    measured = {str(Bits.parse(name)) for name in bits}
    return [
        f"w{weight}a{activation}"
        for weight, activation in sorted(needed, reverse=True)
        if f"w{weight}a{activation}" not in measured and not {f"w{weight}", f"a{activation}"} <= measured
    ]


def write_mixed_recipe(
    recipe: Recipe, sensitivity: Mapping[str, Any], request: RecipeRequest
) -> dict[str, Any]:
    """Choose bits and layers, and write the recipe.

    Args:
        recipe: What the new one is based on; with a budget its own overrides are replaced.
        sensitivity: Of an ``analysis.json``.
        request: Budget, share and file.

    Returns:
        What was chosen, for people and `--json`.

    Raises:
        ConfigError: the budget cannot be kept.
        ArtifactError: the file cannot be written.
    """
    from quest_deploy.quantize.select import (
        layer_bits,
    )  # which imports torch: a mistyped option is found without it

    table = read_table(sensitivity)
    bits = layer_bits(roles_of(table), recipe)
    table = [layer for layer in table if layer.name in bits]
    fields = {name: value for name, value in to_dict(recipe).items() if name != "name"}
    if request.budget is None:
        allocation = summarize(table, bits)
    else:
        allocation = allocate(table, request.budget)
        base = (recipe.weight_bits, recipe.activation_bits)
        fields["overrides"] = overrides(table, allocation.bits, base)
    trained: list[str] = []
    if request.finetune_share is not None:
        trained = layers_to_finetune(table, allocation.bits, request.finetune_share)
        fields["sensitive"] = {**fields["sensitive"], "layers": [literal(name) for name in trained]}
    text = "# Chosen by `quest-deploy analyze` from measured sensitivity: " + _sentence(allocation) + "\n"
    write_text(request.path, text + yaml.safe_dump(fields, sort_keys=False))
    chosen = {key: value for key, value in asdict(allocation).items() if key != "bits"}
    return {
        "path": str(request.path),
        **chosen,
        "layers": {name: f"w{w}a{a}" for name, (w, a) in allocation.bits.items()},
        "finetuned": trained,
        "summary": _sentence(allocation),
    }


def _sentence(allocation: Allocation) -> str:
    counts: dict[str, int] = {}
    for weight_bits, activation_bits in allocation.bits.values():
        key = f"W{weight_bits}A{activation_bits}"
        counts[key] = counts.get(key, 0) + 1
    return (
        f"{', '.join(f'{count} layers {key}' for key, count in sorted(counts.items()))}; on average "
        f"{allocation.average_weight_bits:.2f} weight bits and {allocation.average_activation_bits:.2f} activation "
        f"bits; predicted before finetuning: {allocation.snr_db:.1f} dB"
    )

"""docs/recipes.md names every field of a recipe, with the default and the meaning that the code gives it."""

from __future__ import annotations

from quest_deploy.quantize.select import PRESETS
from scripts.recipe_tables import PAGE, with_tables


def test_the_tables_of_recipes_are_those_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run: python -m scripts.recipe_tables"


def test_every_preset_is_in_the_document() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    assert all(any(f"`{preset}`" in row.split("|")[1] for row in rows) for preset in PRESETS)

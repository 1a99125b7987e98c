"""docs/recipes.md names every field of a recipe, with the default and the meaning that the code gives it."""

from __future__ import annotations

from scripts.recipe_tables import PAGE, with_tables


def test_the_tables_of_recipes_are_those_of_the_code() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert page == with_tables(page), "run: python -m scripts.recipe_tables"

"""Writes the tables of docs/recipes.md from the docstrings and defaults of quest_deploy/recipe_config.py.

    python -m scripts.recipe_tables

Everything between the page's two markers is replaced.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "recipes.md"
CONFIG = ROOT / "quest_deploy" / "recipe_config.py"
BEGIN, END = "<!-- fields: begin -->", "<!-- fields: end -->"
TITLES = {
    "Recipe": "Recipe",
    "PhaseConfig": "A phase (`temporal`, `sensitive`)",
    "BitsOverride": "An entry of `overrides`",
}


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(with_tables(text), encoding="utf-8")


def with_tables(page: str) -> str:
    """`page` with the tables that the code gives now."""
    before, rest = page.split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables(CONFIG.read_text(encoding='utf-8'))}\n\n{END}{after}"


def tables(source: str) -> str:
    classes = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    return "\n\n".join(f"## {title}\n\n{table(classes[name])}" for name, title in TITLES.items())


def table(node: ast.ClassDef) -> str:
    described = descriptions(ast.get_docstring(node) or "")
    rows = ["| field | default | |", "|---|---|---|"]
    for field in node.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            name = field.target.id
            default = "needed" if field.value is None else f"`{in_yaml(field.value)}`"
            rows.append(f"| `{name}` | {default} | {described[name]} |")
    return "\n".join(rows)


def descriptions(docstring: str) -> dict[str, str]:
    """The attributes of a Google docstring."""
    found: dict[str, str] = {}
    name = ""
    for line in docstring.split("Attributes:\n")[1].splitlines():
        if start := re.match(r"    (\w+): (.*)", line):
            name = start[1]
            found[name] = start[2]
        elif line.strip():
            found[name] += f" {line.strip()}"
    return {name: re.sub(r":\w+:`([^`]*)`", r"`\1`", text) for name, text in found.items()}


def in_yaml(value: ast.expr) -> str:
    plain = ast.literal_eval(value)
    special = {"None": "null", "True": "true", "False": "false", "()": "[]"}
    return special.get(str(plain), str(plain))


if __name__ == "__main__":
    main()

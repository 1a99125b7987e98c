"""What README.md tells people to type exists, as the code is now."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import click
import pytest

from quest_deploy.commands import main


def blocks(repository: Path, language: str) -> list[str]:
    """The fenced blocks of one language."""
    text = (repository / "README.md").read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def commands(repository: Path, program: str) -> list[list[str]]:
    """The arguments of every call of a program in the shell blocks."""
    lines = [line for block in blocks(repository, "bash") for line in block.splitlines()]
    calls = [shlex.split(line, comments=True) for line in lines]
    return [call[1:] for call in calls if call and call[0] == program]


def test_starts_with_a_picture_and_two_commands(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert re.match(r"!\[[^]]+\]\([^)]+\.png\)\n", text)
    first = blocks(repository, "bash")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]


def test_make_targets_exist(repository: Path) -> None:
    makefile = (repository / "Makefile").read_text(encoding="utf-8")
    text = (repository / "README.md").read_text(encoding="utf-8")
    targets = set(re.findall(r"\bmake ([a-z-]+)\b(?=[`\s])", text)) - {"it"}
    assert targets >= {"demo", "test", "bench", "gpu-check"}
    assert {target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)} == set()


def test_shell_commands_parse(repository: Path) -> None:
    calls = commands(repository, "quest-deploy")
    assert calls
    for verb, *arguments in calls:
        command = main.get_command(click.Context(main), verb)
        assert command is not None, verb
        command.make_context(verb, arguments)


def test_outputs_are_free_where_the_commands_are_run(repository: Path) -> None:
    """They read `reference-model`, so they are run in the checkout, which has an `engines` of its own."""
    outputs = [call[call.index("-o") + 1] for call in commands(repository, "quest-deploy") if "-o" in call]
    tracked = subprocess.run(["git", "ls-files"], cwd=repository, capture_output=True, text=True).stdout
    assert outputs and not {*outputs} & {line.split("/")[0] for line in tracked.splitlines()}


def test_every_command_is_in_the_table_and_no_other(repository: Path) -> None:
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `([a-z-]+)[ `]", text, re.MULTILINE) == main.list_commands(click.Context(main))


def test_python_imports_exist(repository: Path) -> None:
    for block in blocks(repository, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_relative_links_lead_somewhere(document: str, repository: Path) -> None:
    text = (repository / document).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^)#]+)", text) if "://" not in target]
    assert [target for target in targets if not (repository / target).exists()] == []


def test_extras_exist(repository: Path) -> None:
    pyproject = (repository / "pyproject.toml").read_text(encoding="utf-8")
    text = (repository / "README.md").read_text(encoding="utf-8")
    for extra in re.findall(r"pip install '\.\[([a-z-]+)\]'", text):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), extra

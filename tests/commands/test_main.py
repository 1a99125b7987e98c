"""The group: what it offers, and that asking for help is quick."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from quest_deploy import __version__
from quest_deploy.commands import VERBS, main
from quest_deploy.commands.verb import DONE, ERROR, INTERRUPTED, OVER_BUDGET, TERMINATED

HEAVY = ("torch", "onnx", "onnxruntime", "numpy", "diffusers", "transformers", "polygraphy", "rich")
LIGHT = "import sys; from quest_deploy.commands import main; sys.argv[1:] = {arguments!r}\ntry:\n    main()\nfinally:\n"
LIST = f"    print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"


def loaded_by(arguments: list[str]) -> str:
    done = subprocess.run(
        [sys.executable, "-c", LIGHT.format(arguments=arguments) + LIST], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stderr.strip()


def test_version() -> None:
    done = CliRunner().invoke(main, ["--version"])
    assert done.output == f"quest-deploy, version {__version__}\n"


def test_version_is_the_installed_one() -> None:
    assert importlib.metadata.version("quest-deploy") == __version__


def test_help_lists_every_verb() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    assert [name for name in VERBS if f"\n  {name} " in output] == list(VERBS)


def test_every_exit_code_is_told(repository: Path) -> None:
    codes = {DONE, ERROR, 2, OVER_BUDGET, INTERRUPTED, TERMINATED}
    readme = (repository / "README.md").read_text(encoding="utf-8")
    for text in (CliRunner().invoke(main, ["--help"]).output, readme):
        (told,) = re.findall(r"Exit codes: (.*?)\.\n", text, re.DOTALL)
        assert {int(number) for number in re.findall(r"\d+", told)} == codes
        assert "rung that could not be run" in " ".join(told.split()) and "lint errors" in " ".join(
            told.split()
        )


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([verb, "--help"] for verb in VERBS)])
def test_help_loads_nothing_heavy(arguments: list[str]) -> None:
    assert loaded_by(arguments) == "LOADED"


def test_help_takes_less_than_half_a_second() -> None:
    """The fastest of five, since other processes share the machine."""
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(
            [sys.executable, "-c", "from quest_deploy.commands import main; main(['--help'])"],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb: str) -> None:
    output = CliRunner().invoke(main, [verb, "--help"]).output
    assert "--json" in output
    assert "--verbose" in output


def test_unknown_verb_is_a_usage_error() -> None:
    done = CliRunner().invoke(main, ["finetun"])
    assert done.exit_code == 2
    assert "No such command 'finetun'" in done.stderr


def test_wrong_usage_with_json_is_on_both_streams() -> None:
    done = CliRunner().invoke(main, ["export", "model", "--target", "none", "--json"])
    assert done.exit_code == 2
    error = json.loads(done.stdout)["error"]
    assert error["type"] == "UsageError" and error["message"] in done.stderr.replace("\n", " ")


def test_a_word_after_two_dashes_is_no_option() -> None:
    done = CliRunner().invoke(main, ["finetun", "--", "--json"])
    assert (done.exit_code, done.stdout) == (2, "")

"""The Makefile's virtual environment, with an interpreter that only notes what it is asked to do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# Stands for `python3` and, once "venv" has copied it, for `.venv/bin/python`.
INTERPRETER = """#!/bin/bash
case "$*" in
    "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python && cp "$0" .venv/bin/pip ;;
    -m\\ pip*) echo "$*" >> pip-calls ;;
    -c*) "PYTHON" -c "import sys; sys.version_info = (3, $MINOR); exec(sys.argv[1])" "$2" ;;
esac
"""


@pytest.fixture
def checkout(repository: Path, tmp_path: Path) -> Path:
    """What `make` reads, in a path with a space."""
    folder = tmp_path / "a checkout"
    folder.mkdir()
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(repository / name, folder)
    (folder / "interpreter").write_text(INTERPRETER.replace("PYTHON", sys.executable))
    (folder / "interpreter").chmod(0o755)
    return folder


def installs(checkout: Path, *, minor: int = 11) -> list[str]:
    """What pip is told while the environment is made."""
    command = ["make", "-s", ".venv/quest-deploy-installed", "PYTHON=./interpreter"]
    path = {"PATH": "/usr/local/bin:/usr/bin:/bin", "MINOR": str(minor)}
    done = subprocess.run(command, cwd=checkout, env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (checkout / "pip-calls").read_text().splitlines()


@pytest.mark.parametrize("minor", [11, 12, 13])
def test_the_tested_versions_are_installed(checkout: Path, minor: int) -> None:
    calls = installs(checkout, minor=minor)
    assert len(calls) == 3 and all("-c constraints.txt" in call for call in calls)


def test_python_3_10_gets_versions_that_exist_for_it(checkout: Path) -> None:
    """numpy 2.4.6, for one, is for Python 3.11 and later."""
    calls = installs(checkout, minor=10)
    assert len(calls) == 3 and not any("constraints.txt" in call for call in calls)


def test_an_environment_that_was_interrupted_before_it_had_pip_is_finished(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout / "interpreter", checkout / ".venv" / "bin" / "python")
    assert len(installs(checkout)) == 3 and (checkout / ".venv" / "bin" / "pip").exists()

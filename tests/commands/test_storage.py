"""Disks that refuse and writes that are interrupted, at every stage, in processes of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tmpfs import run_on_tmpfs

COMMAND = [sys.executable, "-m", "quest_deploy.commands"]
FAST = ("--steps", "2", "--guidance-scale", "2")

pytestmark = pytest.mark.timeout(300)


def arguments(verb: str, model: Path, onnx: Path, recipe: Path = Path("w8a8")) -> list[str]:
    """A sound request of each verb, but for its output."""
    words: dict[str, tuple[object, ...]] = {
        "finetune": ("finetune", model, "--recipe", recipe),
        "export": ("export", model),
        "build-engine": ("build-engine", onnx),
        "generate": ("generate", onnx, "a prompt", *FAST),
        "parity": ("parity", model, onnx, *FAST, "--num-prompts", 1),
    }
    return [str(word) for word in words[verb]]


def run_verb(options: str, mount: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a verb with its output on a tmpfs; then list its files."""
    script = '"$@" -o "$0/out"; code=$?; cd "$0" && find . -type f; exit $code'
    return run_on_tmpfs(options, mount, script, *COMMAND, *words)


@pytest.mark.parametrize(
    "verb",
    [
        "build-engine",
        *(
            pytest.param(verb, marks=pytest.mark.thorough)
            for verb in ("finetune", "export", "generate", "parity")
        ),
    ],
)
def test_full_disk(verb: str, tmp_path: Path, tiny_model: Path, tiny_onnx: Path, tiny_recipe: Path) -> None:
    """Full for real: the output lies on a tmpfs of two pages, 8 KiB.

    `finetune` may keep its state for --resume, whole: it is what was asked for, without the first saved tensors.
    """
    done = run_verb("size=8k", tmp_path / "mount", arguments(verb, tiny_model, tiny_onnx, tiny_recipe))
    left = "./.out.finetune/run.json\n" if verb == "finetune" else ""
    assert (done.returncode, done.stdout) == (1, left)
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"Error: cannot use '{tmp_path / 'mount'}")
    assert "the disk is full; free some space" in last


@pytest.mark.parametrize("verb", ["finetune", "export", "build-engine", "generate", "parity"])
def test_read_only_file_system_is_found_before_the_work(
    verb: str, tmp_path: Path, tiny_model: Path, tiny_onnx: Path
) -> None:
    """The output lies on a tmpfs that is mounted read-only. Nothing is loaded, so the answer comes at once."""
    done = run_verb("ro", tmp_path / "mount", arguments(verb, tiny_model, tiny_onnx))
    assert (done.returncode, done.stdout) == (1, "")
    assert len(done.stderr.splitlines()) == 1
    assert "the file system is read-only; choose another output directory" in done.stderr


def start(words: list[str], output: Path) -> subprocess.Popen[str]:
    """Start a verb and wait until it is writing."""
    process = subprocess.Popen(
        [*COMMAND, *words, "-o", str(output)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not list(output.parent.glob(f".{output.name}.partial-*")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(
    ("verb", "number", "code"),
    [
        pytest.param("export", signal.SIGINT, 130, marks=pytest.mark.thorough),
        ("export", signal.SIGTERM, 143),
        ("build-engine", signal.SIGINT, 130),
        ("build-engine", signal.SIGTERM, 143),
    ],
)
def test_interrupted_write_leaves_nothing(
    verb: str, number: int, code: int, tmp_path: Path, tiny_model: Path, tiny_onnx: Path
) -> None:
    process = start(arguments(verb, tiny_model, tiny_onnx), tmp_path / "out")
    process.send_signal(number)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, output) == (code, ""), errors
    assert "nothing half-written was left; run the same command again" in errors.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.thorough
def test_killed_write_is_cleaned_by_the_next(tmp_path: Path, tiny_model: Path, tiny_onnx: Path) -> None:
    words = arguments("export", tiny_model, tiny_onnx)
    process = start(words, tmp_path / "out")
    process.kill()
    process.communicate(timeout=120)
    assert not (tmp_path / "out").exists()
    subprocess.run([*COMMAND, *words, "-o", str(tmp_path / "out")], check=True, capture_output=True)
    assert os.listdir(tmp_path) == ["out"]

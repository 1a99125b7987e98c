"""Two runs into one output: the second one is told so; one that was killed is in nobody's way."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from quest_deploy import lock
from quest_deploy.errors import ConfigError
from quest_deploy.quantize.resume import WorkDirectory

HOLD = (
    "import sys, time; from pathlib import Path; from quest_deploy.quantize.resume import WorkDirectory\n"
    "with WorkDirectory(Path(sys.argv[1])).lock():\n"
    "    print('inside', flush=True); time.sleep(100)"
)


@pytest.fixture
def other(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that holds the lock."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, tmp_path / "out"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "inside\n"
        yield process
        process.kill()


def test_a_second_process_is_told_who_is_there(other: subprocess.Popen, tmp_path: Path) -> None:
    message = rf"another finetune \(process {other.pid}\) is writing '.*out'; wait until it has ended, or give another"
    with pytest.raises(ConfigError, match=message), WorkDirectory(tmp_path / "out").lock():
        pytest.fail("both are inside")


def test_where_the_system_does_not_tell_who_it_is(
    other: subprocess.Popen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "LOCKS", tmp_path / "nothing")
    with (
        pytest.raises(ConfigError, match="another finetune is writing"),
        WorkDirectory(tmp_path / "out").lock(),
    ):
        pytest.fail("both are inside")


def test_another_output_and_another_verb_are_free(other: subprocess.Popen, tmp_path: Path) -> None:
    with WorkDirectory(tmp_path / "else").lock(), WorkDirectory(tmp_path / "out", "analyze").lock():
        pass


def test_a_killed_process_lets_others_in(other: subprocess.Popen, tmp_path: Path) -> None:
    other.send_signal(signal.SIGKILL)
    other.wait()
    with WorkDirectory(tmp_path / "out").lock():
        pass
    assert not list(tmp_path.iterdir())


def test_the_lock_ends_with_its_body_and_leaves_nothing(tmp_path: Path) -> None:
    work = WorkDirectory(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt), work.lock():
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with work.lock():
        pass


def test_a_file_that_its_owner_removed_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, flock, opened = tmp_path / "lock", lock.fcntl.flock, []

    def slow(handle: int, how: int) -> None:
        if not opened:
            path.unlink()
        opened.append(handle)
        flock(handle, how)

    monkeypatch.setattr(lock.fcntl, "flock", slow)
    with lock.locked(path, tmp_path, "finetune"):
        assert len(opened) == 2 and path.is_file()


def test_folders_made_for_a_lock_stay_where_something_is_left_in_them(tmp_path: Path) -> None:
    for name in ("empty", "full"):
        with lock.locked(tmp_path / name / "deep" / "lock", tmp_path, "build-engine"):
            if name == "full":
                (tmp_path / "full" / "out").touch()
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["full", "full/out"]


def test_where_there_are_no_locks_a_warning_is_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(handle: int, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", refuse)
    with caplog.at_level(logging.WARNING), WorkDirectory(tmp_path / "out").lock():
        pass
    assert "cannot be locked (Operation not supported)" in caplog.text


@pytest.mark.thorough
def test_two_finetune_commands_into_one_output(tiny_model: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "quest_deploy.commands", "finetune", tiny_model, "-o", tmp_path / "out"]
    command += ["--recipe", tiny_recipe]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as first:
        while not (tmp_path / ".out.finetune" / "run.json").is_file() and first.poll() is None:
            time.sleep(0.02)
        # Held up, so that it is certain to be there still.
        first.send_signal(signal.SIGSTOP)
        second = subprocess.run([*command, "--overwrite"], capture_output=True, text=True)
        first.send_signal(signal.SIGCONT)
        first.communicate()
    assert first.returncode == 0
    assert second.returncode == 1 and f"process {first.pid}" in second.stderr
    assert "Traceback" not in second.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

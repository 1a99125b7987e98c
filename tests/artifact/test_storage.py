"""Storage that refuses is named, and nothing half-written is left."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from quest_deploy import files
from quest_deploy.errors import ArtifactError
from tests.artifact.conftest import make
from tests.tmpfs import run_on_tmpfs

WRITE_TOO_MUCH = """
import sys
from pathlib import Path
from quest_deploy.artifacts import write_artifact
from quest_deploy.errors import ArtifactError
output = Path(sys.argv[1])
try:
    with write_artifact(output, stage="onnx", config={}) as writer:
        if sys.argv[2] == "python":
            (writer.path / "big").write_bytes(bytes(1 << 20))
        else:
            import numpy, safetensors.numpy
            safetensors.numpy.save_file({"w": numpy.zeros(1 << 20, "uint8")}, writer.path / "big.safetensors")
except ArtifactError as error:
    print(error)
print(sorted(p.name for p in output.parent.iterdir()) if output.parent.exists() else [])
"""


def run_in_mount(options: str, tmp_path: Path, writer: str) -> str:
    """Run WRITE_TOO_MUCH with its output on a tmpfs."""
    script = 'exec "$1" -c "$2" "$0/a" "$3"'
    done = run_on_tmpfs(options, tmp_path / "mount", script, sys.executable, WRITE_TOO_MUCH, writer)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("writer", ["python", "safetensors"])
def test_full_disk_is_named_and_nothing_is_left(tmp_path: Path, writer: str) -> None:
    """Full for real: a tmpfs of 64 KiB, 1 MiB written to it (by Python, and by safetensors' Rust)."""
    output = run_in_mount("size=64k", tmp_path, writer)
    assert "the disk is full; free some space" in output
    assert output.endswith("[]\n")


def test_read_only_file_system_is_named(tmp_path: Path) -> None:
    """The output lies on a tmpfs that is mounted read-only."""
    assert "the file system is read-only; choose another" in run_in_mount("ro", tmp_path, "python")


def test_file_size_limit_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    """Works without root: RLIMIT_FSIZE lets the kernel refuse the write in the middle of a file."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE_TOO_MUCH, str(tmp_path / "a"), "python"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
    )
    assert "file-size limit" in done.stdout, done.stderr
    assert done.stdout.endswith("[]\n")


def test_permission_denied_is_named(tmp_path: Path) -> None:
    """Root may write anywhere, so the refusal is made: mkdir reports EACCES."""
    if os.geteuid() == 0:
        error = files.storage_error(PermissionError(errno.EACCES, "Permission denied", "/srv/a"), tmp_path)
        assert str(error).startswith("cannot use '/srv/a': permission denied")
        return
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="permission denied"):
        make(tmp_path / "a")


def test_failed_copy_names_the_target(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/in/config.json", None, "/out/config.json")
    assert str(files.storage_error(error, tmp_path)).startswith(
        "cannot use '/out/config.json': the disk is full"
    )

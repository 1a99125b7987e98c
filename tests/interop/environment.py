"""The packages that optimum-onnx wants, beside the main environment's: it pins an older transformers."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
# Ignored by git; 190 MB.
CACHE = HERE.parent.parent / ".interop"
# What pip prints where it gets no answer from an index, and nothing else.
UNREACHABLE = re.compile(
    r"NewConnectionError|ConnectTimeoutError|ReadTimeoutError|NameResolutionError|ProxyError|"
    r"Temporary failure in name resolution|Network is unreachable|Failed to establish a new connection"
)
INSTALL_SECONDS = 600


class IndexUnreachableError(RuntimeError):
    """pip got no answer from a package index."""


def folder_of(requirements: Path = REQUIREMENTS) -> Path:
    """Where the packages lie for this Python and these versions."""
    key = f"{sys.version_info[:2]}\n{requirements.read_text()}"
    return CACHE / hashlib.sha256(key.encode()).hexdigest()[:12]


def install(folder: Path, requirements: Path, *options: str) -> None:
    """Install what `requirements` lists into `folder`, all of it or nothing.

    Dependencies are left out: those that are not listed come from the main environment.

    Raises:
        IndexUnreachableError: no index answers.
        RuntimeError: pip fails for another reason.
    """
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(partial), *options]
    try:
        done = subprocess.run(
            [*command, "-r", str(requirements)], capture_output=True, text=True, timeout=INSTALL_SECONDS
        )
        if done.returncode:
            kind = IndexUnreachableError if UNREACHABLE.search(done.stdout + done.stderr) else RuntimeError
            raise kind(f"pip cannot install {requirements.name}:\n{done.stderr[-2000:]}")
        if not folder.is_dir():
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def optimum_environment() -> dict[str, str]:
    """Environment variables for a process of this Python that imports optimum-onnx; installs it the first time."""
    folder = folder_of()
    if not folder.is_dir():
        CACHE.mkdir(exist_ok=True)
        try:
            install(folder, REQUIREMENTS)
        except IndexUnreachableError as error:
            pytest.skip(f"optimum-onnx is not installed, and no package index answers: {error}")
    return {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

"""A small or read-only disk for one command: a tmpfs in a mount namespace of its own (needs root)."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

_REFUSED = 99


def run_on_tmpfs(options: str, mount: Path, script: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a shell script with `mount` on a tmpfs of these options as $0, and `words` as $1 and so on.

    Skips the test where nothing may be mounted.
    """
    mount.mkdir()
    whole = f'mount -t tmpfs -o {options} none "$0" || exit {_REFUSED}; {script}'
    command = ["unshare", "--mount", "sh", "-c", whole, mount, *words]
    try:
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=240, check=False
        )
    except FileNotFoundError:
        pytest.skip("needs unshare (util-linux)")
    if done.returncode == _REFUSED or "unshare:" in done.stderr:
        pytest.skip(f"may not mount here: {done.stderr.strip()}")
    return done

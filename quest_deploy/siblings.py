"""Hidden siblings of an output: where it is written, and where an older one waits until the new one is in place."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from quest_deploy.files import sync

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def temporary_sibling(output: Path) -> Iterator[Path]:
    """A new hidden directory beside `output`, locked while this process lives, removed if left at the end."""
    temporary = output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")
    handle = -1
    try:
        # In here: a Ctrl-C may come as soon as the directory is there.
        temporary.mkdir()
        handle = os.open(temporary, os.O_RDONLY)
        # Some network file systems lock no directories: nothing sweeps there.
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if handle >= 0:
            os.close(handle)


def sweep(output: Path) -> bool:
    """Remove what dead processes left beside `output`; what is locked belongs to a living one.

    Returns:
        Whether an older `output` came back: its process was killed between the two renames of :func:`replace`.
    """
    prefix = f".{glob.escape(output.name)}"
    back = False
    for replaced in output.parent.glob(f"{prefix}.replaced-*"):
        if output.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.rename(replaced, output)  # this is the only copy
            back = True
    for temporary in output.parent.glob(f"{prefix}.partial-*"):
        handle = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            logger.info("removing %s, left by a process that was killed", temporary)
            shutil.rmtree(temporary, ignore_errors=True)
        finally:
            os.close(handle)
    return back


def replace(temporary: Path, output: Path) -> None:
    """Rename `temporary` to `output`, keeping the old artifact until the new one is in place."""
    if output.is_dir() and any(output.iterdir()):
        replaced = output.with_name(f".{output.name}.replaced-{secrets.token_hex(4)}")
        try:
            _put_aside(output, replaced)
            os.rename(temporary, output)
        except BaseException:
            # An interrupt may come behind either of them.
            if replaced.exists() and not output.exists():
                os.rename(replaced, output)
            raise
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.rename(temporary, output)
    sync(output.parent)


def _put_aside(output: Path, replaced: Path) -> None:
    """Rename `output`; a container's file system renames no directory of a lower layer, which is copied instead."""
    try:
        os.rename(output, replaced)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copytree(output, replaced, symlinks=True)
        shutil.rmtree(output)

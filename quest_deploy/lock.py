"""One run at a time: a lock that the system takes back when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from quest_deploy.errors import ConfigError
from quest_deploy.files import storage_errors

logger = logging.getLogger(__name__)

LOCKS = Path("/proc/locks")


@contextlib.contextmanager
def locked(path: Path, output: Path, verb: str) -> Iterator[None]:
    """Hold the lock on the file `path` while the body runs, and remove that file.

    Folders that are made for it are removed as well, where the body leaves nothing in them. A killed process leaves
    the file and no lock on it, so that nothing has to be cleaned up by hand.

    Args:
        path: The file to lock. Nothing is written into it: it takes no room on a full disk.
        output: What the lock protects, for the message.
        verb: What is run.

    Raises:
        ConfigError: another process holds it.
    """
    made: list[Path] = []
    try:
        handle = _lock(path, output, verb, made)
        try:
            yield
        finally:
            # While it is still locked: whoever opened the file before sees that it is gone, and opens it again.
            path.unlink(missing_ok=True)
            os.close(handle)
    finally:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()


def _lock(path: Path, output: Path, verb: str, made: list[Path]) -> int:
    """An open file that is locked, and that still is the one of that name; folders made for it go into `made`."""
    while True:
        with storage_errors(output):
            _make_folders(path.parent, made)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = _owner(handle)
            os.close(handle)
            raise ConfigError(
                f"another {verb}{owner} is writing '{output}'; wait until it has ended, or give another directory"
            ) from error
        except OSError as error:
            # Some network file systems have no locks.
            logger.warning("'%s' cannot be locked (%s): start no second %s there", path, error.strerror, verb)
            return handle
        if _is_still(path, handle):
            return handle
        os.close(handle)


def _make_folders(path: Path, made: list[Path]) -> None:
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(exist_ok=True)
        made.insert(0, folder)


def _is_still(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def _owner(handle: int) -> str:
    """Which process holds the lock, in words; nothing where the system does not tell."""
    status = os.fstat(handle)
    file = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    try:
        locks = [line.split() for line in LOCKS.read_text().splitlines()]
    except OSError:
        return ""
    # "1: FLOCK  ADVISORY  WRITE 1234 fd:00:5678 0 EOF"
    owners = [fields[4] for fields in locks if fields[1] == "FLOCK" and fields[5:6] == [file]]
    return f" (process {owners[0]})" if owners and owners[0].isdigit() and owners[0] != "0" else ""

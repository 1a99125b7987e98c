"""Files that can be trusted: streaming hashes, atomic JSON, and storage errors in the user's words."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from quest_deploy.errors import ArtifactError

logger = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
CACHE_ENTRIES = 4096
# A file changed twice within one tick of the file system's clock keeps its mtime: a digest taken that soon
# after the last change is not remembered (git calls this a racy entry).
RACY_NS = 1_000_000_000

PICKLE_SUFFIXES = (".ckpt", ".pth", ".pt", ".bin", ".pkl")

_NEXT_STEP = {
    errno.ENOSPC: "the disk is full; free some space or choose another output directory",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another output directory",
    errno.EFBIG: "the file-size limit is reached; raise it (`ulimit -f unlimited`) or choose another place",
    errno.EROFS: "the file system is read-only; choose another output directory",
    errno.EACCES: "permission denied; check the owner and mode of the directory or choose another one",
    errno.EPERM: "permission denied; check the owner and mode of the directory or choose another one",
    errno.ENOTDIR: "a part of the path is a file, expected a directory; choose another path",
    errno.EISDIR: "it is a directory, expected a file; choose another path",
    errno.ENOENT: "it does not exist; check the path",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
    errno.EIO: "the device reported an error; check the disk and try again",
}


def storage_error(error: BaseException, path: Path) -> ArtifactError | None:
    """Say what the operating system refused, or None where `error` is not about storage.

    safetensors is written in Rust and reports ``... (os error 28)`` in an exception that is no OSError.
    """
    code: int | None = None
    where: Any = path
    if isinstance(error, OSError):
        # Of a copy that failed, filename is the source and filename2 the target, which is what lacks space.
        code, where = error.errno, error.filename2 or error.filename or path
    elif type(error).__name__ == "SafetensorError" and (
        match := re.search(r"\(os error (\d+)\)", str(error))
    ):
        code = int(match[1])
    if code not in _NEXT_STEP:
        return None
    return ArtifactError(f"cannot use '{os.fsdecode(where)}': {_NEXT_STEP[code]}")


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turn what the operating system refuses in the body into an :class:`ArtifactError` about `path`."""
    try:
        yield
    except Exception as error:
        if (known := storage_error(error, path)) is not None:
            raise known from error
        if isinstance(error, OSError):
            raise ArtifactError(f"cannot use '{path}': {error.strerror or error}") from error
        raise


def check_place(output: Path) -> None:
    """Find out before hours of work that a directory cannot be renamed to `output`, or not be found there then.

    Raises:
        ArtifactError: `output` is a mount point, holds the working directory, or a part of it is a link to nothing or
            no directory.
    """
    with storage_errors(output):
        resolved, working = Path(os.path.realpath(output)), Path.cwd()
    for part in (output, *output.parents):
        if os.path.islink(part) and not os.path.exists(part):
            raise ArtifactError(
                f"'{part}' is a symbolic link to nothing (or to itself); remove it, or choose another output"
            )
        if part.name == ".." and not os.path.isdir(part.parent):
            raise ArtifactError(
                f"output '{output}' goes through '{part.parent}', which is no directory; give the path without it"
            )
    if os.path.ismount(resolved):
        raise ArtifactError(f"output '{output}' is a mount point; give a directory inside it")
    if resolved in (working, *working.parents):
        raise ArtifactError(
            f"output '{output}' is or holds the working directory, which would be replaced; give a directory inside it"
        )


def check_writable(output: Path) -> None:
    """Find out before hours of work, and not after, that the result cannot be written.

    Raises:
        ArtifactError: `output` lies below a file, on a read-only file system, or where this user may not write.
    """
    resolved = Path(os.path.realpath(output))
    folder = next((parent for parent in resolved.parents if parent.exists()), resolved)
    if not folder.is_dir():
        code = errno.ENOTDIR
    elif os.statvfs(folder).f_flag & os.ST_RDONLY:
        code = errno.EROFS
    elif not os.access(folder, os.W_OK | os.X_OK):
        code = errno.EACCES
    else:
        return
    with storage_errors(folder):
        raise OSError(code, os.strerror(code), str(folder))


def refuse_pickle(path: Path) -> None:
    """Refuse a file that only unpickling could open, since unpickling runs whatever code the file holds."""
    if path.suffix.lower() in PICKLE_SUFFIXES:
        target = path.with_suffix(".safetensors").name
        raise ArtifactError(
            f"'{path}' is a pickle ({path.suffix}), which can run any code when it is opened; expected "
            "safetensors. If you trust its source, convert it in a sandbox: "
            'python -c "import torch, safetensors.torch as st; '
            f"w = torch.load('{path.name}', weights_only=True); "
            f"st.save_file(w.get('state_dict', w), '{target}')\""
        )


def check_name(path: Path, runtime: str) -> None:
    """Refuse a path whose bytes are not UTF-8 text, which runtimes' own code cannot open.

    Raises:
        ArtifactError: names it.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ArtifactError(
            f"'{path}': the name is not UTF-8 text, which {runtime} needs to open it; rename the directory"
        ) from error


def hash_file(path: Path) -> str:
    """Hex sha256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with storage_errors(path), open(path, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def hash_mapping(value: Mapping[str, Any]) -> str:
    """Hex sha256 of a JSON object, whatever the order of its keys."""
    text = json.dumps(plain(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def hash_directory(path: Path) -> str:
    """Hex sha256 over the names and contents of a directory's files; hidden ones are left out.

    Symbolic links are followed: the hub's cache keeps models as links to blobs.
    """
    if path.is_file():
        return hash_file(path)
    with remembered_digests() as cache:
        names = list_files(path, follow=True)
        files = {name: cache.digest(path / name) for name in names if not is_hidden(name)}
    if not files:
        raise ArtifactError(f"'{path}' holds no files to hash; check the path")
    return hash_mapping(files)


def list_files(path: Path, *, follow: bool = False) -> list[str]:
    """Sorted names of all files below `path`, relative to it, with forward slashes.

    Args:
        path: A directory.
        follow: Whether to look into directories that are symbolic links, each once on the way down.
    """

    def fail(error: OSError) -> None:
        raise error

    names: list[str] = []
    with storage_errors(path):
        for folder, folders, files in os.walk(path, onerror=fail, followlinks=follow):
            if follow:
                here = os.path.realpath(folder)
                folders[:] = [name for name in folders if not _leads_up(Path(folder, name), here)]
            names.extend(Path(folder, name).relative_to(path).as_posix() for name in files)
    return sorted(names)


def _leads_up(folder: Path, here: str) -> bool:
    """Whether a link leads to the real path `here`, or to what that lies in."""
    return folder.is_symlink() and os.path.commonpath([os.path.realpath(folder), here]) == os.path.realpath(
        folder
    )


def copy_tree(source: Path, target: Path, ignore: Callable[[str, list[str]], set[str]] | None = None) -> None:
    """Copy a directory with the modes that new files get: a read-only source makes no copy that cannot be deleted."""
    target.mkdir()
    skipped = set() if ignore is None else ignore(str(source), sorted(os.listdir(source)))
    for entry in sorted(source.iterdir()):
        if entry.name in skipped:
            continue
        if entry.is_dir():
            copy_tree(entry, target / entry.name, ignore)
        else:
            shutil.copyfile(entry, target / entry.name)


def give_usual_mode(file: Path) -> None:
    """The mode that a new file gets beside it: safetensors makes files that their owner alone can read."""
    file.chmod(file.parent.stat().st_mode & 0o666)


def is_hidden(name: str) -> bool:
    """Whether a part of a relative name starts with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def digest_cache_path() -> Path | None:
    """Where digests are remembered, by the XDG base directory specification; None for a user without a home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):
        root = os.path.expanduser("~/.cache")
    # A user without a name, as in many containers, leaves the "~" as it is.
    return Path(root) / "quest-deploy" / "digests.json" if os.path.isabs(root) else None


class DigestCache:
    """sha256 of files already hashed, by device, inode, size, mtime and ctime in ns."""

    def __init__(self, known: dict[str, str]) -> None:
        self.known = known
        self.changed = False

    def digest(self, path: Path, *, verify: bool = False) -> str:
        """Digest of `path`; with `verify`, of its bytes as they are now."""
        with storage_errors(path):
            stat = path.stat()
        key = ":".join(
            str(part)
            for part in (
                stat.st_dev,
                stat.st_ino,
                stat.st_size,
                stat.st_mtime_ns,
                stat.st_ctime_ns,
            )
        )
        if not verify and key in self.known:
            return self.known[key]
        digest = hash_file(path)
        if time.time_ns() - stat.st_mtime_ns > RACY_NS and self.known.get(key) != digest:
            self.known[key] = digest
            self.changed = True
        return digest


@contextlib.contextmanager
def remembered_digests() -> Iterator[DigestCache]:
    """Digests from the user's cache; new ones are added at the end. An unusable cache is ignored."""
    path = digest_cache_path()
    known: dict[str, str] = {}
    try:
        content = {} if path is None else read_json(path)
        known = {key: value for key, value in content.items() if isinstance(value, str) and len(value) == 64}
    except (ArtifactError, AttributeError) as error:
        logger.debug("no remembered digests: %s", error)
    cache = DigestCache(known)
    yield cache
    if cache.changed and path is not None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, dict(list(known.items())[-CACHE_ENTRIES:]))
        except (ArtifactError, OSError) as error:
            logger.debug("digests are not remembered: %s", error)


def plain(value: Any) -> Any:
    """`value` in JSON's own types. JSON has no infinity or NaN: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def write_json(path: Path, value: Any) -> None:
    """Write JSON (sorted keys, indented, newline at the end; infinity, NaN as null), all of it or nothing."""
    write_text(
        path, json.dumps(plain(value), sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    )


def write_text(path: Path, text: str) -> None:
    """Write text, all of it or nothing."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with storage_errors(path):
        try:
            with open(temporary, "x", encoding="utf-8") as stream:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def sync(path: Path) -> None:
    """Return when a file, or the list of a directory's files, has reached the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_json(path: Path) -> Any:
    """Parse a JSON file; corrupt or truncated input is an :class:`ArtifactError` that says where."""
    with storage_errors(path):
        data = path.read_bytes()
    try:
        return json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ArtifactError(
            f"'{path}' is not text: byte {error.start} of {len(data)} is not UTF-8; "
            "the file is corrupt, make it again"
        ) from error
    except (json.JSONDecodeError, RecursionError) as error:
        at = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise ArtifactError(
            f"'{path}' is not valid JSON: {error.args[0]}{at}, {len(data)} bytes read; "
            "the file is corrupt or truncated, make it again"
        ) from error

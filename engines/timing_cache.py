"""TensorRT's timing cache file: shared by processes, so read under a lock, merged and replaced whole.

Polygraphy's own loaders rewrite the file in place (a killed process truncates it) and take a corrupt one for an
empty one without a word; its lock file is used here too, so that its tools may share the cache.
TensorRT for RTX times no kernels while it builds: it has no timing cache (its API for one does nothing).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from quest_deploy.config import BuildConfig
from quest_deploy.errors import ArtifactError, ConfigError
from quest_deploy.files import check_writable

logger = logging.getLogger(__name__)


def used_timing_cache(config: BuildConfig) -> Path | None:
    """The timing cache of a build; None where there is none to read or write.

    Raises:
        ConfigError: it cannot be read or written.
    """
    if config.timing_cache is None:
        return None
    if config.backend == "tensorrt-rtx":
        logger.warning(
            "timing cache %s is ignored: TensorRT for RTX times no kernels while it builds, it chooses them on the GPU",
            config.timing_cache,
        )
        return None
    check_timing_cache(Path(config.timing_cache))
    return Path(config.timing_cache)


def check_place_of_timing_cache(config: BuildConfig, *directories: Path) -> None:
    """Refuse a timing cache in a directory whose files have digests: what is added there makes it another one.

    Raises:
        ConfigError: it lies in one of them.
    """
    if config.timing_cache is None:
        return
    path = Path(config.timing_cache).resolve()
    for directory in directories:
        if path.is_relative_to(directory.resolve()):
            raise ConfigError(
                f"--timing-cache: '{config.timing_cache}' lies in '{directory}', whose files no build may change; "
                "choose a path outside"
            )


def check_timing_cache(path: Path) -> None:
    """Check before building that timings can be read from `path` and written there.

    Raises:
        ConfigError: they cannot.
    """
    problem = f"'{path}' is a directory, expected a file; choose another path" if path.is_dir() else ""
    if path.is_file() and not os.access(path, os.R_OK):
        problem = f"'{path}' cannot be read; check its owner and mode or choose another path"
    try:
        check_writable(path)
    except ArtifactError as error:
        problem = problem or str(error)
    if problem:
        raise ConfigError(f"--timing-cache: {problem}")


def load_timing_cache(config: Any, path: Path) -> bool:
    """Give the builder configuration the timings in `path`; without usable ones, an empty cache.

    Args:
        config: A TensorRT IBuilderConfig.
        path: The cache file, which need not exist.

    Returns:
        Whether timings were loaded.
    """
    content = _read(path)
    if content:
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return True
        logger.warning(
            "timing cache %s: %d bytes that this TensorRT and GPU cannot use (corrupt, or of another version "
            "or device); building without it, and replacing it afterwards",
            path,
            len(content),
        )
    config.set_timing_cache(config.create_timing_cache(b""), ignore_mismatch=False)
    return False


def save_timing_cache(config: Any, path: Path) -> None:
    """Add the timings of a finished build to `path`, keeping those that other processes have put there."""
    from polygraphy import util

    cache = config.get_timing_cache()
    path.parent.mkdir(parents=True, exist_ok=True)
    with util.LockFile(str(path)):
        previous = config.create_timing_cache(path.read_bytes()) if path.exists() else None
        if previous is not None and not cache.combine(previous, ignore_mismatch=False):
            logger.warning("timing cache %s: its timings are of another TensorRT or GPU; replaced", path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_bytes(memoryview(cache.serialize()))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _read(path: Path) -> bytes:
    # No lock: the file is only ever replaced whole.
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""

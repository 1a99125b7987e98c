"""The runtime cache of TensorRT for RTX: kernels that it compiled for this GPU, kept beside the engine.

It is no part of the artifact: its file is hidden, so that the manifest need not vouch for it, and made again when it
is missing or fits no longer. It carries a hash of its own, over the engine's plan and its content.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
from pathlib import Path

from quest_deploy.artifacts import RUNTIME_CACHE_NAME
from quest_deploy.engines.trt_api import RuntimeCache, RuntimeConfig

logger = logging.getLogger(__name__)

_HASH_BYTES = hashlib.sha256().digest_size


class RuntimeCacheFile:
    """A cache in use and where it is kept.

    Args:
        config: The runtime configuration that gets the cache.
        folder: The component's, where the engine lies.
        plan_sha256: Of the engine's plan: kernels of another plan are of no use.
    """

    def __init__(self, config: RuntimeConfig, folder: Path, plan_sha256: str) -> None:
        self.path = folder / RUNTIME_CACHE_NAME
        self.plan_sha256 = plan_sha256
        self.cache: RuntimeCache = config.create_runtime_cache()
        self.loaded = self._read()
        if self.loaded and not self.cache.deserialize(self.loaded):
            logger.debug("%s was made on another GPU or by another version; it will be replaced", self.path)
        config.set_runtime_cache(self.cache)

    def save(self) -> None:
        """Write the cache if TensorRT gives another; a directory that cannot be written is left alone."""
        serialized = self.cache.serialize()
        if serialized is None:
            logger.debug("TensorRT does not give the runtime cache for %s", self.path)
            return
        content = bytes(serialized)
        if content == self.loaded:
            return
        temporary = self.path.with_name(f"{self.path.name}-{secrets.token_hex(4)}")
        try:
            temporary.write_bytes(self._hash(content) + content)
            os.replace(temporary, self.path)
        except OSError as error:
            logger.debug("the runtime cache is not kept in %s (%s)", self.path, error.strerror)
            with contextlib.suppress(OSError):  # on a read-only file system it is refused, too
                temporary.unlink()
            return
        self.loaded = content

    def _read(self) -> bytes:
        try:
            stored = self.path.read_bytes()
        except OSError:
            return b""
        found, content = stored[:_HASH_BYTES], stored[_HASH_BYTES:]
        if found != self._hash(content):
            logger.debug("%s is damaged or of another engine; it will be replaced", self.path)
            return b""
        return content

    def _hash(self, content: bytes) -> bytes:
        return hashlib.sha256(self.plan_sha256.encode() + content).digest()

"""What is measured: a directory, and what runs it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from quest_deploy.config import BACKENDS
from quest_deploy.engines import resolve_backend
from quest_deploy.errors import ConfigError

COMPILED = "torch-compile"
ERROR = "error"
"""The key of a message in place of figures."""


@dataclass(frozen=True)
class Subject:
    """One row.

    Attributes:
        label: As it was given.
        path: A model, checkpoint, ONNX or engines directory.
        backend: What runs it.
        compiled: Whether torch.compile compiles its components.
    """

    label: str
    path: Path
    backend: str
    compiled: bool


def parse_subject(text: str) -> Subject:
    """``DIR`` or ``DIR:BACKEND``.

    Raises:
        ArtifactError: nothing at the directory can be run.
        ConfigError: the backend does not exist, or cannot run it.
    """
    before, colon, backend = text.rpartition(":")
    if not colon or Path(text).exists():
        before, backend = text, ""
    elif backend not in (*BACKENDS, COMPILED):
        raise ConfigError(
            f"{text!r}: backend is {backend!r}, expected one of {', '.join((*BACKENDS, COMPILED))}"
        )
    compiled = backend == COMPILED
    wanted = "torch" if compiled else backend or None
    return Subject(
        label=text, path=Path(before), backend=resolve_backend(Path(before), wanted), compiled=compiled
    )

"""What is measured: a directory, and what runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from quest_deploy.config import BACKENDS, PROVIDERS, TENSORRT_BACKENDS, Provider, RunConfig
from quest_deploy.engines import resolve_backend
from quest_deploy.errors import ConfigError

COMPILED = "torch-compile"
WITHOUT_GRAPHS = "-no-cuda-graphs"
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
    compiled: bool = False
    run: RunConfig = field(default_factory=RunConfig)


def _ways() -> dict[str, tuple[str, RunConfig]]:
    """What may follow a directory, but for `torch-compile`: a backend, and what else it is told."""
    ways = {backend: (backend, RunConfig()) for backend in BACKENDS}
    for provider in PROVIDERS:
        ways[f"onnxruntime-{provider}"] = ("onnxruntime", RunConfig(provider=cast("Provider", provider)))
    for backend in TENSORRT_BACKENDS:
        ways[f"{backend}{WITHOUT_GRAPHS}"] = (backend, RunConfig(cuda_graphs=False))
    return ways


WAYS = _ways()


def parse_subject(text: str) -> Subject:
    """``DIR`` or ``DIR:BACKEND``, where a backend may say more: ``onnxruntime-cuda``, ``tensorrt-no-cuda-graphs``.

    Raises:
        ArtifactError: nothing at the directory can be run.
        ConfigError: the backend does not exist, or cannot run it.
    """
    before, colon, backend = text.rpartition(":")
    if not colon or Path(text).exists():
        before, backend = text, ""
    elif backend not in (*WAYS, COMPILED):
        raise ConfigError(f"{text!r}: backend is {backend!r}, expected one of {', '.join((*WAYS, COMPILED))}")
    compiled = backend == COMPILED
    wanted, run = ("torch", RunConfig()) if compiled else WAYS.get(backend, (None, RunConfig()))
    return Subject(
        label=text,
        path=Path(before),
        backend=resolve_backend(Path(before), wanted),
        compiled=compiled,
        run=run,
    )

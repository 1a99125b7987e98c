"""What is measured: a directory, and what runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from quest_deploy.artifacts import stage_of
from quest_deploy.config import BACKENDS, PROVIDERS, TENSORRT_BACKENDS, Provider, RunConfig
from quest_deploy.engines import resolve_backend
from quest_deploy.errors import ConfigError

COMPILED = "torch-compile"
HALVES = ("fp16", "bf16")
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
        run: How it runs.
        half: "fp16" or "bf16", the type that torch runs a full-precision model in; None leaves it in float32.
    """

    label: str
    path: Path
    backend: str
    compiled: bool = False
    run: RunConfig = field(default_factory=RunConfig)
    half: str | None = None


TORCH_WAYS = {
    f"{way}{half and '-'}{half}": (way == COMPILED, half or None)
    for way in ("torch", COMPILED)
    for half in ("", *HALVES)
}
"""How torch may run a model: whether it is compiled, and in which type of half precision."""


def _ways() -> dict[str, tuple[str, RunConfig]]:
    """What may follow a directory, but for torch's own ways: a backend, and what else it is told."""
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
    elif backend not in (*WAYS, *TORCH_WAYS):
        known = ", ".join(dict.fromkeys((*WAYS, *TORCH_WAYS)))
        raise ConfigError(f"{text!r}: backend is {backend!r}, expected one of {known}")
    compiled, half = TORCH_WAYS.get(backend, (False, None))
    wanted, run = ("torch", RunConfig()) if backend in TORCH_WAYS else WAYS.get(backend, (None, RunConfig()))
    path = Path(before)
    if half is not None and path.is_dir() and stage_of(path) == "checkpoint":
        raise ConfigError(
            f"{text!r}: a checkpoint's grids are float32, expected a full-precision model beside {backend}; "
            "leave the type out"
        )
    return Subject(
        label=text,
        path=path,
        backend=resolve_backend(path, wanted),
        compiled=compiled,
        run=run,
        half=half,
    )

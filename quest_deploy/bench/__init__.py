"""Latency, throughput and memory of what draws images: each subject in a process of its own, taking turns.

``quest_deploy.bench`` is both this package and the verb of the Python API (``quest_deploy.bench(subjects, output,
config)``), for the reason that :mod:`quest_deploy.export` gives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from quest_deploy.config import BenchConfig, ProgressEvent

if TYPE_CHECKING:
    from quest_deploy.artifacts import Artifact


def bench(
    subjects: Sequence[str],
    output: Path,
    config: BenchConfig,
    *,
    progress: Callable[[ProgressEvent], None] | None = None,
    overwrite: bool = False,
) -> Artifact:
    """Measure `subjects` in one run, and write ``bench.json`` and ``bench.svg``.

    A subject that fails loses no other: its row has an ``error``, beside the figures of the rounds before, if any.

    Args:
        subjects: Directories (a model, checkpoint, ONNX or engines), each with ``:BACKEND`` after it where its own
            backend is not meant; ``:torch-compile`` compiles a model. The first is what ratios refer to.
        output: The directory to make.
        config: What is drawn, and how often.
        progress: Told after each process.
        overwrite: Replace an earlier run.

    Raises:
        ArtifactError: a subject, or `output`, cannot be used.
        ConfigError: a backend that does not fit.
        BenchError: no subject could be measured; nothing is written.
    """
    from quest_deploy.bench.stage import run

    return run(subjects, output, config, progress=progress, overwrite=overwrite)


class _CallablePackage(ModuleType):
    """A package that runs :func:`bench` when called."""

    __call__ = staticmethod(bench)


sys.modules[__name__].__class__ = _CallablePackage

"""What low bits would do to a model, measured before anything is finetuned, and what finetuning changed.

``quest_deploy.analyze`` is both this package and the verb of the Python API (``quest_deploy.analyze(model, output,
config)``), for the reason that :mod:`quest_deploy.export` gives.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quest_deploy.analyze.config import AnalyzeConfig
    from quest_deploy.artifacts import Artifact
    from quest_deploy.config import ProgressEvent


class _CallablePackage(ModuleType):
    """A package that runs :func:`quest_deploy.analyze.stage.analyze` when called."""

    def __call__(
        self,
        model: str | Path,
        output: Path,
        config: AnalyzeConfig,
        *,
        checkpoint: Path | None = None,
        progress: Callable[[ProgressEvent], None] | None = None,
        resume: bool = False,
        overwrite: bool = False,
    ) -> Artifact:
        """Analyze `model` into `output`: see :func:`quest_deploy.analyze.stage.analyze`."""
        from quest_deploy.analyze.stage import analyze

        return analyze(
            model,
            output,
            config,
            checkpoint=checkpoint,
            progress=progress,
            resume=resume,
            overwrite=overwrite,
        )


sys.modules[__name__].__class__ = _CallablePackage

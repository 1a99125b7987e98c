"""From torch to ONNX: lowering, graph passes and checks.

``quest_deploy.export`` is both this package and the verb of the Python API (``quest_deploy.export(source, output,
config)``). Importing any module of a subpackage makes Python bind the package to that name in its parent, so a
function of the same name would be lost by then; hence the package itself can be called.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quest_deploy.artifacts import Artifact
    from quest_deploy.config import ExportConfig, ProgressEvent


class _CallablePackage(ModuleType):
    """A package that runs :func:`quest_deploy.export.to_onnx.export` when called."""

    def __call__(
        self,
        source: Path,
        output: Path,
        config: ExportConfig,
        *,
        progress: Callable[[ProgressEvent], None] | None = None,
        overwrite: bool = False,
    ) -> Artifact:
        """Write `source` as ONNX: see :func:`quest_deploy.export.to_onnx.export`."""
        from quest_deploy.export.to_onnx import export

        return export(source, output, config, progress=progress, overwrite=overwrite)


sys.modules[__name__].__class__ = _CallablePackage

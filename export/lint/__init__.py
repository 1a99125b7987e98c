"""Preflight: what a runtime will make of an ONNX graph, product by product, before an engine is built.

:mod:`.read` loads a graph, :mod:`.view` finds its products and quantizers, :mod:`.rules` say what is wrong with
them and :mod:`.execution` in which arithmetic they run. Works on files that quest-deploy did not write.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from quest_deploy.export.lint.report import LintReport

__all__ = ["lint"]


def lint(
    path: Path | str, target: str = "tensorrt-rtx", *, dimensions: Mapping[str, int] | None = None
) -> LintReport:
    """Say what `target` makes of the graphs at `path`, without building or running them.

    Args:
        path: An ONNX file, or a directory with one in it or in its subdirectories (one a component).
        target: One of :data:`quest_deploy.export.lint.targets.LINT_TARGETS`.
        dimensions: Sizes of symbolic dimensions, for counting multiply-accumulates; what is missing is taken from the
            model's configuration files, or is 1.

    Returns:
        Findings and one row for every product; false in a boolean context where there are errors.

    Raises:
        ConfigError: an unknown target, a dimension that no graph has, or one that is not positive.
        ArtifactError: nothing there, or a file that is not ONNX.
    """
    from quest_deploy.export.lint.run import run

    return run(Path(path), target, dimensions or {})

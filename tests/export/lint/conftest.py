"""Lint of a graph in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import onnx
import pytest

from quest_deploy.export.lint import lint
from quest_deploy.export.lint.report import LintReport

Lint = Callable[[onnx.ModelProto, str], LintReport]


@pytest.fixture
def lint_model(tmp_path: Path) -> Lint:
    """Writes a model and looks at it."""

    def run(model: onnx.ModelProto, target: str) -> LintReport:
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return lint(path, target)

    return run

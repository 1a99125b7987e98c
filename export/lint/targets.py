"""The runtimes that lint knows."""

from __future__ import annotations

LINT_TARGETS = ("onnxruntime", "tensorrt", "tensorrt-rtx", "openvino")

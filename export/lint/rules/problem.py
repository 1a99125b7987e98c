"""What a rule yields."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from quest_deploy.export.lint.report import Severity

TENSORRT = ("tensorrt", "tensorrt-rtx")
ONNX_RUNTIME, OPENVINO = "onnxruntime", "openvino"
TITLES = {
    "tensorrt": "TensorRT",
    "tensorrt-rtx": "TensorRT for RTX",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO",
}


@dataclass(frozen=True, eq=False, kw_only=True)
class Problem:
    """One place where a rule fires; `breaks` makes it an error."""

    node: ir.Node
    message: str
    severity: Severity = "warning"
    breaks: bool = False

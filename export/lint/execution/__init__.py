"""In which arithmetic a target runs a product that it does not refuse, and why not in a better one."""

from __future__ import annotations

from quest_deploy.export.lint.execution.onnx_runtime import in_onnx_runtime
from quest_deploy.export.lint.execution.openvino import in_openvino
from quest_deploy.export.lint.execution.tensorrt import in_tensorrt
from quest_deploy.export.lint.report import Execution
from quest_deploy.export.lint.view import Product, View

_JUDGES = {
    "tensorrt": in_tensorrt,
    "tensorrt-rtx": in_tensorrt,
    "onnxruntime": in_onnx_runtime,
    "openvino": in_openvino,
}


def execution_of(product: Product, view: View, target: str) -> tuple[Execution, tuple[str, ...]]:
    """The arithmetic of `product`, and reasons."""
    return _JUDGES[target](product, view)

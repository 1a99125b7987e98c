"""How the two quantization operators of :mod:`quest_deploy.quantize.grid` are lowered to ONNX.

==========================================  ==========================================================
torch                                       ONNX (opset 21)
==========================================  ==========================================================
``quantize_dequantize(x, s, qmin, qmax)``   ``Clip(qmin * s, qmax * s) -> QuantizeLinear(s) -> DequantizeLinear(s)``
                                            (no Clip where the bounds are those of int8, which
                                            QuantizeLinear saturates to)
``dequantize_weight(codes, s, axis, bits)`` ``DequantizeLinear(codes, s, axis)``, codes an int8 initializer
==========================================  ==========================================================

Zero-points are 0 and scales are initializers, as TensorRT wants them. The bounds of Clip are products that the
exporter folds into float32 constants, rounded as torch rounds them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnxscript import opset21 as op

from quest_deploy.quantize import grid

INT8_BOUNDS = (grid.INT8_MIN, grid.INT8_MAX)


def lower_quantize_dequantize(x: ir.Value, scale: ir.Value, qmin: int, qmax: int) -> Any:
    """Per-tensor fake quantization of `x` (any shape) by the 0-d `scale`."""
    zero_point = op.Constant(value=ir.tensor(np.array(0, dtype=np.int8)))
    if (qmin, qmax) != INT8_BOUNDS:
        low = op.Mul(scale, op.Constant(value_float=float(qmin)))
        high = op.Mul(scale, op.Constant(value_float=float(qmax)))
        x = op.Clip(x, low, high)
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale)


def lower_dequantize_weight(codes: ir.Value, scale: ir.Value, axis: int, bits: int) -> Any:
    """Weights from `codes` and one scale for each channel of `axis`.

    `bits` plays no part: whether codes are packed depends on the target, and is left to a pass.
    """
    return op.DequantizeLinear(codes, scale, axis=axis)


def translation_table() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The entries that `torch.onnx.export` needs in order to know quest_deploy's operators."""
    return {
        torch.ops.quest_deploy.quantize_dequantize.default: lower_quantize_dequantize,
        torch.ops.quest_deploy.dequantize_weight.default: lower_dequantize_weight,
    }

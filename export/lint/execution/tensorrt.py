"""TensorRT and TensorRT for RTX.

INT8 is said where NVIDIA documents that the pattern is fused (Q/DQ around both operands, zero-point 0, constant scales,
one for the activation, one an output channel for the weight) and the builder takes it. Which kernel a GPU then
chooses is not known before the engine runs.
"""

from __future__ import annotations

from quest_deploy.export.lint.execution.common import (
    is_four_bit_matrix,
    missing_codes,
    obstacles,
    outside,
    stored_weight_alone,
)
from quest_deploy.export.lint.report import Execution
from quest_deploy.export.lint.view import FLOAT8, FOUR_BITS, Product, View


def in_tensorrt(product: Product, view: View) -> tuple[Execution, tuple[str, ...]]:
    """The arithmetic of a product that the builder takes."""
    if reason := outside(product):
        return "float", (reason,)
    if product.both_quantized():
        if all(dequantizer.kind in FLOAT8 for dequantizer in product.dequantizers):
            return "float", ("both operands are 8-bit floats: FP8 where the GPU has it",)
        reasons = tuple(obstacles(product, unsigned=False, cast=False))
        return ("float", reasons) if reasons else ("int8", ())
    weight = is_four_bit_matrix(product)
    if weight is not None and weight.dequantizer is not None:
        if weight.dequantizer.granularity == "block":
            return "int4 storage", ()
        return "int4 storage", ("the engine repeats the scales in blocks of 16 (5 bits a weight in fp16)",)
    reasons = tuple(missing_codes(product))
    if (alone := stored_weight_alone(product)) is not None and alone.dequantizer is not None:
        bits = 4 if alone.dequantizer.kind in FOUR_BITS else 8
        reasons = (*reasons, f"the weight is stored in {bits} bits and dequantized")
    return "float", reasons

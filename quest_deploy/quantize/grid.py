"""The one grid: zero-point 0, integer clip bounds inside int8, and torch *defined* as the ONNX that it lowers to.

    codes q = saturate_int8(rne(clip(x, qmin * s, qmax * s) / s)),    Q(x) = s * q,    -128 <= qmin <= 0 <= qmax <= 127

in float32 and in this order: ``Clip -> QuantizeLinear -> DequantizeLinear``. That is why ``torch.fake_quantize_*`` is
not used (it multiplies by 1/s, and differs at ties). An asymmetric b-bit quantizer with zero-point z is the same grid
with qmin = -z and qmax = 2^b - 1 - z. Gradients are straight-through inside the clip range and zero outside it; that of
a learned scale follows from the multiplications around this function (see :mod:`quest_deploy.quantize.layers`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

INT8_MIN, INT8_MAX = -128, 127


def clip_bounds(scale: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """The float32 values qmin * s and qmax * s between which a value is clipped."""
    return scale * qmin, scale * qmax


def quantize(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Integer codes of `x`.

    Args:
        x: float32, any shape.
        scale: Positive float32, 0-d or broadcastable to `x`.
        qmin: Smallest code.
        qmax: Largest code.

    Returns:
        int8 codes in the shape of `x`.
    """
    low, high = clip_bounds(scale, qmin, qmax)
    codes = torch.div(torch.clamp(x, low, high), scale).round_().clamp_(INT8_MIN, INT8_MAX)
    return codes.to(torch.int8)


def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 values s * q of integer codes; `scale` must broadcast to `codes`."""
    return codes.to(torch.float32) * scale


def channel_shape(scale: Tensor, ndim: int, axis: int) -> Tensor:
    """View a per-channel `scale` [c] so that it broadcasts along `axis` of an `ndim`-dimensional tensor."""
    shape = [1] * ndim
    shape[axis] = -1
    return scale.reshape(shape)


@torch.library.custom_op("quest_deploy::quantize_dequantize", mutates_args=())
def quantize_dequantize(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """Q(x) of the module's equation, per tensor. A custom op, so that the exporter sees one node.

    Args:
        x: float32, any shape.
        scale: Positive float32, 0-d.
        qmin: Smallest code.
        qmax: Largest code.

    Returns:
        float32 in the shape of `x`.
    """
    low, high = clip_bounds(scale, qmin, qmax)
    return torch.clamp(x, low, high).div_(scale).round_().clamp_(INT8_MIN, INT8_MAX).mul_(scale)


@quantize_dequantize.register_fake
def _(x: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    return torch.empty_like(x)


def _save_mask(ctx: Any, inputs: tuple[Tensor, Tensor, int, int], output: Tensor) -> None:
    x, scale, qmin, qmax = inputs
    low, high = clip_bounds(scale, qmin, qmax)
    ctx.save_for_backward((x >= low) & (x <= high))


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    (inside,) = ctx.saved_tensors
    return grad * inside, None, None, None


quantize_dequantize.register_autograd(_straight_through, setup_context=_save_mask)


@torch.library.custom_op("quest_deploy::dequantize_weight", mutates_args=())
def dequantize_weight(codes: Tensor, scale: Tensor, axis: int, bits: int) -> Tensor:
    """Weights from stored codes. A custom op, so that the exporter keeps integers as initializers.

    Args:
        codes: int8, the weight's shape.
        scale: Positive float32, one for each channel of `axis`.
        axis: The output-channel axis.
        bits: 4 or 8: how many bits each code needs, hence how it may be packed.

    Returns:
        float32 in the shape of `codes`.
    """
    return dequantize(codes, channel_shape(scale, codes.ndim, axis))


@dequantize_weight.register_fake
def _(codes: Tensor, scale: Tensor, axis: int, bits: int) -> Tensor:
    return torch.empty_like(codes, dtype=torch.float32)


def weight_bounds(bits: int) -> tuple[int, int]:
    """Symmetric weight codes: [-8, 7] for 4 bits, [-127, 127] for 8."""
    return (-8, 7) if bits == 4 else (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1)


def activation_bounds(low: float, high: float, bits: int) -> tuple[int, int, float]:
    """Clip bounds and scale of an activation whose values lie in [low, high].

    Fewer than 8 bits give the asymmetric grid, which spends its codes on the range that is used. 8 bits give the full
    symmetric int8 grid, as a shifted one would leave int8.

    Returns:
        qmin, qmax and the scale.
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if bits == 8:
        return INT8_MIN, INT8_MAX, max(-low, high, 1e-12) / INT8_MAX
    levels = 2**bits - 1
    scale = max(high - low, 1e-12) / levels
    zero_point = min(max(round(-low / scale), 0), levels)
    return -zero_point, levels - zero_point, scale

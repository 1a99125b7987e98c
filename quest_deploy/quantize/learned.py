"""Quantizers while their steps are learned: the codes of :mod:`quest_deploy.quantize.grid`, with the gradients of LSQ.

For a value inside the range d(s q)/ds = q - x / s, outside it the clip bound; d(s q)/dx is 1 inside and 0 outside
(Esser et al., "Learned Step Size Quantization", arXiv 1902.08153). Written out by hand, since most of the time of
training goes into passes over memory, and automatic differentiation of every operation takes twice as many.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from quest_deploy.quantize.grid import channel_shape

if TYPE_CHECKING:
    from quest_deploy.quantize.layers import QuantizedLayer


class _LearnedInput(torch.autograd.Function):
    """Per-tensor activation quantization with a step for each sample."""

    @staticmethod
    def forward(  # type: ignore[no-untyped-def]
        ctx,
        x: Tensor,
        own: Tensor,
        scale: Tensor,
        ratio: Tensor | None,
        inverse_row: Tensor | None,
        qmin: int,
        qmax: int,
    ) -> Tensor:
        # As it is exported: times r / b, then divided by the one scale s.
        multiplier = inverse_row
        if ratio is not None:
            multiplier = ratio if inverse_row is None else ratio * inverse_row
        steps = x / scale if multiplier is None else (x * multiplier).div_(scale)
        result = steps.round().clamp_(qmin, qmax).mul_(own)
        ctx.save_for_backward(steps, result, own, inverse_row)
        ctx.bounds = (qmin, qmax)
        return result

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        steps, result, own, inverse_row = ctx.saved_tensors
        # The gradient of clipping in one pass; at the very bounds it is that of outside.
        inside = torch.ops.aten.hardtanh_backward(grad, steps, *ctx.bounds)
        grad_own = None
        if ctx.needs_input_grad[1]:
            count = own.numel()
            slope = _dot(grad, result, count) / own.flatten() - _dot(inside, steps, count)
            grad_own = slope.reshape(own.shape)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = inside if inverse_row is None else inside.mul_(inverse_row)
        return grad_x, grad_own, None, None, None, None, None


def _dot(a: Tensor, b: Tensor, count: int) -> Tensor:
    """[count]: sums of products, over all of a sample or (count 1) over everything."""
    # Not a batched matrix product: that of rows and columns takes several times as long on a CPU.
    return torch.linalg.vecdot(a.reshape(count, -1), b.reshape(count, -1))


def fake_quantize(
    x: Tensor, group_scale: Tensor, group: Tensor, inverse_row: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    """s_g * q, with the codes q that `x` has when it is exported.

    Args:
        x: float32 [n, ...].
        group_scale: Positive float32 [G], the step of each timestep group.
        group: int64 [n or 1], of each sample.
        inverse_row: One over the channel row, broadcastable to `x`; None without one.
        qmin: Smallest code.
        qmax: Largest code.
    """
    scale, shape = group_scale.detach().min(), (-1, *[1] * (x.ndim - 1))
    own, ratio = group_scale, None
    if group_scale.numel() > 1:
        own = group_scale.index_select(0, group)
        ratio = (scale / own.detach()).reshape(shape)
    result: Tensor = _LearnedInput.apply(x, own.reshape(shape), scale, ratio, inverse_row, qmin, qmax)
    return result


class _LearnedWeight(torch.autograd.Function):
    """Per-channel weight quantization with LSQ gradients for the weight and its scale."""

    @staticmethod
    def forward(ctx, weight: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:  # type: ignore[no-untyped-def]
        per_channel = channel_shape(scale, weight.ndim, 0)
        ratio = weight / per_channel
        codes = ratio.round().clamp_(qmin, qmax)
        ctx.save_for_backward(ratio, codes)
        ctx.bounds = (qmin, qmax)
        return codes * per_channel

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[no-untyped-def]
        ratio, codes = ctx.saved_tensors
        qmin, qmax = ctx.bounds
        inside = (ratio >= qmin) & (ratio <= qmax)
        slope = codes - torch.where(inside, ratio, torch.zeros_like(ratio))
        return grad * inside, (grad * slope).flatten(1).sum(1), None, None


def weight(value: Tensor, scale: Tensor, qmin: int, qmax: int) -> Tensor:
    """The quantized weight: `value` [c_out, ...] on the grid of `scale` [c_out]."""
    result: Tensor = _LearnedWeight.apply(value, scale, qmin, qmax)
    return result


@contextmanager
def quantized_once(layers: Iterable[QuantizedLayer]) -> Iterator[None]:
    """Quantize the weights that learn once for all passes and backward passes of the body: one update, or a validation.

    Gradients gather at the quantized weights, and go on to weights and scales when the body ends.
    """
    shared: list[tuple[QuantizedLayer, Tensor]] = []
    for layer in layers:
        if layer.frozen or layer.rounding is not None or not layer.weight_learns():
            continue
        quantized = layer.quantized_weight()
        layer.shared = quantized.detach().requires_grad_(quantized.requires_grad)
        shared.append((layer, quantized))
    try:
        yield
        learned = [(quantized, layer.shared.grad) for layer, quantized in shared if layer.shared is not None]
        seen = [(quantized, grad) for quantized, grad in learned if grad is not None]
        if seen:
            torch.autograd.backward([quantized for quantized, _ in seen], [grad for _, grad in seen])
    finally:
        for layer, _ in shared:
            layer.shared = None

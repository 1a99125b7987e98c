"""Quantized Linear and Conv2d with time-aware activation scales.

A layer computes, with timestep group g of each sample, group scale s_g, s = min_g s_g, r_g = s / s_g and an optional
per-input-channel row b (DESIGN §2)::

    y = op(Q(x * (r_g / b)), W_q) * (1 / r_g) + bias,        W_q = Q_w(W * b)

exactly the operations that it is exported as. While training, the tables follow from the learned `log_scale`, and
W_q from the float weight, with the gradients of :mod:`quest_deploy.quantize.learned`; the codes are the same, and the
factor 1 / r_g is already in what the operation is given.
`freeze` turns a layer into the integers and tables that are stored and exported; no `forward` ever calibrates.

While it learns, a weight may be W + B A with B A of low rank (EfficientDM, arXiv 2310.03270), which is added to W
before it is quantized, so that nothing of it is deployed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest_deploy.quantize import learned
from quest_deploy.quantize.context import TimestepContext as TimestepContext
from quest_deploy.quantize.grid import (
    channel_shape,
    dequantize,
    dequantize_weight,
    quantize,
    quantize_dequantize,
    weight_bounds,
)

Quantizable = nn.Linear | nn.Conv2d


def under_autocast(x: Tensor) -> bool:
    """Whether operations on `x` are rounded."""
    # PyTorch has no autocast where nothing is computed.
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)


class ActivationQuantizer(nn.Module):
    """Per-tensor activation quantizer, one scale for each timestep group.

    Args:
        scale: float32 [G], positive (G = 1: the same for every timestep).
        qmin: Smallest code.
        qmax: Largest code.
        row: float32 [c], one divisor for each input channel, or None.
        channel_axis: The axis of the channels in the layer's input.
    """

    log_scale: nn.Parameter
    row: Tensor | None
    inverse_row: Tensor | None
    stored_scale: Tensor
    scale: Tensor
    ratio: Tensor
    inverse_ratio: Tensor

    def __init__(
        self, scale: Tensor, qmin: int, qmax: int, *, row: Tensor | None = None, channel_axis: int = -1
    ) -> None:
        super().__init__()
        self.qmin, self.qmax, self.channel_axis = qmin, qmax, channel_axis
        self.log_scale = nn.Parameter(scale.to(torch.float32).log())
        self.register_buffer("inverse_row", None if row is None else 1.0 / row)
        self.register_buffer("row", row)
        self.frozen = False

    @property
    def num_groups(self) -> int:
        return self.log_scale.numel() if not self.frozen else self.ratio.numel()

    def group_scale(self) -> Tensor:
        """float32 [G]: the scale of each timestep group."""
        return self.log_scale.detach().exp() if not self.frozen else self.stored_scale

    def equals(self, other: ActivationQuantizer) -> bool:
        """Whether `other` gives the same codes for every input."""
        if (self.qmin, self.qmax, self.channel_axis) != (other.qmin, other.qmax, other.channel_axis):
            return False
        if (self.row is None) != (other.row is None):
            return False
        same_row = self.row is None or other.row is None or torch.equal(self.row, other.row)
        return same_row and torch.equal(self.group_scale(), other.group_scale())

    def tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """s (0-d), r [G] and 1/r [G]."""
        if self.frozen:
            return self.scale, self.ratio, self.inverse_ratio
        group_scale = self.log_scale.exp()
        scale = group_scale.detach().min()
        ratio = scale / group_scale
        return scale, ratio, 1.0 / ratio

    def set_group_scale(self, group_scale: Tensor) -> None:
        """Take other scales, float32 [G], frozen or not; G may be another number than before."""
        if self.frozen:
            self._constant_tables(group_scale)
        else:
            learns = self.log_scale.requires_grad
            self.log_scale = nn.Parameter(group_scale.to(torch.float32).log(), requires_grad=learns)

    def freeze(self, group_scale: Tensor | None = None) -> None:
        """Replace the learned scales by constant tables. `group_scale` overrides them (when loading)."""
        stored = self.group_scale() if group_scale is None else group_scale
        del self.log_scale
        self._constant_tables(stored)
        self.frozen = True

    def _constant_tables(self, stored: Tensor) -> None:
        scale = stored.min()
        ratio = scale / stored
        for name, value in (
            ("stored_scale", stored),
            ("scale", scale),
            ("ratio", ratio),
            ("inverse_ratio", 1.0 / ratio),
        ):
            self.register_buffer(name, value.clone())

    def forward(self, x: Tensor, group: Tensor) -> tuple[Tensor, Tensor | None]:
        """Quantize and dequantize `x`.

        Args:
            x: float32 [n, ...], channels on `channel_axis`.
            group: int64 [1] or [n].

        Returns:
            Q(x * r / b), and 1/r shaped [1 or n, 1, ...] (None with a single group).
        """
        # Under autocast other layers hand on bfloat16; the grid is float32 everywhere.
        x = x if x.dtype == torch.float32 else x.to(torch.float32)
        if self._learning(x):
            return self._learned(x, group), None
        scale, ratio, inverse_ratio = self.tables()
        multiplier: Tensor | None = None
        if self.inverse_row is not None:
            multiplier = channel_shape(self.inverse_row, x.ndim, self.channel_axis)
        unscale: Tensor | None = None
        if ratio.numel() > 1 or ratio.requires_grad:
            shape = (-1, *[1] * (x.ndim - 1))
            if ratio.numel() > 1:
                ratio, inverse_ratio = ratio.index_select(0, group), inverse_ratio.index_select(0, group)
            # That of a single scale is 1, but the scale learns through it.
            rescale, unscale = ratio.reshape(shape), inverse_ratio.reshape(shape)
            multiplier = rescale if multiplier is None else rescale * multiplier
        if multiplier is not None:
            x = x * multiplier
        return quantize_dequantize(x, scale, self.qmin, self.qmax), unscale

    def _learning(self, x: Tensor) -> bool:
        """Whether gradients are asked for; under autocast the operation runs on codes, which this does not give."""
        if self.frozen or not torch.is_grad_enabled() or under_autocast(x):
            return False
        return x.requires_grad or self.log_scale.requires_grad

    def _learned(self, x: Tensor, group: Tensor) -> Tensor:
        """s_g * q with the same codes q, and no factor left over: fewer passes over memory, forth and back."""
        inverse_row = None
        if self.inverse_row is not None:
            inverse_row = channel_shape(self.inverse_row, x.ndim, self.channel_axis)
        return learned.fake_quantize(x, self.log_scale.exp(), group, inverse_row, self.qmin, self.qmax)


class QuantizedLayer(nn.Module):
    """What quantized Linear and Conv2d share: the weight grid, the float bias and the order of operations."""

    codes: Tensor
    stored_weight_scale: Tensor
    quantizer: ActivationQuantizer | None
    low_rank_a: nn.Parameter | None
    low_rank_b: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        weight_scale: Tensor,
        weight_bits: int,
        quantizer: ActivationQuantizer | None,
        context: TimestepContext,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.weight_log_scale = nn.Parameter(weight_scale.to(torch.float32).log())
        self.weight_bits = weight_bits
        self.quantizer = quantizer
        self.context = context
        self.frozen = False
        self.register_parameter("low_rank_a", None)
        self.register_parameter("low_rank_b", None)
        self.rounding: Callable[[], Tensor] | None = None
        """Gives the weight that the operation uses, while its rounding is being learned."""
        self.shared: Tensor | None = None
        """The quantized weight that all passes of an update have in common (:func:`learned.quantized_once`)."""
        self._cached: tuple[tuple[int, ...], Tensor] | None = None

    def row(self) -> Tensor | None:
        """float32 [c_in]: the channel row that the weight absorbs."""
        return None if self.quantizer is None else self.quantizer.row

    def add_low_rank(self, rank: int, generator: torch.Generator) -> None:
        """Let the weight learn as W + B A: A [rank, k], columns of length about 1, B [c_out, rank] zero at first."""
        rows, columns = self.weight.flatten(1).shape
        rank = min(rank, rows, columns)
        a = torch.randn(rank, columns, generator=generator) / rank**0.5
        self.low_rank_a = nn.Parameter(a.to(self.weight.device))
        self.low_rank_b = nn.Parameter(torch.zeros(rows, rank, device=self.weight.device))

    @torch.no_grad()
    def merge_low_rank(self) -> None:
        """Add B A to the weight for good, if there is such a thing."""
        if self.low_rank_a is not None:
            self.weight.copy_(self.float_weight())
            self.low_rank_a = self.low_rank_b = None

    def float_weight(self) -> Tensor:
        """The weight that learns, with its update of low rank."""
        if self.low_rank_a is None or self.low_rank_b is None:
            return self.weight
        return self.weight + (self.low_rank_b @ self.low_rank_a).reshape(self.weight.shape)

    def scaled_weight(self) -> Tensor:
        """The float weight times the channel row, before quantization."""
        row, weight = self.row(), self.float_weight()
        return weight if row is None else weight * channel_shape(row, weight.ndim, 1)

    def weight_scale(self) -> Tensor:
        """float32 [c_out]."""
        return self.stored_weight_scale if self.frozen else self.weight_log_scale.exp()

    def weight_codes(self) -> Tensor:
        """int8 codes in the weight's shape."""
        if self.frozen:
            return self.codes
        scale = channel_shape(self.weight_scale().detach(), self.weight.ndim, 0)
        return quantize(self.scaled_weight().detach(), scale, *weight_bounds(self.weight_bits))

    def quantized_weight(self) -> Tensor:
        """The weight that the operation uses."""
        if self.frozen:
            return dequantize_weight(self.codes, self.stored_weight_scale, 0, self.weight_bits)
        if self.rounding is not None:
            return self.rounding()
        if self.shared is not None:
            return self.shared
        weight = self.scaled_weight()
        if not self.weight_learns():
            return self._constant_weight(weight)
        self.drop_rounded()
        return learned.weight(weight, self.weight_scale(), *weight_bounds(self.weight_bits))

    def weight_learns(self) -> bool:
        """Whether the weight or its scale is being trained."""
        parts = (self.weight, self.weight_log_scale, self.low_rank_a, self.low_rank_b)
        return any(part is not None and part.requires_grad for part in parts)

    def drop_rounded(self) -> None:
        """Keep no rounded copy of the weight: it learns now, or has no values."""
        self._cached = None

    def _constant_weight(self, weight: Tensor) -> Tensor:
        # Rounding an untrained weight again at every step would cost as much as the layer itself.
        sources = (self.weight, self.weight_log_scale, self.low_rank_a, self.low_rank_b)
        version = tuple(-1 if source is None else source._version for source in sources)
        if self._cached is None or self._cached[0] != version:
            scale = channel_shape(self.weight_scale().detach(), weight.ndim, 0)
            self._cached = (version, dequantize(self.weight_codes(), scale))
        return self._cached[1]

    def freeze(
        self,
        codes: Tensor | None = None,
        weight_scale: Tensor | None = None,
        group_scale: Tensor | None = None,
    ) -> None:
        """Replace float weight and learned scales by codes and tables; arguments override them (when loading)."""
        codes = self.weight_codes() if codes is None else codes
        scale = self.weight_scale().detach() if weight_scale is None else weight_scale
        del self.weight, self.weight_log_scale
        # T5 asks whether a layer's weight is a tensor of another type than the layer is given.
        self.register_parameter("weight", None)
        self.low_rank_a = self.low_rank_b = self.rounding = self.shared = self._cached = None
        self.register_buffer("codes", codes.clone())
        self.register_buffer("stored_weight_scale", scale.clone())
        # Layers that read one tensor may share theirs.
        if self.quantizer is not None and not self.quantizer.frozen:
            self.quantizer.freeze(group_scale)
        self.frozen = True

    def operation(self, x: Tensor, weight: Tensor) -> Tensor:
        """The layer without its bias."""
        raise TypeError(f"{type(self).__name__} does not define its operation")

    def _operation_on_codes(self, x: Tensor) -> Tensor:
        """The layer without its bias under autocast: `x` float32, as the quantizer gave it.

        A value s * q of the grid is no bfloat16 number, but its code q is. So the operation runs on codes and the
        scales, which stay float32, follow: the grid is the same, only sums are rounded.
        """
        weight = self.quantized_weight()
        scale = self.weight_scale().detach()
        codes = weight / channel_shape(scale, weight.ndim, 0)
        if self.quantizer is None:
            y = self.operation(x, codes).to(torch.float32)
        else:
            step = self.quantizer.tables()[0]
            y = self.operation(x / step, codes).to(torch.float32) * step
        return y * scale.reshape(self.bias_shape())

    def bias_shape(self) -> tuple[int, ...]:
        """How the bias [c_out] broadcasts against the output."""
        return (-1,)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [n, ...] -> the layer's output, as the module docstring has it."""
        unscale: Tensor | None = None
        if self.quantizer is not None:
            x, unscale = self.quantizer(x, self.context.group)
        y = self._operation_on_codes(x) if under_autocast(x) else self.operation(x, self.quantized_weight())
        if unscale is not None:
            y = y * unscale
        return y if self.bias is None else y + self.bias.reshape(self.bias_shape())


class QuantizedLinear(QuantizedLayer):
    """Quantized `nn.Linear`: [n, ..., c_in] -> [n, ..., c_out]."""

    @property
    def in_features(self) -> int:
        return (self.codes if self.frozen else self.weight).shape[1]

    @property
    def out_features(self) -> int:
        return (self.codes if self.frozen else self.weight).shape[0]

    def operation(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


@dataclass(frozen=True, kw_only=True)
class ConvGeometry:
    """Stride, padding, dilation and groups of a convolution."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int


class QuantizedConv2d(QuantizedLayer):
    """Quantized `nn.Conv2d` with zero padding: [n, c_in, h, w] -> [n, c_out, h', w']."""

    geometry: ConvGeometry

    def operation(self, x: Tensor, weight: Tensor) -> Tensor:
        g = self.geometry
        return F.conv2d(x, weight, None, g.stride, g.padding, g.dilation, g.groups)

    def bias_shape(self) -> tuple[int, ...]:
        return (1, -1, 1, 1)


def quantized_layer(
    layer: Quantizable,
    weight_scale: Tensor,
    weight_bits: int,
    quantizer: ActivationQuantizer | None,
    context: TimestepContext,
) -> QuantizedLayer:
    """A quantized layer with the weights of an `nn.Linear` or `nn.Conv2d`."""
    arguments = (layer.weight, layer.bias, weight_scale, weight_bits, quantizer, context)
    if isinstance(layer, nn.Linear):
        return QuantizedLinear(*arguments)
    conv = QuantizedConv2d(*arguments)
    conv.geometry = ConvGeometry(
        stride=layer.stride, padding=layer.padding, dilation=layer.dilation, groups=layer.groups
    )
    return conv

"""A quantized denoiser with its activations in float: what `export --mode int4-weight-only` deploys.

The codes and scales of the weights are the checkpoint's. A channel row stays, since the weights hold its inverse.
It is another model than the checkpoint: activations are not rounded any more, for which weights were finetuned.
"""

from __future__ import annotations

from torch import Tensor, nn

from quest_deploy.quantize.attention import OPERANDS, quantized_attentions
from quest_deploy.quantize.grid import channel_shape
from quest_deploy.quantize.insert import quantized_layers


class ChannelRow(nn.Module):
    """What is left of an activation quantizer: x / b.

    Args:
        inverse_row: float32 [c].
        channel_axis: The axis of the channels in the layer's input.
    """

    inverse_row: Tensor

    def __init__(self, inverse_row: Tensor, channel_axis: int) -> None:
        super().__init__()
        self.register_buffer("inverse_row", inverse_row)
        self.channel_axis = channel_axis

    def forward(self, x: Tensor, group: Tensor) -> tuple[Tensor, None]:
        """`x` [n, ...] whatever its timestep group -> [n, ...]."""
        return x * channel_shape(self.inverse_row, x.ndim, self.channel_axis), None


def drop_activation_quantizers(denoiser: nn.Module) -> None:
    """Leave the activations of a frozen quantized denoiser in float, in place."""
    for layer in quantized_layers(denoiser).values():
        quantizer = layer.quantizer
        if quantizer is None:
            continue
        row = quantizer.inverse_row
        left = None if row is None else ChannelRow(row, quantizer.channel_axis)
        layer.register_module("quantizer", left)
    for attention in quantized_attentions(denoiser).values():
        for operand in OPERANDS:
            setattr(attention, operand, None)

"""Which layers of a denoiser are quantized, and how quantized layers take their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from quest_deploy.errors import CalibrationError
from quest_deploy.quantize.layers import (
    ActivationQuantizer,
    Quantizable,
    QuantizedConv2d,
    QuantizedLayer,
    TimestepContext,
    quantized_layer,
)

Role = Literal["boundary", "temporal", "other"]
"""First or last layer of the network, carrier of time, or neither; `quest_deploy.quantize.trace` finds it."""


class Roles(dict[str, Role]):
    """The part that each quantizable layer plays, in module order.

    Attributes:
        outlets: Of the layers that carry time, those whose output meets a stream.
    """

    def __init__(self, roles: Mapping[str, Role], outlets: Iterable[str]) -> None:
        super().__init__(roles)
        self.outlets = frozenset(outlets)


@dataclass(frozen=True, kw_only=True)
class LayerQParams:
    """Everything that quantizes one layer.

    Attributes:
        weight_bits: 4 or 8.
        weight_scale: float32 [c_out].
        activation_bits: 4 or 8; None leaves the input in float.
        group_scale: float32 [G], or None with a float input.
        qmin: Smallest activation code.
        qmax: Largest activation code.
        row: float32 [c_in], or None.
    """

    weight_bits: int
    weight_scale: Tensor
    activation_bits: int | None
    group_scale: Tensor | None
    qmin: int = -128
    qmax: int = 127
    row: Tensor | None = None


def quantizable_layers(denoiser: nn.Module) -> dict[str, Quantizable]:
    """Every `nn.Linear` and zero-padded `nn.Conv2d`, by name, in module order."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.padding_mode == "zeros")
    }


def quantized_layers(denoiser: nn.Module) -> dict[str, QuantizedLayer]:
    """Every quantized layer, by name, in module order."""
    return {name: module for name, module in denoiser.named_modules() if isinstance(module, QuantizedLayer)}


def channel_axis(layer: nn.Module) -> int:
    """The axis of the channels in a layer's input."""
    return 1 if isinstance(layer, nn.Conv2d | QuantizedConv2d) else -1


def replace_module(root: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` where the submodule `name` of `root` is."""
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, new)


def replace_layers(
    component: nn.Module, qparams: Mapping[str, LayerQParams], context: TimestepContext
) -> None:
    """Replace the layers named in `qparams` by quantized ones.

    Raises:
        CalibrationError: a name that the component does not have.
    """
    layers = quantizable_layers(component)
    unknown = sorted(qparams.keys() - layers.keys())
    if unknown:
        raise CalibrationError(
            f"{len(unknown)} layers are not in the {type(component).__name__}, the first is {unknown[0]!r}"
        )
    for name, layer in layers.items():
        if name in qparams:
            new = quantized_layer(layer, *_arguments(layer, qparams[name]), context)
            replace_module(component, name, new)


def insert(denoiser: nn.Module, qparams: Mapping[str, LayerQParams], context: TimestepContext) -> None:
    """Replace the layers named in `qparams` by quantized ones and keep `context` up to date.

    Raises:
        CalibrationError: a name that the denoiser does not have.
    """
    replace_layers(denoiser, qparams, context)
    denoiser.register_forward_pre_hook(timestep_hook(context), with_kwargs=True)


def share_quantizers(denoiser: nn.Module, siblings: Iterable[Sequence[str]]) -> None:
    """Give layers that read one tensor the same activation quantizer, which then learns from all of them.

    Args:
        denoiser: With quantized layers; those of a group that start from other numbers keep their own quantizer.
        siblings: Names, as `Trace.siblings` has them.
    """
    layers = quantized_layers(denoiser)
    for names in siblings:
        shared: ActivationQuantizer | None = None
        for layer in (layers[name] for name in names if name in layers):
            if shared is not None and layer.quantizer is not None and layer.quantizer.equals(shared):
                layer.quantizer = shared
            shared = shared or layer.quantizer


def _arguments(layer: Quantizable, qparams: LayerQParams) -> tuple[Tensor, int, ActivationQuantizer | None]:
    quantizer = None
    if qparams.group_scale is not None:
        quantizer = ActivationQuantizer(
            qparams.group_scale,
            qparams.qmin,
            qparams.qmax,
            row=qparams.row,
            channel_axis=channel_axis(layer),
        )
    return qparams.weight_scale, qparams.weight_bits, quantizer


def timestep_hook(context: TimestepContext) -> Any:
    """A denoiser's forward pre-hook (with keyword arguments) that keeps `context` up to date."""

    def set_group(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        context.set_timestep(torch.as_tensor(timestep))

    return set_group

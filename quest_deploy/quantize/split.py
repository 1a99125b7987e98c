"""Split quantization of skip concatenations (Q-Diffusion, arXiv 2302.04304, section 4.2).

What an up block computes and what the skip connection brings have ranges of their own. A convolution over both is cut
along its input channels, so that each half gets a grid for its activations and one for its weights::

    W [x_1, x_2] + bias = W_1 x_1 + (W_2 x_2 + bias)

Two scales inside one sum are no integer product; two convolutions and an Add are, and that is how it is exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quest_deploy.errors import CalibrationError
from quest_deploy.model.components import call_denoiser
from quest_deploy.model.spec import ComponentSpec
from quest_deploy.quantize.example import example_inputs
from quest_deploy.quantize.insert import quantizable_layers, replace_module

CHANNEL_AXES = (1, -3)
# torch functions that treat channels alike and leave them where they are, as between a concatenation and a convolution.
CHANNEL_KEEPING = frozenset(
    {
        "avg_pool2d",
        "contiguous",
        "dropout",
        "float",
        "gelu",
        "group_norm",
        "interpolate",
        "leaky_relu",
        "mish",
        "relu",
        "silu",
        "to",
    }
)


class SplitConv2d(nn.Module):
    """A convolution as the sum of two, over the first `channels` of its input and over the rest.

    Args:
        conv: Without groups; its bias goes to the second half.
        channels: Of the first half.
    """

    def __init__(self, conv: nn.Conv2d, channels: int) -> None:
        super().__init__()
        self.sizes = (channels, conv.in_channels - channels)
        first, second = conv.weight.detach().split(self.sizes, dim=1)
        self.first = _like(conv, first, None)
        self.second = _like(conv, second, conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [n, c_in, h, w] -> [n, c_out, h', w']."""
        first, second = x.split(self.sizes, dim=1)
        result: Tensor = self.first(first) + self.second(second)
        return result


def _like(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    half = nn.Conv2d(
        weight.shape[1],
        weight.shape[0],
        conv.kernel_size,  # type: ignore[arg-type]
        conv.stride,  # type: ignore[arg-type]
        conv.padding,  # type: ignore[arg-type]
        conv.dilation,  # type: ignore[arg-type]
        bias=bias is not None,
        device=weight.device,
    )
    half.weight.data = weight.clone()
    if bias is not None and half.bias is not None:
        half.bias.data = bias.detach().clone()
    return half.train(conv.training).requires_grad_(conv.weight.requires_grad)


class _Concatenations(TorchFunctionMode):
    """Follows concatenations of two feature maps to where they are read."""

    def __init__(self) -> None:
        super().__init__()
        self.channels: dict[int, int] = {}
        self.kept: list[Any] = []  # an identity is reused once its tensor is freed

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        channels = None
        if func is torch.cat:
            axis = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            channels = _first_of_two(args[0]) if args and axis in CHANNEL_AXES else None
        elif getattr(func, "__name__", "") in CHANNEL_KEEPING and args and isinstance(args[0], Tensor):
            channels = self.channels.get(id(args[0]))
        if channels is not None:
            self.channels[id(result)] = channels
            self.kept.append(result)
        return result


def _first_of_two(tensors: Any) -> int | None:
    """Channels of the first of two feature maps [n, c, h, w]; None for anything else."""
    if len(tensors) != 2 or any(tensor.ndim != 4 for tensor in tensors):
        return None
    return int(tensors[0].shape[1])


@torch.no_grad()
def find_concatenations(denoiser: nn.Module, spec: ComponentSpec) -> dict[str, int]:
    """The convolutions that read two concatenated feature maps, and the channels of the first, by name.

    Args:
        denoiser: Full-precision diffusers module; run once on tiny inputs.
        spec: Its inputs.
    """
    inputs = example_inputs(spec, denoiser.config)
    sample, timestep, *rest = (tensor.name for tensor in spec.inputs)
    mode, found = _Concatenations(), dict[str, int]()

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            channels = mode.channels.get(id(args[0]))
            if channels is not None:
                found[name] = channels

        return hook

    layers = {
        name: layer
        for name, layer in quantizable_layers(denoiser).items()
        if isinstance(layer, nn.Conv2d) and layer.groups == 1
    }
    handles = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
    try:
        with mode:
            call_denoiser(denoiser, inputs[sample], inputs[timestep], {name: inputs[name] for name in rest})
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in layers if name in found}


def split_layers(denoiser: nn.Module, splits: Mapping[str, int]) -> None:
    """Put two convolutions, ``<name>.first`` and ``<name>.second``, in the place of each of `splits`.

    Raises:
        CalibrationError: a name or a number of channels that the denoiser does not have.
    """
    layers = quantizable_layers(denoiser)
    for name, channels in splits.items():
        layer = layers.get(name)
        if not isinstance(layer, nn.Conv2d) or layer.groups != 1 or not 0 < channels < layer.in_channels:
            raise CalibrationError(
                f"{name!r} is no convolution of the denoiser that can be split after channel {channels}; "
                "quantize the model again"
            )
        replace_module(denoiser, name, SplitConv2d(layer, channels))


def split_channels(denoiser: nn.Module) -> dict[str, int]:
    """What :func:`split_layers` did to a denoiser."""
    return {
        name: module.sizes[0] for name, module in denoiser.named_modules() if isinstance(module, SplitConv2d)
    }

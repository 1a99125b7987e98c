"""Rotated feed-forwards: their gated inputs lose their heavy tails before they are rounded (QuaRot, arXiv 2404.00456).

What the second layer of a feed-forward is given is a product, or what an activation function leaves: few values are
far larger than the others, and a grid of 16 steps has either no place for them or no resolution for the rest. An
orthogonal matrix H in front of the quantizer mixes neighbouring channels, and the weight takes its inverse::

    W x = (W H) (H x),        H = H^T = H^-1,

the same function in float. H is Sylvester's Hadamard matrix in blocks of up to 64 channels; the entries of blocks of
4, 16 and 64 are exact in float16 and bfloat16 too. It takes the place of the feed-forward's dropout, so that no layer
has another name, and is exported as a product in floats with a constant.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from quest_deploy.errors import CalibrationError

MAX_BLOCK, MIN_BLOCK = 64, 4


class Rotation(nn.Module):
    """Every `block` neighbouring channels times a Hadamard matrix: [..., c] -> [..., c].

    Args:
        block: A power of two that divides c.
    """

    matrix: Tensor

    def __init__(self, block: int) -> None:
        super().__init__()
        self.block = block
        # Known from the block, hence nothing to store.
        self.register_buffer("matrix", hadamard(block), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [..., c], times the matrix."""
        return (x.unflatten(-1, (x.shape[-1] // self.block, self.block)) @ self.matrix).flatten(-2)


def hadamard(size: int) -> Tensor:
    """float32 [size, size], symmetric and its own inverse; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / size**0.5


def find_feed_forwards(denoiser: nn.Module) -> dict[str, int]:
    """The feed-forwards that can be rotated, and the block of each, by name."""
    found = {name: _block(module) for name, module in denoiser.named_modules()}
    return {name: block for name, block in found.items() if block >= MIN_BLOCK}


def _block(module: nn.Module) -> int:
    """The largest block for a module; 0 where it is no feed-forward of diffusers."""
    from diffusers.models.attention import FeedForward

    if not isinstance(module, FeedForward) or len(module.net) < 3:
        return 0
    between, layer = module.net[1], module.net[2]
    if not isinstance(between, nn.Dropout) or not isinstance(layer, nn.Linear):
        return 0
    # The largest power of two in the width.
    return min(layer.in_features & -layer.in_features, MAX_BLOCK)


@torch.no_grad()
def rotate_layers(denoiser: nn.Module, blocks: Mapping[str, int]) -> None:
    """Put a rotation in front of the second layer of each of the feed-forwards `blocks`, and turn its weight back.

    Raises:
        CalibrationError: a name or a block that the denoiser does not have.
    """
    modules = dict(denoiser.named_modules())
    for name, block in blocks.items():
        largest = _block(modules[name]) if name in modules else 0
        if block < MIN_BLOCK or block & (block - 1) or block > largest:
            raise CalibrationError(
                f"{name!r} is no feed-forward of the denoiser that can be rotated in blocks of {block}; "
                "quantize the model again"
            )
        net = modules[name].get_submodule("net")
        rotation, weight = Rotation(block), net.get_submodule("2").get_parameter("weight")
        # A checkpoint's has no values before its codes are there.
        if not weight.is_meta:
            weight.copy_(rotation.to(weight)(weight))
        net.register_module("1", rotation.train(net.training))


def rotated_blocks(denoiser: nn.Module) -> dict[str, int]:
    """What :func:`rotate_layers` did to a denoiser."""
    return {
        name.removesuffix(".net.1"): module.block
        for name, module in denoiser.named_modules()
        if isinstance(module, Rotation)
    }

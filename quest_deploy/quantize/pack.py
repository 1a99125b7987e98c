"""Two 4-bit codes in a byte."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from quest_deploy.errors import ArtifactError


def pack_int4(codes: Tensor) -> Tensor:
    """uint8 [ceil(n / 2)]: row-major codes in [-8, 7], the first of each pair in the low half (as in ONNX).

    Args:
        codes: int8, any shape, n elements.
    """
    flat = codes.flatten().to(torch.int16) & 0xF
    if flat.numel() % 2:
        flat = torch.cat([flat, flat.new_zeros(1)])
    return (flat[::2] | (flat[1::2] << 4)).to(torch.uint8)


def unpack_int4(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """int8 codes in [-8, 7] of the given shape: the inverse of :func:`pack_int4`.

    Raises:
        ArtifactError: the bytes are not those of that shape.
    """
    count = math.prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != (count + 1) // 2:
        raise ArtifactError(
            f"packed 4-bit weight: got {packed.numel()} values of {packed.dtype}, "
            f"expected {(count + 1) // 2} bytes for shape {list(shape)}; restore the checkpoint or finetune again"
        )
    pairs = packed.to(torch.int16)
    flat = torch.stack([pairs & 0xF, pairs >> 4], dim=1).flatten()[:count]
    return torch.where(flat > 7, flat - 16, flat).to(torch.int8).reshape(tuple(shape))

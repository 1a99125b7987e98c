"""What one component takes and gives: named tensors with types and symbolic shapes.

Symbols in shapes: ``batch`` (guidance doubles it for the denoiser), ``height`` and ``width`` (of the latents),
``image_tokens`` (of latents packed into tokens), ``sequence`` (text tokens), ``steps`` (1 or batch), ``image_height``
and ``image_width`` (pixels). A level of a U-Net has ``height_over_2``, a picture for a ControlNet ``height_times_8``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

TIMESTEP = "timestep"
Config = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One named input or output; a string in `shape` is a dynamic dimension."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class ComponentSpec:
    """The inputs (in positional order) and outputs of one component."""

    name: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def float_tensor(name: str, *shape: int | str) -> TensorSpec:
    """A float32 tensor."""
    return TensorSpec(name=name, dtype="float32", shape=shape)


def integer_tensor(name: str, *shape: int | str) -> TensorSpec:
    """An int64 tensor."""
    return TensorSpec(name=name, dtype="int64", shape=shape)


OVER, TIMES = "_over_", "_times_"


def scaled_symbol(symbol: str, factor: Fraction) -> str:
    """The symbol of a dimension that is `factor` times another."""
    if factor == 1:
        return symbol
    return f"{symbol}{TIMES}{factor}" if factor > 1 else f"{symbol}{OVER}{1 / factor}"


def base_of(symbol: str) -> tuple[str, Fraction]:
    """The inverse of :func:`scaled_symbol`."""
    for sign in (OVER, TIMES):
        base, found, number = symbol.partition(sign)
        if found:
            return base, Fraction(number) if sign == TIMES else 1 / Fraction(number)
    return symbol, Fraction(1)

"""What has to be exchanged in a component before it is traced."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MAX_PERIOD = 10000
PROBES = (0.0, 1.0, 250.5, 999.0)


class ConstantFrequencies(nn.Module):
    """Sinusoidal timestep embedding whose frequencies are a constant that torch computed.

    diffusers computes them in the graph, where the exporter folds them with numpy's exp: one unit in the last place
    away from torch's, times t = 1000, moves the angle by 1e-4. That alone can flip a code of the first time embedding
    layer, and with it the whole picture.
    """

    frequencies: Tensor

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        half = embedding.num_channels // 2
        exponent = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32)
        exponent = exponent / (half - embedding.downscale_freq_shift)
        self.register_buffer("frequencies", torch.exp(exponent))
        self.scale, self.cosine_first = embedding.scale, embedding.flip_sin_to_cos

    def forward(self, timesteps: Tensor) -> Tensor:
        """`timesteps` [n] -> [n, channels]."""
        angle = self.scale * (timesteps[:, None].to(torch.float32) * self.frequencies[None, :])
        parts = (torch.sin(angle), torch.cos(angle))
        return torch.cat(parts[::-1] if self.cosine_first else parts, dim=-1)


@contextlib.contextmanager
def traceable(module: nn.Module) -> Iterator[nn.Module]:
    """`module` with its timestep embeddings replaced by :class:`ConstantFrequencies`, for the body's duration.

    An embedding that would not give the same bits as its replacement stays.
    """
    from diffusers.models.embeddings import Timesteps

    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Timesteps) and _same(child):
                replaced.append((parent, name, child))
                setattr(parent, name, ConstantFrequencies(child).eval())
    try:
        yield module
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


def _same(embedding: Any) -> bool:
    probes = torch.tensor(PROBES)
    original, replacement = embedding(probes), ConstantFrequencies(embedding)(probes)
    same = original.shape == replacement.shape and torch.equal(original, replacement)
    if not same:
        logger.warning(
            "%s: its frequencies stay in the graph, as the constants of this version would differ",
            type(embedding).__name__,
        )
    return same

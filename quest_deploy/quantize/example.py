"""The least inputs that a denoiser takes: what it is run on to see what feeds what."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quest_deploy.model.spec import ComponentSpec, latent_granularity, latent_size
from quest_deploy.model.tensors import base_of

# A number that no model has for a width, so that it stands for the batch wherever it appears in a tape.
BATCH = 7
TOKENS = 3
IMAGE_TOKENS = 5
GRANULES = 2


def example_inputs(spec: ComponentSpec, config: Any) -> dict[str, Tensor]:
    """The least inputs that a denoiser of that specification and configuration takes, all zero."""
    granularity = latent_granularity(config)
    height, width = (
        min(size, GRANULES * granularity) for size in latent_size(config, GRANULES * granularity)
    )
    sizes = {"batch": BATCH, "steps": BATCH, "sequence": TOKENS, "height": height, "width": width}
    sizes["image_tokens"] = IMAGE_TOKENS

    def length(size: int | str) -> int:
        if isinstance(size, int):
            return size
        base, factor = base_of(size)
        return int(sizes[base] * factor)

    return {
        tensor.name: torch.zeros([length(size) for size in tensor.shape], dtype=getattr(torch, tensor.dtype))
        for tensor in spec.inputs
    }

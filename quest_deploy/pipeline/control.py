"""A ControlNet before every call of the denoiser: what it sees in a picture goes to the denoiser's skip connections."""

from __future__ import annotations

import torch
from torch import Tensor

from quest_deploy.engines.base import Engine
from quest_deploy.model.components import Conditioning
from quest_deploy.model.denoisers import CONTROL, DOWN_RESIDUAL, MID_RESIDUAL
from quest_deploy.model.spec import TIMESTEP, ComponentSpec
from quest_deploy.model.tensors import base_of
from quest_deploy.pipeline.parts import run_in_parts


def black_picture(controlnet: ComponentSpec, latents: Tensor, conditioning: Conditioning) -> Tensor:
    """A picture without anything in it, float32 [n, c, H, W], where none is given.

    Args:
        controlnet: What the network takes.
        latents: Of the images, [n, c, h, w].
        conditioning: [n, ...] by input name.
    """
    (shape,) = (tensor.shape for tensor in controlnet.inputs if tensor.name == CONTROL)
    sides = [
        int(side * base_of(str(symbol))[1])
        for side, symbol in zip(latents.shape[-2:], shape[-2:], strict=True)
    ]
    count = next(iter(conditioning.values())).shape[0]
    return torch.zeros(count, int(shape[1]), *sides)


def controlled(
    controlnet: Engine, sample: Tensor, timestep: Tensor, conditioning: Conditioning
) -> dict[str, Tensor]:
    """`conditioning` with the network's residuals in place of the picture.

    Args:
        controlnet: The network.
        sample: Latents scaled for the timestep, [n, c, h, w].
        timestep: float32 [1] or [n].
        conditioning: [n, ...] by input name, with `controlnet_cond` in [0, 1], [n, 3, H, W].
    """
    given = {"sample": sample, TIMESTEP: timestep, **conditioning}
    names = [tensor.name for tensor in controlnet.spec.inputs]
    outputs = run_in_parts(controlnet, **{name: given[name] for name in names})
    *down, mid = (outputs[tensor.name] for tensor in controlnet.spec.outputs)
    rest = {name: value for name, value in conditioning.items() if name != CONTROL}
    return {
        **rest,
        **{f"{DOWN_RESIDUAL}{index}": value for index, value in enumerate(down)},
        MID_RESIDUAL: mid,
    }

"""What one model's denoiser is told, for prompts and for the image that is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quest_deploy.model.components import MASKED, Conditioning
from quest_deploy.model.conditioning.prompting import PROMPTINGS
from quest_deploy.model.conditioning.request import REQUEST_INPUTS, ImageRequest, everything_masked
from quest_deploy.model.conditioning.text import TextEncoders
from quest_deploy.model.families import Classes, Family
from quest_deploy.model.spec import ComponentSpec, has_negative


@dataclass(frozen=True, kw_only=True)
class Conditioner:
    """One model's ways to tell its denoiser what to draw.

    Attributes:
        family: The model's.
        classes: What a class-conditional model draws, else None.
        denoiser: The denoiser's inputs.
        encoders: Its text encoders; none for a model that reads no text.
        pixels_per_latent: Along one axis.
    """

    family: Family
    classes: Classes | None
    denoiser: ComponentSpec
    encoders: TextEncoders
    pixels_per_latent: int

    @property
    def has_negative(self) -> bool:
        """Whether the model knows the absence of a prompt, which guidance starts from."""
        return has_negative(self.family, self.classes, self.denoiser)

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """What the denoiser is told for `prompts`, [n, ...] by input name.

        Text becomes embeddings, a class its number; an unconditional model is told nothing. The empty prompt stands
        for no text and no class.

        Raises:
            ConfigError: a prompt is no class of a class-conditional model.
        """
        return self._encode(prompts, self.family.prompting)

    def _encode(self, prompts: Sequence[str], prompting: str) -> dict[str, Tensor]:
        if self.classes is not None:
            return {"class_labels": torch.tensor([self.classes.number(prompt) for prompt in prompts])}
        if not self.family.has_text:
            return {}
        return PROMPTINGS[prompting](self.encoders, prompts, self.denoiser)

    def encode_negative(self, count: int, prompt: str = "") -> dict[str, Tensor] | None:
        """What the denoiser is told for the negative branch of `count` images; None where the model has none."""
        if not self.has_negative:
            return None
        told = self._encode([prompt] * count, self.family.negative_prompting or self.family.prompting)
        if self.family.zero_negative and not prompt:
            return {name: torch.zeros_like(value) for name, value in told.items()}
        return told

    def complete(
        self,
        conditioning: Conditioning,
        latents: Tensor,
        guidance_scale: float,
        *,
        negative: bool = False,
    ) -> dict[str, Tensor]:
        """`conditioning` and what the denoiser is told besides, of the image's size and the guidance scale.

        Args:
            conditioning: What :meth:`encode` gave, [n, ...] by input name.
            latents: Of the images, [n, c, h, w]; only their shape counts.
            guidance_scale: For models with an input for it.
            negative: Whether it is for the negative branch.
        """
        height, width = (side * self.pixels_per_latent for side in latents.shape[-2:])
        request = ImageRequest(height=height, width=width, guidance_scale=guidance_scale, negative=negative)
        result = dict(conditioning)
        sample = self.denoiser.inputs[0]
        if latents.ndim == len(sample.shape) and latents.shape[1] < int(sample.shape[1]):
            like = next(iter(conditioning.values()))
            result.setdefault(MASKED, everything_masked(latents).to(like).repeat(like.shape[0], 1, 1, 1))
        for tensor in self.denoiser.inputs:
            if tensor.name in REQUEST_INPUTS:
                like = next(iter(conditioning.values()))
                value = REQUEST_INPUTS[tensor.name](request, tensor).to(like.device)
                result[tensor.name] = value.repeat(like.shape[0], *[1] * (value.ndim - 1))
        return result

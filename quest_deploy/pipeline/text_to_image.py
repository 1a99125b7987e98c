"""From prompts, classes or nothing but noise to images, on any backend.

Tokens, guidance, schedule and loop are the same code for every backend; only the components differ.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest_deploy import sampling
from quest_deploy.engines.base import Closing, Engine
from quest_deploy.errors import ConfigError
from quest_deploy.model.components import Conditioning, denoiser_inputs, without_variance
from quest_deploy.model.families import TEXT_ENCODER, VAE_DECODER, Classes, Family
from quest_deploy.model.spec import ComponentSpec, latent_size, vae_scale_factor
from quest_deploy.pipeline.parts import run_in_parts
from quest_deploy.sampling import Step

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Pipeline(Closing):
    """An engine for each component, and what joins them. A context manager that frees the engines.

    Tensors may be given on any device; those returned lie on `device`.

    Attributes:
        path: The artifact or model it was loaded from.
        stage: What that is: "model", "checkpoint", "onnx" or "engines".
        backend: What runs the engines.
        device: Where tensors go in and come out.
        family: Which components there are, and what the denoiser is called.
        classes: What a class-conditional model draws, else None.
        engines: By component name.
        tokenizer: `CLIPTokenizer`; None for a model that reads no text.
        scheduler: The model's own scheduler; never stepped, only copied.
        configs: The configuration of each component, by its name.
    """

    path: Path
    stage: str
    backend: str
    device: torch.device
    family: Family
    classes: Classes | None = None
    engines: dict[str, Engine]
    tokenizer: Any
    scheduler: Any
    configs: Mapping[str, Mapping[str, Any]]
    _told: set[str] = field(default_factory=set, repr=False)

    @property
    def denoiser_spec(self) -> ComponentSpec:
        """The denoiser's inputs and outputs."""
        return self.engines[self.family.denoiser].spec

    @property
    def has_negative(self) -> bool:
        """Whether the model knows the absence of a prompt, which guidance starts from."""
        return self.family.has_text or (self.classes is not None and self.classes.null is not None)

    @property
    def pixels_per_latent(self) -> int:
        """Along one axis; 1 where the denoiser draws pixels."""
        return vae_scale_factor(self.configs.get(VAE_DECODER))

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image of the given pixels (None: the model's own size).

        Raises:
            ConfigError: the size is not a multiple of the pixels of one latent, or the model has one size only.
        """
        config, scale = self.configs[self.family.denoiser], self.pixels_per_latent
        resizable = isinstance(self.denoiser_spec.inputs[0].shape[-1], str)
        sides = []
        for name, pixels, side in zip(("height", "width"), (height, width), latent_size(config), strict=True):
            if pixels is not None and not resizable and pixels != side * scale:
                raise ConfigError(
                    f"{name} is {pixels} pixels, but this model draws {side * scale} only; leave it out"
                )
            if pixels is not None and (pixels < scale or pixels % scale):
                raise ConfigError(
                    f"{name} is {pixels} pixels, expected a multiple of {scale}, the pixels of one latent; "
                    f"use {max(1, round(pixels / scale)) * scale}"
                )
            sides.append(side if pixels is None else pixels // scale)
        return (int(config["in_channels"]), sides[0], sides[1])

    def encode(self, prompts: str | Sequence[str]) -> dict[str, Tensor]:
        """What the denoiser is told for `prompts`, [n, ...] by input name.

        Text becomes embeddings (a prompt that is too long is cut, with a warning), a class its number; an unconditional
        model is told nothing. The empty prompt stands for no text and no class.

        Raises:
            ConfigError: a prompt is no class of a class-conditional model.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.classes is not None:
            numbers = [self.classes.number(prompt) for prompt in prompts]
            return {"class_labels": torch.tensor(numbers, device=self.device)}
        if not self.family.has_text:
            return {}
        outputs = run_in_parts(self.engines[TEXT_ENCODER], input_ids=self.tokenize(prompts).to(self.device))
        return {"encoder_hidden_states": outputs["last_hidden_state"]}

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        """What the text encoder is given for `prompts`, int64 [n, sequence]."""
        for prompt in prompts:
            self._tell_if_cut(prompt)
        tokens: Tensor = self.tokenizer(
            list(prompts),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        ).input_ids
        return tokens

    def encode_negative(self, count: int, prompt: str = "") -> dict[str, Tensor] | None:
        """What the denoiser is told for the negative branch of `count` images; None where the model has none."""
        return self.encode([prompt] * count) if self.has_negative else None

    def _tell_if_cut(self, prompt: str) -> None:
        if prompt in self._told:
            return
        self._told.add(prompt)
        limit = self.tokenizer.model_max_length
        tokens = self.tokenizer([prompt], truncation=False, verbose=False).input_ids[0]
        if len(tokens) > limit:
            dropped = self.tokenizer.decode(tokens[limit - 1 : -1]).strip()
            logger.warning(
                "prompt %r has %d tokens, the model reads %d: it does not see %r",
                prompt, len(tokens) - 2, limit - 2, dropped,
            )  # fmt: skip

    def initial_noise(
        self, seeds: Sequence[int], height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Unit Gaussian noise, float32 [n, c, h, w]: a seed means the same noise at any batch size."""
        return sampling.initial_noise(seeds, self.latent_shape(height, width)).to(self.device)

    def make_scheduler(self, name: str | None = None) -> Any:
        """A fresh scheduler of that name (None: the model's own kind) with the model's noise schedule.

        Raises:
            ConfigError: the name is unknown.
        """
        return sampling.make_scheduler(name, self.scheduler.config)

    @torch.no_grad()
    def denoise(
        self,
        noise: Tensor,
        positive: Conditioning,
        negative: Conditioning | None,
        *,
        steps: int,
        guidance_scale: float,
        scheduler: str | None = None,
        generators: Sequence[torch.Generator] | None = None,
        callback: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Run the denoising loop.

        Args:
            noise: Unit Gaussian noise, [n, c, h, w].
            positive: What :meth:`encode` gave for the prompts.
            negative: What it gave for the negative prompts; None for a model without guidance.
            steps: Number of denoising steps.
            guidance_scale: Up to 1 means no guidance.
            scheduler: A name; None takes the model's own.
            generators: One for each image, for schedulers that draw noise at every step; None seeds one for each
                image with its position in the batch.
            callback: Called once each step.

        Returns:
            Latents, [n, c, h, w].

        Raises:
            ConfigError: the scheduler is unknown or cannot do that many steps.
        """
        if generators is None:
            generators = [torch.Generator().manual_seed(position) for position in range(len(noise))]
        return sampling.denoise(
            self._denoiser,
            self.make_scheduler(scheduler),
            noise.to(self.device),
            self._here(positive),
            None if negative is None else self._here(negative),
            steps=steps,
            guidance_scale=guidance_scale,
            generators=generators,
            callback=callback,
        )

    @torch.no_grad()
    def predict_noise(
        self,
        latents: Tensor,
        timestep: Tensor,
        positive: Conditioning,
        negative: Conditioning | None,
        *,
        guidance_scale: float,
    ) -> Tensor:
        """The guided noise prediction on `latents` [n, c, h, w], which are already scaled for the timestep."""
        return sampling.predict_noise(
            self._denoiser,
            latents.to(self.device),
            timestep.to(self.device),
            self._here(positive),
            None if negative is None else self._here(negative),
            guidance_scale,
        )

    def _here(self, conditioning: Conditioning) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in conditioning.items()}

    def _denoiser(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        spec = self.denoiser_spec
        inputs = denoiser_inputs(spec, sample, timestep.float(), conditioning)
        output = run_in_parts(self.engines[spec.name], **inputs)[spec.outputs[0].name]
        return without_variance(output, sample.shape[1])

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, c, h, w] -> images, float32 [n, 1 or 3, H, W] in [0, 1]."""
        pixels = latents.to(self.device)
        if VAE_DECODER in self.engines:
            pixels = run_in_parts(self.engines[VAE_DECODER], latent_sample=self.unscaled(pixels))["sample"]
        return (pixels * 0.5 + 0.5).clamp(0, 1)

    def unscaled(self, latents: Tensor) -> Tensor:
        """What the decoder is given for `latents`."""
        config = self.configs[VAE_DECODER]
        unscaled = latents / config["scaling_factor"]
        if config.get("shift_factor") is not None:
            unscaled = unscaled + config["shift_factor"]
        return unscaled

    def as_diffusers(self) -> Any:
        """A `diffusers.StableDiffusionPipeline` around the same engines, for code that expects one.

        Its scheduler may be replaced as usual, and it draws what this pipeline draws. It has no VAE encoder, no safety
        checker and no weights: what changes weights (LoRA, IP-Adapter, `clip_skip`) is refused.

        Raises:
            ConfigError: the pipeline is of another kind.
        """
        if not self.family.has_text:
            raise ConfigError(
                f"a {self.family.pipeline} has no diffusers stand-in yet; call encode, denoise and decode instead"
            )
        from quest_deploy.pipeline.drop_in import diffusers_pipeline

        return diffusers_pipeline(
            self.engines, self.configs, self.tokenizer, self.make_scheduler(), self.device
        )

    def close(self) -> None:
        """Free the engines; calling it again does nothing."""
        for engine in self.engines.values():
            engine.close()

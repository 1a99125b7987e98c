"""From prompts, classes or nothing but noise to images, on any backend.

Tokens, guidance, schedule and loop are the same code for every backend; only the components differ.
"""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quest_deploy import sampling
from quest_deploy.engines.base import Closing, Engine
from quest_deploy.errors import ConfigError, EngineRunError
from quest_deploy.model.components import Conditioning, denoiser_inputs, like_latents, scaled, unscaled
from quest_deploy.model.conditioning import Conditioner, Outputs, TextEncoders, token_limit, tokens_of
from quest_deploy.model.denoisers import CONTROL
from quest_deploy.model.families import REFINER, VAE_DECODER, VAE_ENCODER, Classes, Family
from quest_deploy.model.spec import ComponentSpec, vae_scale_factor
from quest_deploy.pipeline.control import black_picture, controlled
from quest_deploy.pipeline.parts import run_in_parts
from quest_deploy.pipeline.request import check_drawing, check_seeds, check_texts, flow_of, latent_shape
from quest_deploy.sampling import Flow, Step

logger = logging.getLogger(__name__)

# Cut prompts that are not told again; a server sees new ones for as long as it runs.
MOST_TOLD = 1000


@dataclass(kw_only=True)
class Pipeline(Closing):
    """An engine for each component, and what joins them. A context manager that frees the engines.

    Tensors may be given on any device; those returned lie on `device`.

    Attributes:
        path: The artifact or model it was loaded from, absolute and without links.
        stage: What that is: "model", "checkpoint", "onnx" or "engines".
        backend: What runs the engines.
        device: Where tensors go in and come out.
        family: Which components there are, and what the denoiser is called.
        classes: What a class-conditional model draws, else None.
        engines: By component name.
        tokenizers: By name of the text encoder; none for a model that reads no text.
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
    tokenizers: Mapping[str, Any]
    scheduler: Any
    configs: Mapping[str, Mapping[str, Any]]
    _told: set[str] = field(default_factory=set, repr=False)
    _process: int | None = field(default=None, repr=False)

    @property
    def denoiser_spec(self) -> ComponentSpec:
        """The denoiser's inputs and outputs."""
        return self.engines[self.family.denoiser].spec

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's; None for a model that reads no text."""
        return next(iter(self.tokenizers.values()), None)

    @property
    def text_encoders(self) -> TextEncoders:
        """The text encoders, run by their engines."""

        def run(name: str, inputs: Mapping[str, Tensor]) -> Outputs:
            return run_in_parts(self.engines[name], **self._here(inputs))

        return TextEncoders(parts=self.family.text, tokenizers=self.tokenizers, run=run)

    @property
    def conditioner(self) -> Conditioner:
        """What tells the denoiser what to draw."""
        return Conditioner(
            family=self.family,
            classes=self.classes,
            denoiser=self.denoiser_spec,
            encoders=self.text_encoders,
            pixels_per_latent=self.pixels_per_latent,
        )

    @property
    def has_negative(self) -> bool:
        """Whether the model knows the absence of a prompt, which guidance starts from."""
        return self.conditioner.has_negative

    @property
    def pixels_per_latent(self) -> int:
        """Along one axis; 1 where the denoiser draws pixels."""
        return vae_scale_factor(self.configs.get(VAE_DECODER))

    @property
    def flow(self) -> Flow:
        """How a flow's noise levels are made."""
        return flow_of(self.family, self.configs)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image of the given pixels (None: the model's own size).

        Raises:
            ConfigError: the size is not a multiple of what the model divides it by, or the model has one size only.
        """
        return latent_shape(self.configs, self.denoiser_spec, self.backend, height, width)

    def encode(self, prompts: str | Sequence[str]) -> dict[str, Tensor]:
        """What the denoiser is told for `prompts`, [n, ...] by input name.

        Text becomes embeddings (a prompt that is too long is cut, with a warning), a class its number; an unconditional
        model is told nothing. The empty prompt stands for no text and no class.

        Raises:
            ConfigError: a prompt is no text, or no class of a class-conditional model.
            EngineRunError: this process was forked from one that has drawn.
        """
        self._check_process()
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if self.family.has_text or self.classes is not None:
            check_texts("prompt", prompts)
        for prompt in prompts if self.family.has_text else ():
            self._tell_if_cut(prompt)
        return self._here(self.conditioner.encode(prompts))

    def encode_negative(self, count: int, prompt: str = "") -> dict[str, Tensor] | None:
        """What the denoiser is told for the negative branch of `count` images; None where the model has none.

        A prompt that is too long is cut, with a warning.

        Raises:
            ConfigError: the prompt is no text, or there are no images.
        """
        if self.has_negative:
            check_texts("negative prompt", [prompt] * count)
            if self.family.has_text:
                self._tell_if_cut(prompt)
        told = self.conditioner.encode_negative(count, prompt)
        return None if told is None else self._here(told)

    def complete(
        self, conditioning: Conditioning, latents: Tensor, guidance_scale: float, *, negative: bool = False
    ) -> dict[str, Tensor]:
        """`conditioning` and what the denoiser is told of the image's size and the guidance scale, on `device`."""
        told = self.conditioner.complete(conditioning, latents, guidance_scale, negative=negative)
        controlnet = self.engines.get(str(self.family.controlnet))
        if controlnet is not None:
            told.setdefault(CONTROL, black_picture(controlnet.spec, latents, told))
        return self._here(told)

    def _check_process(self) -> None:
        """Find out what would wait for ever: a fork of a process whose threads of torch have worked.

        Raises:
            EngineRunError: says what to do instead.
        """
        here = os.getpid()
        if self._process not in (None, here) and torch.get_num_threads() > 1:
            raise EngineRunError(
                "this process was forked from one whose pipeline has drawn already, and torch's threads are left "
                "there, so that drawing would never end; start workers with spawn and load the pipeline in each, fork "
                "before the first image, or call torch.set_num_threads(1) in the worker"
            )
        self._process = here

    def _tell_if_cut(self, prompt: str) -> None:
        if prompt in self._told:
            return
        # The longest reader: what it does not see, no other does.
        part = max(self.family.text, key=lambda part: token_limit(part, self.tokenizers[part.name]))
        tokenizer = self.tokenizers[part.name]
        limit = token_limit(part, tokenizer)
        tokens = tokens_of(tokenizer, prompt)
        if len(tokens) > limit:
            if len(self._told) >= MOST_TOLD:
                self._told.clear()
            self._told.add(prompt)
            special = tokenizer.num_special_tokens_to_add()
            dropped = tokenizer.decode(tokens[limit - 1 : -1]).strip()
            logger.warning(
                "prompt %r has %d tokens, the model reads %d: it does not see %r",
                prompt, len(tokens) - special, limit - special, dropped,
            )  # fmt: skip

    def initial_noise(
        self, seeds: Sequence[int], height: int | None = None, width: int | None = None
    ) -> Tensor:
        """Unit Gaussian noise, float32 [n, c, h, w]: a seed means the same noise at any batch size.

        Raises:
            ConfigError: a seed is none that torch takes, or the model does not draw that size.
        """
        check_seeds(seeds)
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
                image with its position in the batch, behind what :meth:`initial_noise` takes of such a seed.
            callback: Called once each step; what it raises ends the loop, and leaves the pipeline as it was.

        Returns:
            Latents, [n, c, h, w].

        Raises:
            ConfigError: the scheduler is unknown or cannot do that many steps, a number cannot be used, or there is
                not one generator for each image.
        """
        self._check_process()
        check_drawing(len(noise), steps, guidance_scale, generators)
        if generators is None:
            generators = sampling.generators_of(range(len(noise)))
            # The noise that they begin with may be the one that is given: added once more, it would not be fresh.
            _, channels, height, width = noise.shape
            sampling.draw_noise(generators, (channels, height, width))
        return sampling.denoise(
            self._denoiser,
            self.make_scheduler(scheduler),
            noise.to(self.device),
            self.complete(positive, noise, guidance_scale),
            None if negative is None else self.complete(negative, noise, guidance_scale, negative=True),
            steps=steps,
            guidance_scale=guidance_scale,
            flow=self.flow,
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
            self.complete(positive, latents, guidance_scale),
            None if negative is None else self.complete(negative, latents, guidance_scale, negative=True),
            guidance_scale,
        )

    def _here(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value.to(self.device) for name, value in tensors.items()}

    def denoiser_inputs(
        self, sample: Tensor, timestep: Tensor, conditioning: Conditioning
    ) -> dict[str, Tensor]:
        """All inputs of the denoiser by name.

        Args:
            sample: Latents scaled for the timestep, [n, c, h, w].
            timestep: Of the scheduler, [1] or [n].
            conditioning: What :meth:`complete` gave.
        """
        sample, time = sample.to(self.device), timestep.to(self.device).float() / self.family.timestep_divisor
        controlnet = self.engines.get(str(self.family.controlnet))
        if controlnet is not None:
            conditioning = controlled(controlnet, sample, time, conditioning)
        return denoiser_inputs(self.denoiser_spec, sample, time, conditioning)

    def _denoiser(self, sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        spec, inputs = self.denoiser_spec, self.denoiser_inputs(sample, timestep, conditioning)
        output = run_in_parts(self.engines[spec.name], **inputs)[spec.outputs[0].name]
        return like_latents(output, sample)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [n, c, h, w] -> images, float32 [n, 1 or 3, H, W] in [0, 1]."""
        self._check_process()
        pixels = latents.to(self.device)
        if VAE_DECODER in self.engines:
            pixels = run_in_parts(self.engines[VAE_DECODER], latent_sample=self.unscaled(pixels))["sample"]
        return (pixels * 0.5 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images float32 [n, 3, H, W] in [0, 1] -> their most likely latents, [n, c, h, w].

        Raises:
            ConfigError: the model has no component that reads images.
        """
        if VAE_ENCODER not in self.engines:
            raise ConfigError(
                f"a {self.family.pipeline} reads no images; give one of StableDiffusionInpaintPipeline or {REFINER}"
            )
        pixels = images.to(self.device) * 2 - 1
        found = run_in_parts(self.engines[VAE_ENCODER], sample=pixels)["latent_parameters"]
        return scaled(self.configs[VAE_DECODER], found.chunk(2, dim=1)[0])

    def unscaled(self, latents: Tensor) -> Tensor:
        """What the decoder is given for `latents`."""
        return unscaled(self.configs[VAE_DECODER], latents)

    def as_diffusers(self, *, safety_checker: bool = True) -> Any:
        """A `diffusers.StableDiffusionPipeline` around the same engines, for code that expects one.

        Its scheduler may be replaced as usual, and it draws what this pipeline draws. It has no VAE encoder and no
        weights: what changes weights (LoRA, IP-Adapter, `clip_skip`) is refused.

        Args:
            safety_checker: Take the model's safety checker along, if it brings one.

        Raises:
            ArtifactError: the safety checker cannot be used.
            ConfigError: the pipeline is of another kind.
        """
        if self.family.pipeline != "StableDiffusionPipeline":
            raise ConfigError(
                f"a {self.family.pipeline} has no diffusers stand-in yet; call encode, denoise and decode instead"
            )
        from quest_deploy.pipeline.drop_in import diffusers_pipeline
        from quest_deploy.pipeline.safety import load_safety_checker

        checker = load_safety_checker(self.path, self.device) if safety_checker else None
        # A tokenizer of its own: diffusers takes no turns with what this pipeline reads in other threads.
        tokenizer = copy.deepcopy(self.tokenizer)
        return diffusers_pipeline(
            self.engines, self.configs, tokenizer, self.make_scheduler(), self.device, checker
        )

    def close(self) -> None:
        """Free the engines; calling it again does nothing."""
        for engine in self.engines.values():
            engine.close()

"""A `diffusers.StableDiffusionPipeline` whose three networks are engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from quest_deploy.engines.base import Engine
from quest_deploy.errors import ConfigError
from quest_deploy.model.families import TEXT_ENCODER, VAE_DECODER
from quest_deploy.pipeline.parts import run_in_parts
from quest_deploy.pipeline.safety import SafetyChecker


class _StandIn(nn.Module):
    """What diffusers asks of any network: its configuration, device and dtype."""

    dtype = torch.float32

    def __init__(self, engine: Engine, config: Mapping[str, Any], device: torch.device) -> None:
        super().__init__()
        self.engine = engine
        self.config = FrozenDict(config)
        self.device = device

    def refuse(self, **options: Any) -> None:
        """Check that no option asks for what was fixed when the engine was made.

        Raises:
            ConfigError: names the option.
        """
        given = [name for name, value in options.items() if value not in (None, False)]
        if given:
            raise ConfigError(
                f"{self.engine.spec.name}: got {', '.join(given)}, which an engine cannot take; leave it out, "
                "or use the diffusers model itself"
            )


class TextEncoderStandIn(_StandIn):
    """Has the call of `CLIPTextModel`."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, output_hidden_states: bool = False
    ) -> BaseModelOutputWithPooling:
        """int64 [b, l] -> hidden states [b, l, d] and the pooled ones, [b, d]."""
        self.refuse(clip_skip=output_hidden_states)
        if attention_mask is not None:
            self.refuse(attention_mask="a mask")
        outputs = run_in_parts(self.engine, input_ids=input_ids.to(self.device))
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs["last_hidden_state"], pooler_output=outputs["pooler_output"]
        )


class DenoiserStandIn(_StandIn):
    """Has the call of `UNet2DConditionModel` with ``return_dict=False``."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = False,
    ) -> tuple[Tensor]:
        """`sample` [b, c, h, w], `timestep` 0-d, `encoder_hidden_states` [b, l, d] -> [b, c, h, w]."""
        self.refuse(
            cross_attention_kwargs=cross_attention_kwargs,
            added_cond_kwargs=added_cond_kwargs,
            return_dict=return_dict,
        )
        if timestep_cond is not None:
            self.refuse(timestep_cond="a tensor")
        outputs = run_in_parts(
            self.engine,
            sample=sample,
            timestep=timestep.reshape(1).float(),
            encoder_hidden_states=encoder_hidden_states,
        )
        return (outputs["out_sample"],)


class VaeStandIn(_StandIn):
    """Has the `decode` of `AutoencoderKL` with ``return_dict=False``; there is no encoder."""

    def decode(
        self, latents: Tensor, return_dict: bool = False, generator: torch.Generator | None = None
    ) -> tuple[Tensor]:
        """Unscaled latents [b, c, h, w] -> pixels in [-1, 1], [b, 3, H, W]."""
        self.refuse(return_dict=return_dict)
        return (run_in_parts(self.engine, latent_sample=latents)["sample"],)


def diffusers_pipeline(
    engines: Mapping[str, Engine],
    configs: Mapping[str, Mapping[str, Any]],
    tokenizer: Any,
    scheduler: Any,
    device: torch.device,
    safety_checker: SafetyChecker | None = None,
) -> Any:
    """Join engines, tokenizer and scheduler to a `StableDiffusionPipeline`.

    Args:
        engines: By component name; they are shared, not copied.
        configs: The configuration of each component.
        tokenizer: `CLIPTokenizer`.
        scheduler: A scheduler of its own: the pipeline steps it.
        device: Where the engines take their inputs.
        safety_checker: Blackens what it flags; None asks nobody.
    """
    return StableDiffusionPipeline(
        text_encoder=TextEncoderStandIn(engines[TEXT_ENCODER], configs[TEXT_ENCODER], device),
        unet=DenoiserStandIn(engines["unet"], configs["unet"], device),
        vae=VaeStandIn(engines[VAE_DECODER], configs[VAE_DECODER], device),
        tokenizer=tokenizer,
        scheduler=scheduler,
        safety_checker=None if safety_checker is None else safety_checker.module,
        feature_extractor=None if safety_checker is None else safety_checker.processor,
        requires_safety_checker=safety_checker is not None,
    )

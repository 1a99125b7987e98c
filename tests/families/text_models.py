"""A model of every kind that reads text, with a few thousand random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests.families.text_parts import (
    HIDDEN,
    PROJECTED,
    clip,
    clip_tokenizer,
    euler,
    flow,
    gemma_tokenizer,
    shaken,
    t5,
    t5_tokenizer,
    vae,
)

UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}


def sdxl_unet(encoders: int, time_ids: int) -> Any:
    from diffusers import UNet2DConditionModel

    return shaken(
        UNet2DConditionModel(
            **UNET,
            cross_attention_dim=encoders * HIDDEN,
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=PROJECTED + 8 * time_ids,
        )
    )


def sdxl() -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline(
        text_encoder=clip(),
        text_encoder_2=clip(projection=True),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=sdxl_unet(2, 6),
        vae=vae(scaling_factor=0.13),
        scheduler=euler(),
        add_watermarker=False,
    )


def sdxl_refiner() -> Any:
    from diffusers import StableDiffusionXLImg2ImgPipeline

    return StableDiffusionXLImg2ImgPipeline(
        text_encoder=None,
        text_encoder_2=clip(projection=True),
        tokenizer=None,
        tokenizer_2=clip_tokenizer(),
        unet=sdxl_unet(1, 5),
        vae=vae(scaling_factor=0.13),
        scheduler=euler(),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )


def lcm() -> Any:
    """A latent consistency model, which is told the guidance scale, with a tiny autoencoder."""
    from diffusers import (
        AutoencoderTiny,
        LatentConsistencyModelPipeline,
        LCMScheduler,
        UNet2DConditionModel,
    )

    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    return LatentConsistencyModelPipeline(
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=shaken(UNet2DConditionModel(**UNET, cross_attention_dim=HIDDEN, time_cond_proj_dim=8)),
        vae=shaken(tiny),
        scheduler=LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def pixart(pipeline: str, **changes: Any) -> Any:
    import diffusers
    from diffusers import DPMSolverMultistepScheduler, PixArtTransformer2DModel

    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        # Three embeddings of equal width make the one of a model that is told sizes.
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        caption_channels=HIDDEN,
        sample_size=8,
        patch_size=2,
        interpolation_scale=1,
        **changes,
    )
    return getattr(diffusers, pipeline)(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(),
        vae=vae(scaling_factor=0.13),
        transformer=shaken(transformer),
        scheduler=DPMSolverMultistepScheduler(),
    )


def pixart_alpha() -> Any:
    return pixart("PixArtAlphaPipeline")


def pixart_sized() -> Any:
    """As models for 1024 pixels are, told size and aspect ratio."""
    return pixart("PixArtAlphaPipeline", use_additional_conditions=True)


def pixart_sigma() -> Any:
    return pixart("PixArtSigmaPipeline")


def sd3(*, with_t5: bool = True, **changes: Any) -> Any:
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=40 if not with_t5 else HIDDEN * 2,
        caption_projection_dim=16,
        pooled_projection_dim=2 * PROJECTED,
        pos_embed_max_size=12,
        **changes,
    )
    return StableDiffusion3Pipeline(
        transformer=shaken(transformer),
        scheduler=flow(shift=3.0, use_dynamic_shifting=not with_t5),
        vae=vae(scaling_factor=1.5, shift_factor=0.06),
        text_encoder=clip(projection=True),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(projection=True),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(2 * HIDDEN) if with_t5 else None,
        tokenizer_3=t5_tokenizer() if with_t5 else None,
    )


def sd35() -> Any:
    """As Stable Diffusion 3.5: normed queries and keys, a second attention in some blocks; here without T5."""
    return sd3(with_t5=False, qk_norm="rms_norm", dual_attention_layers=(0,))


def flux(*, guidance: bool) -> Any:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=12,
        num_attention_heads=2,
        joint_attention_dim=HIDDEN,
        pooled_projection_dim=HIDDEN,
        guidance_embeds=guidance,
        axes_dims_rope=(4, 4, 4),
    )
    return FluxPipeline(
        scheduler=flow(shift=3.0, use_dynamic_shifting=guidance),
        vae=vae(scaling_factor=0.36, shift_factor=0.12),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(),
        tokenizer_2=t5_tokenizer(),
        transformer=shaken(transformer),
    )


def sd2() -> Any:
    """As Stable Diffusion 2.x: linear projections, heads of one width, a velocity for prediction."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    heads = {"attention_head_dim": (2, 4), "use_linear_projection": True, "cross_attention_dim": HIDDEN}
    return StableDiffusionPipeline(
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=shaken(UNet2DConditionModel(**(UNET | heads))),
        vae=vae(),
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, prediction_type="v_prediction"
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def inpaint() -> Any:
    """A U-Net of nine channels: latents, a mask, and the latents of what is not masked."""
    from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(**UNET, in_channels=9, out_channels=4, cross_attention_dim=HIDDEN)
    return StableDiffusionInpaintPipeline(
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=shaken(unet),
        vae=vae(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def controlnet() -> Any:
    """A U-Net with a network that looks at a picture."""
    from diffusers import (
        ControlNetModel,
        DDIMScheduler,
        StableDiffusionControlNetPipeline,
        UNet2DConditionModel,
    )

    unet = shaken(UNet2DConditionModel(**UNET, cross_attention_dim=HIDDEN))
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8))
    return StableDiffusionControlNetPipeline(
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet,
        controlnet=shaken(network),
        vae=vae(),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sana() -> Any:
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    encoder = Gemma2Model(
        Gemma2Config(
            vocab_size=len(gemma_tokenizer()),
            hidden_size=HIDDEN,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        )
    )
    transformer = SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=8,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=HIDDEN,
        sample_size=16,
    )
    autoencoder = AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.41,
    )
    return SanaPipeline(
        tokenizer=gemma_tokenizer(),
        text_encoder=shaken(encoder),
        vae=autoencoder,
        transformer=shaken(transformer),
        scheduler=DPMSolverMultistepScheduler(
            flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True
        ),
    )


TEXT_MAKERS: dict[str, Callable[[], Any]] = {
    "sd2": sd2,
    "sdxl": sdxl,
    "sdxl-refiner": sdxl_refiner,
    "lcm": lcm,
    "pixart-alpha": pixart_alpha,
    "pixart-sized": pixart_sized,
    "pixart-sigma": pixart_sigma,
    "sd3": sd3,
    "sd35": sd35,
    "inpaint": inpaint,
    "controlnet": controlnet,
    "sana": sana,
    "flux-dev": lambda: flux(guidance=True),
    "flux-schnell": lambda: flux(guidance=False),
}
PROMPTS = ("rocket", "pizza")
UNBINNED = {"use_resolution_binning": False}
# What diffusers' own call needs besides prompts, so that it draws at the model's size.
CALLS: dict[str, dict[str, Any]] = {
    "controlnet": {"image": torch.zeros(2, 3, 16, 16)},
    "pixart-alpha": UNBINNED,
    "pixart-sized": UNBINNED,
    "pixart-sigma": UNBINNED,
    "inpaint": {
        "image": torch.zeros(2, 3, 16, 16),
        "mask_image": torch.ones(2, 1, 16, 16),
        "masked_image_latents": torch.zeros(2, 4, 8, 8),
    },
    "sana": {**UNBINNED, "height": 32, "width": 32},
    "flux-dev": {"height": 16, "width": 16},
    "flux-schnell": {"height": 16, "width": 16},
}


def save_text_model(kind: str, path: Path) -> Path:
    """Write the model of that kind to `path`."""
    torch.manual_seed(0)
    TEXT_MAKERS[kind]().save_pretrained(path)
    if kind.startswith("flux"):
        # FLUX has no field for the size that it draws.
        config = path / "transformer" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 8}))
    return path

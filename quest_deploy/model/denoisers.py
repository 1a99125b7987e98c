"""What every class of denoiser takes and gives, and the latents that it works on, read from its configuration alone."""

from __future__ import annotations

from fractions import Fraction

from quest_deploy.errors import ModelLoadError
from quest_deploy.model.defaults import class_read_by
from quest_deploy.model.families import Classes, Family
from quest_deploy.model.tensors import (
    TIMESTEP,
    ComponentSpec,
    Config,
    TensorSpec,
    float_tensor,
    integer_tensor,
    scaled_symbol,
)

SIZE = ("height", "width")
SIZE_IDS, AESTHETIC_IDS = 6, 5
# Latents along one side of a packed token, and along one side of an image.
SIDE, PACKED_SIZE = 2, 128
# The size of latents whose PixArt models are told size and aspect ratio.
PIXART_SIZED = 128
CONTROL = "controlnet_cond"
DOWN_RESIDUAL, MID_RESIDUAL = "down_block_additional_residuals.", "mid_block_additional_residual"


def latent_size(config: Config, default: int | None = None) -> tuple[int, int]:
    """Height and width of the latents that a denoiser of this configuration was trained for.

    Args:
        config: The denoiser's.
        default: For one that does not say.

    Raises:
        ModelLoadError: it does not say, and there is no default.
    """
    # FLUX has no field for it; this is its pipeline's default.
    size = config.get("sample_size", PACKED_SIZE if is_packed(config) else None)
    size = default if size is None else size
    if size is None:
        raise ModelLoadError(
            "the denoiser's config.json has no sample_size, the height and width of the latents that it was trained "
            "for (64 for 512 pixels where a latent is 8); write it there, or, to draw, give --height and --width"
        )
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def latent_channels(config: Config) -> int:
    """Channels of the latents that are denoised."""
    if is_packed(config):
        return int(config["in_channels"]) // SIDE**2
    return int(config["out_channels"] if inpaints(config) else config["in_channels"])


def inpaints(config: Config) -> bool:
    """Whether the denoiser is given a mask and the latents of what is not drawn beside the latents."""
    return bool(config["in_channels"] == 2 * (config.get("out_channels") or 0) + 1)


def is_packed(config: Config) -> bool:
    """Whether the denoiser takes latents as tokens, and is told where each of them is: FLUX."""
    return "axes_dims_rope" in config


def latent_granularity(config: Config) -> int:
    """What the latents' height and width are multiples of: a patch, or one pixel of a U-Net's lowest level.

    For other sizes a U-Net of diffusers resizes by a size computed at run time, which is another graph.
    """
    if is_packed(config):
        return SIDE
    if "patch_size" in config:
        return int(config["patch_size"])
    return int(2 ** (len(config.get("block_out_channels", [0])) - 1))


def has_patches(config: Config) -> bool:
    """Whether the denoiser cuts latents into patches, or packs them into tokens, and leaves no remainder."""
    return is_packed(config) or "patch_size" in config


def is_resizable(denoiser: ComponentSpec) -> bool:
    """Whether a denoiser takes latents of any size."""
    return not all(isinstance(size, int) for size in denoiser.inputs[0].shape[1:])


def has_negative(family: Family, classes: Classes | None, denoiser: ComponentSpec) -> bool:
    """Whether a model knows the absence of a prompt, which guidance starts from.

    Where an input of the denoiser takes the guidance scale, the model was distilled to do without a second branch.
    """
    if not family.has_text:
        return classes is not None and classes.null is not None
    return family.guided and not takes_guidance(denoiser)


def takes_guidance(denoiser: ComponentSpec) -> bool:
    """Whether an input of the denoiser takes the guidance scale."""
    return any(tensor.name in ("timestep_cond", "guidance") for tensor in denoiser.inputs)


def _denoiser(
    name: str, sample: str, channels: tuple[int, int], size: tuple[int | str, ...], *conditioning: TensorSpec
) -> ComponentSpec:
    """A denoiser of `channels` in and out that calls its latents `sample`."""
    return ComponentSpec(
        name=name,
        inputs=(
            float_tensor(sample, "batch", channels[0], *size),
            float_tensor(TIMESTEP, "steps"),
            *conditioning,
        ),
        outputs=(float_tensor(f"out_{sample}", "batch", channels[1], *size),),
    )


def _channels(config: Config) -> tuple[int, int]:
    """In and out, of a transformer that need not say that both are the same."""
    return config["in_channels"], config.get("out_channels") or config["in_channels"]


CLASS_LABELS = integer_tensor("class_labels", "batch")


def _text_width(family: Family, config: Config) -> int:
    """Width of the embeddings that a U-Net is told."""
    kind, width = config.get("encoder_hid_dim_type"), config.get("encoder_hid_dim")
    if kind not in (None, "text_proj"):
        raise ModelLoadError(
            f"{family.denoiser}: encoder_hid_dim_type is {kind!r}, which is not supported; expected 'text_proj' or none"
        )
    if width is not None:
        return int(width)
    widths = config["cross_attention_dim"]
    if not isinstance(widths, int) and len(set(widths)) != 1:
        raise ModelLoadError(
            f"{family.denoiser}: cross_attention_dim is {widths!r}, and levels of different widths are not supported; "
            "expected one width"
        )
    return widths if isinstance(widths, int) else int(widths[0])


def _told_to_unet(family: Family, config: Config) -> list[TensorSpec]:
    told = [float_tensor("encoder_hidden_states", "batch", "sequence", _text_width(family, config))]
    added = config.get("addition_embed_type")
    if added == "text_time":
        ids = AESTHETIC_IDS if family.aesthetic else SIZE_IDS
        width = config["projection_class_embeddings_input_dim"] - ids * config["addition_time_embed_dim"]
        told += [float_tensor("text_embeds", "batch", width), float_tensor("time_ids", "batch", ids)]
    elif added is not None:
        raise ModelLoadError(
            f"{family.denoiser}: addition_embed_type is {added!r}, expected 'text_time' of Stable Diffusion XL, or none"
        )
    if config.get("time_cond_proj_dim") is not None:
        told.append(float_tensor("timestep_cond", "batch", config["time_cond_proj_dim"]))
    return told


def _conditional_unet(family: Family, config: Config) -> ComponentSpec:
    channels = (config["in_channels"], config["out_channels"])
    residuals = () if family.controlnet is None else _residuals(config, DOWN_RESIDUAL, MID_RESIDUAL)
    return _denoiser(family.denoiser, "sample", channels, SIZE, *_told_to_unet(family, config), *residuals)


def _residuals(config: Config, down: str, mid: str) -> tuple[TensorSpec, ...]:
    """What a ControlNet gives and a U-Net takes: one for every skip connection, and one for the middle."""
    channels, layers = config["block_out_channels"], config["layers_per_block"]
    counts = [layers] * len(channels) if isinstance(layers, int) else layers
    shapes = [(channels[0], 0)]
    for level, (width, count) in enumerate(zip(channels, counts, strict=True)):
        shapes += [(width, level)] * count
        if level + 1 < len(channels):
            shapes.append((width, level + 1))

    def residual(name: str, width: int, level: int) -> TensorSpec:
        sides = (scaled_symbol(side, Fraction(1, 2**level)) for side in SIZE)
        return float_tensor(name, "batch", width, *sides)

    return (
        *(residual(f"{down}{index}", *shape) for index, shape in enumerate(shapes)),
        residual(mid, channels[-1], len(channels) - 1),
    )


def controlnet_spec(family: Family, config: Config) -> ComponentSpec:
    """The specification of a ControlNet.

    Raises:
        KeyError: the configuration lacks a field.
        ModelLoadError: the network is of a kind that is not supported.
    """
    if config.get("global_pool_conditions"):
        raise ModelLoadError(
            f"{family.controlnet}: global_pool_conditions is true (as in ControlNets of shuffled pictures), which is "
            "not supported; take a ControlNet whose residuals are pictures"
        )
    scale = Fraction(2 ** (len(config["conditioning_embedding_out_channels"]) - 1))
    picture = (scaled_symbol(side, scale) for side in SIZE)
    return ComponentSpec(
        name=str(family.controlnet),
        inputs=(
            float_tensor("sample", "batch", config["in_channels"], *SIZE),
            float_tensor(TIMESTEP, "steps"),
            *_told_to_unet(family, config),
            float_tensor(CONTROL, "batch", config["conditioning_channels"], *picture),
        ),
        outputs=_residuals(config, "down_block_res_samples.", "mid_block_res_sample"),
    )


def _unet(family: Family, config: Config) -> ComponentSpec:
    name = family.denoiser
    labels = () if config.get("num_class_embeds") is None else (CLASS_LABELS,)
    if config.get("class_embed_type") is not None:
        raise ModelLoadError(
            f"{name}: class_embed_type is {config['class_embed_type']!r}, expected num_class_embeds or no classes"
        )
    channels = (config["in_channels"], config["out_channels"])
    if channels[0] != channels[1]:
        raise ModelLoadError(
            f"{name}: gives {channels[1]} channels for {channels[0]}; a U-Net that learns its variance is not supported"
        )
    return _denoiser(name, "sample", channels, SIZE, *labels)


def _dit(family: Family, config: Config) -> ComponentSpec:
    if config.get("norm_type") != "ada_norm_zero":
        raise ModelLoadError(
            f"{family.denoiser}: norm_type is {config.get('norm_type')!r}, expected 'ada_norm_zero' of a DiT"
        )
    # diffusers takes the root of the number of patches for both sides.
    return _denoiser(family.denoiser, "hidden_states", _channels(config), latent_size(config), CLASS_LABELS)


def _pixart(family: Family, config: Config) -> ComponentSpec:
    width = config.get("caption_channels") or config["cross_attention_dim"]
    told = [
        float_tensor("encoder_hidden_states", "batch", "sequence", width),
        integer_tensor("encoder_attention_mask", "batch", "sequence"),
    ]
    sized = config.get("use_additional_conditions")
    if sized or (sized is None and config["sample_size"] == PIXART_SIZED):
        told += [float_tensor("resolution", "batch", 2), float_tensor("aspect_ratio", "batch", 1)]
    # Positions of another size are computed anew, outside of torch.
    return _denoiser(family.denoiser, "hidden_states", _channels(config), latent_size(config), *told)


def _sd3(family: Family, config: Config) -> ComponentSpec:
    return _denoiser(
        family.denoiser,
        "hidden_states",
        _channels(config),
        SIZE,
        float_tensor("encoder_hidden_states", "batch", "sequence", config["joint_attention_dim"]),
        float_tensor("pooled_projections", "batch", config["pooled_projection_dim"]),
    )


def _sana(family: Family, config: Config) -> ComponentSpec:
    if config.get("guidance_embeds") or config.get("timestep_scale", 1.0) != 1.0:
        raise ModelLoadError(
            f"{family.denoiser}: is a Sana-Sprint (guidance_embeds, timestep_scale), which is not supported; "
            "expected a Sana"
        )
    # Sine positions of another size are computed anew, outside of torch.
    size = SIZE if config.get("interpolation_scale") is None else latent_size(config)
    return _denoiser(
        family.denoiser,
        "hidden_states",
        _channels(config),
        size,
        float_tensor("encoder_hidden_states", "batch", "sequence", config["caption_channels"]),
        integer_tensor("encoder_attention_mask", "batch", "sequence"),
    )


def _flux(family: Family, config: Config) -> ComponentSpec:
    width = config["in_channels"]
    tokens = ("batch", "image_tokens")
    guidance = [float_tensor("guidance", "batch")] if config.get("guidance_embeds") else []
    return ComponentSpec(
        name=family.denoiser,
        inputs=(
            float_tensor("hidden_states", *tokens, width),
            float_tensor(TIMESTEP, "steps"),
            float_tensor("encoder_hidden_states", "batch", "sequence", config["joint_attention_dim"]),
            float_tensor("pooled_projections", "batch", config["pooled_projection_dim"]),
            *guidance,
            float_tensor("txt_ids", "sequence", 3),
            float_tensor("img_ids", "image_tokens", 3),
        ),
        outputs=(float_tensor("out_hidden_states", *tokens, config.get("out_channels") or width),),
    )


DENOISERS = {
    "UNet2DConditionModel": _conditional_unet,
    "UNet2DModel": _unet,
    "DiTTransformer2DModel": _dit,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _sd3,
    "SanaTransformer2DModel": _sana,
    "FluxTransformer2DModel": _flux,
}


def denoiser_spec(family: Family, config: Config) -> ComponentSpec:
    """The specification of a family's denoiser.

    Raises:
        KeyError: the configuration lacks a field.
        ModelLoadError: the denoiser is of a kind that is not supported.
    """
    kind = class_read_by(config.get("_class_name", family.denoiser_class), config)
    if kind not in DENOISERS:
        raise ModelLoadError(f"{family.denoiser}: got a {kind}, expected one of {', '.join(DENOISERS)}")
    return DENOISERS[kind](family, config)

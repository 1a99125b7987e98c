"""What each component of a pipeline takes and gives, read from its configuration files alone.

Exporter, engine builder and runtimes never import each other: they agree through these specifications.
Neither torch nor onnx is imported here.

Symbols in shapes: ``batch`` (guidance doubles it for the denoiser), ``height`` and ``width`` (of the latents),
``sequence`` (text tokens), ``steps`` (1 or batch), ``image_height`` and ``image_width`` (pixels).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quest_deploy.errors import ArtifactError, ModelLoadError
from quest_deploy.model.families import (
    FAMILIES,
    TEXT_ENCODER,
    VAE_DECODER,
    Classes,
    Family,
    read_classes,
)

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


def read_config(path: Path) -> dict[str, Any]:
    """Read one JSON configuration file.

    Raises:
        ArtifactError: the file is missing or is not a JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be read ({error.strerror}); is this a diffusers model directory?"
        ) from error
    except ValueError as error:
        raise ArtifactError(
            f"{path}: is not valid JSON ({error}); restore the file from its source"
        ) from error
    if not isinstance(config, dict):
        raise ArtifactError(f"{path}: got a JSON {type(config).__name__}, expected an object")
    return config


def family_of(model_dir: Path) -> Family:
    """The kind of pipeline that lies in a model, checkpoint, ONNX or engine directory.

    Raises:
        ArtifactError: ``model_index.json`` is missing or corrupt.
        ModelLoadError: the pipeline is of a kind that is not supported.
    """
    kind = read_config(model_dir / "model_index.json").get("_class_name")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ModelLoadError(
            f"{model_dir}: got a {kind}, expected one of {known}; other families are not supported yet"
        )
    return FAMILIES[kind]


def classes_of(model_dir: Path) -> Classes | None:
    """The classes of a class-conditional model, checkpoint, ONNX or engine directory, else None."""
    index = read_config(model_dir / "model_index.json")
    return read_classes(index, read_config(model_dir / family_of(model_dir).denoiser / "config.json"))


def config_paths(model_dir: Path) -> dict[str, Path]:
    """The configuration file of every component, by component name.

    The decoder's lies in ``vae/`` (or ``vqvae/``) in models and checkpoints, in ``vae_decoder/`` once exported.
    """
    family = family_of(model_dir)
    names = [TEXT_ENCODER] if family.has_text else []
    paths = {name: model_dir / name / "config.json" for name in (*names, family.denoiser)}
    if family.autoencoder is not None:
        exported = model_dir / VAE_DECODER / "config.json"
        paths[VAE_DECODER] = exported if exported.exists() else model_dir / family.autoencoder / "config.json"
    return paths


def component_configs(model_dir: Path) -> dict[str, dict[str, Any]]:
    """The configuration of every component, by component name.

    Raises:
        ArtifactError: a file is missing or corrupt.
    """
    return {name: read_config(path) for name, path in config_paths(model_dir).items()}


def vae_scale_factor(vae_config: Config | None) -> int:
    """Pixels per latent along one axis; 1 without an autoencoder."""
    return 1 if vae_config is None else int(2 ** (len(vae_config["block_out_channels"]) - 1))


def latent_size(config: Config) -> tuple[int, int]:
    """Height and width of the latents that a denoiser of this configuration was trained for."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def latent_granularity(config: Config) -> int:
    """What the latents' height and width are multiples of: a patch, or one pixel of a U-Net's lowest level.

    For other sizes a U-Net of diffusers resizes by a size computed at run time, which is another graph.
    """
    if "patch_size" in config:
        return int(config["patch_size"])
    return int(2 ** (len(config.get("block_out_channels", [0])) - 1))


def _text_encoder(config: Config) -> ComponentSpec:
    tokens, hidden = config["max_position_embeddings"], config["hidden_size"]
    return ComponentSpec(
        name=TEXT_ENCODER,
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", tokens)),),
        outputs=(
            TensorSpec(name="last_hidden_state", dtype="float32", shape=("batch", tokens, hidden)),
            TensorSpec(name="pooler_output", dtype="float32", shape=("batch", hidden)),
        ),
    )


def _denoiser(
    name: str, sample: str, channels: tuple[int, int], size: tuple[int | str, ...], *conditioning: TensorSpec
) -> ComponentSpec:
    """A denoiser of `channels` in and out that calls its latents `sample`."""
    return ComponentSpec(
        name=name,
        inputs=(
            TensorSpec(name=sample, dtype="float32", shape=("batch", channels[0], *size)),
            TensorSpec(name=TIMESTEP, dtype="float32", shape=("steps",)),
            *conditioning,
        ),
        outputs=(TensorSpec(name=f"out_{sample}", dtype="float32", shape=("batch", channels[1], *size)),),
    )


CLASS_LABELS = TensorSpec(name="class_labels", dtype="int64", shape=("batch",))


def _conditional_unet(name: str, config: Config) -> ComponentSpec:
    text = TensorSpec(
        name="encoder_hidden_states",
        dtype="float32",
        shape=("batch", "sequence", config["cross_attention_dim"]),
    )
    channels = (config["in_channels"], config["out_channels"])
    return _denoiser(name, "sample", channels, ("height", "width"), text)


def _unet(name: str, config: Config) -> ComponentSpec:
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
    return _denoiser(name, "sample", channels, ("height", "width"), *labels)


def _dit(name: str, config: Config) -> ComponentSpec:
    if config.get("norm_type") != "ada_norm_zero":
        raise ModelLoadError(
            f"{name}: norm_type is {config.get('norm_type')!r}, expected 'ada_norm_zero' of a DiT"
        )
    channels = (config["in_channels"], config.get("out_channels") or config["in_channels"])
    # diffusers takes the root of the number of patches for both sides.
    return _denoiser(name, "hidden_states", channels, latent_size(config), CLASS_LABELS)


DENOISERS = {
    "UNet2DConditionModel": _conditional_unet,
    "UNet2DModel": _unet,
    "DiTTransformer2DModel": _dit,
    # What a DiT was called at first; models on the hub still are.
    "Transformer2DModel": _dit,
}


def _vae_decoder(config: Config) -> ComponentSpec:
    channels = config.get("vq_embed_dim") or config["latent_channels"]
    return ComponentSpec(
        name=VAE_DECODER,
        inputs=(
            TensorSpec(name="latent_sample", dtype="float32", shape=("batch", channels, "height", "width")),
        ),
        outputs=(
            TensorSpec(
                name="sample",
                dtype="float32",
                shape=("batch", config["out_channels"], "image_height", "image_width"),
            ),
        ),
    )


def make_spec(family: Family, name: str, config: Config) -> ComponentSpec:
    """The specification of one component.

    Raises:
        KeyError: the configuration lacks a field.
        ModelLoadError: the component is of a kind that is not supported.
    """
    if name == TEXT_ENCODER:
        return _text_encoder(config)
    if name == VAE_DECODER:
        return _vae_decoder(config)
    kind = config.get("_class_name", family.denoiser_class)
    if kind not in DENOISERS:
        raise ModelLoadError(f"{name}: got a {kind}, expected one of {', '.join(DENOISERS)}")
    return DENOISERS[kind](name, config)


def component_specs(model_dir: Path) -> dict[str, ComponentSpec]:
    """The components of a model, checkpoint, ONNX or engine directory, by name.

    Raises:
        ArtifactError: a configuration file is missing or corrupt.
        ModelLoadError: the pipeline is of a kind that is not supported.
    """
    family = family_of(model_dir)
    specs = {}
    for name, path in config_paths(model_dir).items():
        try:
            specs[name] = make_spec(family, name, read_config(path))
        except KeyError as error:
            raise ArtifactError(
                f"{path}: has no {error}; is it a {name} configuration of diffusers?"
            ) from error
    return specs

"""What each component of a text-to-image pipeline takes and gives, read from its configuration files alone.

Exporter, engine builder and runtimes never import each other: they agree through these specifications.
Neither torch nor onnx is imported here.

Symbols in shapes: ``batch`` (guidance doubles it for the denoiser), ``height`` and ``width`` (of the latents),
``sequence`` (text tokens), ``steps`` (1 or batch), ``image_height`` and ``image_width`` (pixels).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quest_deploy.errors import ArtifactError, ModelLoadError

TEXT_ENCODER = "text_encoder"
DENOISER = "unet"
VAE_DECODER = "vae_decoder"


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


def vae_config_path(model_dir: Path) -> Path:
    """The decoder's configuration: ``vae/`` in models and checkpoints, ``vae_decoder/`` once exported."""
    exported = model_dir / VAE_DECODER / "config.json"
    return exported if exported.exists() else model_dir / "vae" / "config.json"


def vae_scale_factor(vae_config: dict[str, Any]) -> int:
    """Pixels per latent along one axis."""
    return int(2 ** (len(vae_config["block_out_channels"]) - 1))


def default_image_size(model_dir: Path) -> int:
    """The side in pixels that the model was trained for."""
    sample_size = read_config(model_dir / DENOISER / "config.json")["sample_size"]
    return int(sample_size) * vae_scale_factor(read_config(vae_config_path(model_dir)))


def _text_encoder(config: dict[str, Any]) -> ComponentSpec:
    tokens, hidden = config["max_position_embeddings"], config["hidden_size"]
    return ComponentSpec(
        name=TEXT_ENCODER,
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", tokens)),),
        outputs=(
            TensorSpec(name="last_hidden_state", dtype="float32", shape=("batch", tokens, hidden)),
            TensorSpec(name="pooler_output", dtype="float32", shape=("batch", hidden)),
        ),
    )


def _denoiser(config: dict[str, Any]) -> ComponentSpec:
    latents = ("height", "width")
    return ComponentSpec(
        name=DENOISER,
        inputs=(
            TensorSpec(name="sample", dtype="float32", shape=("batch", config["in_channels"], *latents)),
            TensorSpec(name="timestep", dtype="float32", shape=("steps",)),
            TensorSpec(
                name="encoder_hidden_states",
                dtype="float32",
                shape=("batch", "sequence", config["cross_attention_dim"]),
            ),
        ),
        outputs=(
            TensorSpec(name="out_sample", dtype="float32", shape=("batch", config["out_channels"], *latents)),
        ),
    )


def _vae_decoder(config: dict[str, Any]) -> ComponentSpec:
    return ComponentSpec(
        name=VAE_DECODER,
        inputs=(
            TensorSpec(
                name="latent_sample",
                dtype="float32",
                shape=("batch", config["latent_channels"], "height", "width"),
            ),
        ),
        outputs=(
            TensorSpec(
                name="sample",
                dtype="float32",
                shape=("batch", config["out_channels"], "image_height", "image_width"),
            ),
        ),
    )


def component_specs(model_dir: Path) -> dict[str, ComponentSpec]:
    """The components of a model, checkpoint, ONNX or engine directory, by name.

    Raises:
        ArtifactError: a configuration file is missing or corrupt.
        ModelLoadError: the pipeline is of a kind that is not supported.
    """
    index = read_config(model_dir / "model_index.json")
    kind = index.get("_class_name")
    if kind != "StableDiffusionPipeline":
        raise ModelLoadError(
            f"{model_dir}: got a {kind}, expected a StableDiffusionPipeline (Stable Diffusion 1.x or 2.x); "
            "other families are not supported yet"
        )
    builders = (
        (TEXT_ENCODER, _text_encoder, model_dir / TEXT_ENCODER / "config.json"),
        (DENOISER, _denoiser, model_dir / DENOISER / "config.json"),
        (VAE_DECODER, _vae_decoder, vae_config_path(model_dir)),
    )
    specs = {}
    for name, build, path in builders:
        try:
            specs[name] = build(read_config(path))
        except KeyError as error:
            raise ArtifactError(
                f"{path}: has no {error}; is it a {name} configuration of diffusers?"
            ) from error
    return specs

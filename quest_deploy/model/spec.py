"""What each component of a pipeline takes and gives, read from its configuration files alone.

Exporter, engine builder and runtimes never import each other: they agree through these specifications.
Neither torch nor onnx is imported here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from quest_deploy.errors import ArtifactError, ConfigError, ModelLoadError
from quest_deploy.model.corrections import corrected_denoiser
from quest_deploy.model.defaults import DIFFUSERS_DEFAULTS, TRANSFORMERS_DEFAULTS, class_read_by
from quest_deploy.model.denoisers import (
    controlnet_spec,
    denoiser_spec,
    has_negative,
    has_patches,
    is_resizable,
    latent_channels,
    latent_granularity,
    latent_size,
)
from quest_deploy.model.families import (
    FAMILIES,
    VAE_DECODER,
    VAE_ENCODER,
    Classes,
    Family,
    TextPart,
    read_classes,
)
from quest_deploy.model.tensors import (
    TIMESTEP,
    ComponentSpec,
    Config,
    TensorSpec,
    float_tensor,
    integer_tensor,
    scaled_symbol,
)

__all__ = [
    "TIMESTEP",
    "ComponentSpec",
    "TensorSpec",
    "check_multiple",
    "classes_of",
    "component_configs",
    "component_specs",
    "config_paths",
    "decoder_granularity",
    "family_of",
    "has_negative",
    "has_patches",
    "is_resizable",
    "latent_channels",
    "latent_granularity",
    "latent_size",
    "make_spec",
    "read_config",
    "scheduler_config",
    "token_count",
    "vae_scale_factor",
]

# What the schedulers of diffusers know, some of them under another name.
PREDICTIONS = ("epsilon", "sample", "original_sample", "v_prediction", "flow_prediction")


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
    index = read_config(model_dir / "model_index.json")
    # optimum-onnx calls what it saved ORTStableDiffusionPipeline.
    kind = str(index.get("_class_name")).removeprefix("ORT")
    if kind not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise ModelLoadError(
            f"{model_dir}: got a {kind}, expected one of {known}; other families are not supported yet"
        )
    if "MultiControlNetModel" in (index.get("controlnet") or ()):
        raise ModelLoadError(
            f"{model_dir}: has several ControlNets (MultiControlNetModel), which is not supported; save it with one"
        )
    return FAMILIES[kind].of_index(index)


def classes_of(model_dir: Path) -> Classes | None:
    """The classes of a class-conditional model, checkpoint, ONNX or engine directory, else None."""
    family, index = family_of(model_dir), read_config(model_dir / "model_index.json")
    path = config_paths(model_dir)[family.denoiser]
    return read_classes(index, _read_component(family, family.denoiser, path, index))


def config_paths(model_dir: Path) -> dict[str, Path]:
    """The configuration file of every component, by component name.

    The decoder's lies in ``vae/`` (or ``vqvae/``) in models and checkpoints, in ``vae_decoder/`` once exported.
    """
    family = family_of(model_dir)
    names = [*family.text_encoders, family.denoiser, *([family.controlnet] if family.controlnet else [])]
    paths = {name: model_dir / name / "config.json" for name in names}
    if family.autoencoder is not None:
        own, exported = (model_dir / name / "config.json" for name in (family.autoencoder, VAE_DECODER))
        # A model may have another tool's export beside its weights.
        paths[VAE_DECODER] = exported if exported.exists() and not own.exists() else own
        if family.reads_images:
            paths[VAE_ENCODER] = paths[VAE_DECODER]
    return paths


def vae_scale_factor(vae_config: Config | None) -> int:
    """Pixels per latent along one axis; 1 without an autoencoder."""
    if vae_config is None:
        return 1
    # AutoencoderDC names its encoder's.
    levels = vae_config.get("encoder_block_out_channels") or vae_config["block_out_channels"]
    return int(2 ** (len(levels) - 1))


def check_multiple(axis: str, sizes: Iterable[int], step: int) -> None:
    """Check that sizes in pixels are multiples of `step`.

    An exported U-Net doubles what it halved: latents that leave a remainder no longer fit their skip connections.

    Raises:
        ConfigError: one is not.
    """
    bad = sorted({size for size in sizes if size % step})
    if bad:
        below = bad[0] // step * step
        near = f"{below} or {below + step}" if below else f"{step}"
        raise ConfigError(
            f"{axis}: got {', '.join(map(str, bad))} pixels, expected multiples of {step} (the VAE and the "
            f"denoiser halve the image {int(math.log2(step))} times); choose {near}"
        )


def decoder_granularity(vae_config: Config) -> int:
    """What the latents' sides are multiples of while a decoder is traced.

    The attention of an AutoencoderDC is another graph for fewer latents than a head has channels.
    """
    side = 1
    while side**2 <= vae_config.get("attention_head_dim", 0):
        side *= 2
    return side


def component_configs(model_dir: Path) -> dict[str, dict[str, Any]]:
    """The configuration of every component, by component name, as its class would read the file.

    Raises:
        ArtifactError: a file is missing or corrupt.
    """
    family, index = family_of(model_dir), read_config(model_dir / "model_index.json")
    paths = config_paths(model_dir)
    configs = {name: _read_component(family, name, path, index) for name, path in paths.items()}
    return {**configs, family.denoiser: dict(corrected_denoiser(configs[family.denoiser], family))}


def _read_component(family: Family, name: str, path: Path, index: Mapping[str, Any]) -> dict[str, Any]:
    config = read_config(path)
    defaults = _defaults(family, name, config, index)
    for field, default in {"sample_size": 0, **defaults}.items():
        value = config.get(field)
        if value is not None and not _is_like(value, default):
            expected = "names" if isinstance(default, str) else "numbers"
            raise ArtifactError(
                f"{path}: {field} is {value!r}, expected {expected} like {default!r}; restore the file from its source"
            )
    return {**defaults, **config}


def _is_like(value: object, default: object) -> bool:
    """Whether a field's value is of its default's kind; a list may stand for one number that holds for all levels."""
    if isinstance(default, str):
        return isinstance(value, str)
    if isinstance(value, list):
        return all(isinstance(number, int | float) for number in value)
    return isinstance(value, int | float) and not isinstance(default, tuple)


def scheduler_config(folder: Path) -> dict[str, Any]:
    """Read the configuration of a scheduler.

    Args:
        folder: Where ``scheduler_config.json`` lies.

    Raises:
        ArtifactError: the file is missing or corrupt, or names a kind of prediction that there is not.
    """
    file = folder / "scheduler_config.json"
    config = read_config(file)
    prediction = config.get("prediction_type", PREDICTIONS[0])
    if prediction not in PREDICTIONS:
        raise ArtifactError(
            f"{file}: prediction_type is {prediction!r}, expected one of {', '.join(PREDICTIONS)}; correct it"
        )
    return config


def _defaults(family: Family, name: str, config: Config, index: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the fields are that a configuration of the component `name` leaves out."""
    for part in family.text:
        if name == part.name:
            return TRANSFORMERS_DEFAULTS[part.kind.removesuffix("-projection")]
    folder = str(family.autoencoder) if name in (VAE_DECODER, VAE_ENCODER) else name
    entry = index.get(folder)
    named = entry[-1] if isinstance(entry, list) and entry else None
    usual = family.denoiser_class if name == family.denoiser else None
    kinds = [class_read_by(kind, config) for kind in (config.get("_class_name"), named, usual)]
    return next((DIFFUSERS_DEFAULTS[kind] for kind in kinds if kind in DIFFUSERS_DEFAULTS), {})


def _text_encoder(part: TextPart, config: Config) -> ComponentSpec:
    tokens: int | str
    if part.kind == "t5":
        tokens, hidden = part.max_tokens or "sequence", config["d_model"]
    elif part.kind == "gemma":
        tokens, hidden = "sequence", config["hidden_size"]
    else:
        tokens, hidden = config["max_position_embeddings"], config["hidden_size"]
    inputs = [integer_tensor("input_ids", "batch", tokens)]
    if part.masked:
        inputs.append(integer_tensor("attention_mask", "batch", tokens))
    last = float_tensor("last_hidden_state", "batch", tokens, hidden)
    outputs = {
        "clip": lambda: [last, float_tensor("pooler_output", "batch", hidden)],
        "clip-projection": lambda: [float_tensor("text_embeds", "batch", config["projection_dim"]), last],
        "t5": lambda: [last],
        "gemma": lambda: [last],
    }[part.kind]()
    if part.hidden_states:
        layers = range(config["num_hidden_layers"] + 1)
        outputs += [float_tensor(f"hidden_states.{layer}", "batch", tokens, hidden) for layer in layers]
    return ComponentSpec(name=part.name, inputs=tuple(inputs), outputs=tuple(outputs))


def _vae_decoder(config: Config) -> ComponentSpec:
    channels = config.get("vq_embed_dim") or config["latent_channels"]
    # AutoencoderDC gives what it takes.
    pixels = config["out_channels"] if "out_channels" in config else config["in_channels"]
    return ComponentSpec(
        name=VAE_DECODER,
        inputs=(float_tensor("latent_sample", "batch", channels, "height", "width"),),
        outputs=(float_tensor("sample", "batch", pixels, "image_height", "image_width"),),
    )


def _vae_encoder(config: Config) -> ComponentSpec:
    scale = Fraction(vae_scale_factor(config))
    picture = (scaled_symbol(side, scale) for side in ("height", "width"))
    return ComponentSpec(
        name=VAE_ENCODER,
        inputs=(float_tensor("sample", "batch", config["in_channels"], *picture),),
        # Mean and logarithm of the variance.
        outputs=(
            float_tensor("latent_parameters", "batch", 2 * config["latent_channels"], "height", "width"),
        ),
    )


def make_spec(family: Family, name: str, config: Config) -> ComponentSpec:
    """The specification of one component.

    Raises:
        KeyError: the configuration lacks a field.
        ModelLoadError: the component is of a kind that is not supported.
    """
    for part in family.text:
        if name == part.name:
            # Other pipelines of diffusers pay no attention to it.
            if config.get("use_attention_mask") and family.prompting == "last":
                raise ModelLoadError(
                    f"{name}: use_attention_mask is true, which is not supported, since it is run without a mask; "
                    "take a model whose text_encoder/config.json does not ask for one"
                )
            return _text_encoder(part, config)
    if name == VAE_ENCODER:
        return _vae_encoder(config)
    if name == family.controlnet:
        return controlnet_spec(family, config)
    return _vae_decoder(config) if name == VAE_DECODER else denoiser_spec(family, config)


def component_specs(model_dir: Path) -> dict[str, ComponentSpec]:
    """The components of a model, checkpoint, ONNX or engine directory, by name.

    Raises:
        ArtifactError: a configuration file is missing or corrupt.
        ModelLoadError: the pipeline is of a kind that is not supported.
    """
    family = family_of(model_dir)
    specs, configs = {}, component_configs(model_dir)
    for name, path in config_paths(model_dir).items():
        try:
            specs[name] = make_spec(family, name, configs[name])
        except KeyError as error:
            raise ArtifactError(
                f"{path}: has no {error}; is it a {name} configuration of diffusers?"
            ) from error
    return specs


def token_count(family: Family, specs: Mapping[str, ComponentSpec]) -> int:
    """How many text tokens the denoiser of a family that reads text is told of.

    Raises:
        TypeError: a text encoder takes any number of tokens.
    """
    count = 0
    for source in family.sequence or (family.text_encoders[-1],):
        tokens = source if isinstance(source, int) else specs[source].inputs[0].shape[1]
        if not isinstance(tokens, int):
            raise TypeError(f"{source} takes a dynamic number of tokens ({tokens}), expected a fixed one")
        count += tokens
    return count

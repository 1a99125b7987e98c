"""A diffusers model on disk (or on the hub) -> its components in memory, float32, in evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.artifacts import refuse_pickle
from quest_deploy.errors import ModelLoadError
from quest_deploy.model.components import (
    ControlNet,
    Denoiser,
    TextEncoder,
    VaeDecoder,
    VaeEncoder,
    first_device,
    parameters_frozen,
)
from quest_deploy.model.conditioning import Conditioner, Outputs, TextEncoders, load_tokenizer
from quest_deploy.model.corrections import corrected_denoiser, corrected_scheduler
from quest_deploy.model.deferred import fill, matching, stored_tensors
from quest_deploy.model.families import (
    FAMILIES,
    TRANSFORMERS,
    VAE_DECODER,
    VAE_ENCODER,
    Classes,
    Family,
    read_classes,
)
from quest_deploy.model.libraries import class_of
from quest_deploy.model.spec import (
    ComponentSpec,
    component_specs,
    family_of,
    latent_channels,
    latent_granularity,
    latent_size,
    make_spec,
    read_config,
    scheduler_config,
    vae_scale_factor,
)
from quest_deploy.model.weights import check_weights

SINGLE_FILE_SUFFIX = ".safetensors"
SINGLE_FILE_FAMILY = FAMILIES["StableDiffusionPipeline"]


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """The parts of a pipeline, as diffusers and transformers define them.

    Attributes:
        path: Where the model lies (for a hub id, the local snapshot).
        family: What kind of pipeline it is.
        specs: Inputs and outputs of its components, by component name.
        denoiser: U-Net or transformer; in a quantized checkpoint its layers are quantized ones.
        scheduler: The model's own scheduler.
        text_encoders: Models of transformers, by component name; none for a model that reads no text.
        tokenizers: What goes with each, by the same names.
        controlnet: `ControlNetModel`; None where no picture is looked at.
        vae: `AutoencoderKL` or `VQModel`; None where the denoiser draws pixels.
        classes: What a class-conditional model draws, else None.
        index: Content of ``model_index.json``; empty for a single file.
        changed: Names of the parts that have other weights than their files: LoRAs were merged into them.
    """

    path: Path
    family: Family
    specs: dict[str, ComponentSpec]
    denoiser: nn.Module
    scheduler: Any
    text_encoders: Mapping[str, nn.Module] = field(default_factory=dict)
    tokenizers: Mapping[str, Any] = field(default_factory=dict)
    controlnet: nn.Module | None = None
    vae: nn.Module | None = None
    classes: Classes | None = None
    index: Mapping[str, Any] = field(default_factory=dict)
    changed: frozenset[str] = frozenset()

    @property
    def denoiser_spec(self) -> ComponentSpec:
        """The denoiser's inputs and outputs."""
        return self.specs[self.family.denoiser]

    @property
    def text_encoder(self) -> nn.Module | None:
        """The first text encoder; None for a model that reads no text."""
        return next(iter(self.text_encoders.values()), None)

    @property
    def tokenizer(self) -> Any:
        """The first text encoder's, or None."""
        return next(iter(self.tokenizers.values()), None)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the latents of an image of the model's own size."""
        config: Any = self.denoiser.config
        return (latent_channels(config), *latent_size(config))

    @property
    def patch(self) -> int:
        """Latents along one side of what the denoiser cuts them into."""
        config: Any = self.denoiser.config
        return latent_granularity(config)

    def denoiser_time(self, timestep: Tensor) -> Tensor:
        """The scheduler's timestep as the denoiser is told it, float32."""
        return timestep.to(torch.float32) / self.family.timestep_divisor

    @property
    def last_time(self) -> float:
        """The largest timestep of the noise schedule, as the denoiser is told it; a flow begins one further on."""
        last = torch.tensor(self.scheduler.config.num_train_timesteps - 1.0)
        # Some schedulers have none before they are told how many.
        if self.scheduler.timesteps is not None:
            last = torch.maximum(last, torch.as_tensor(self.scheduler.timesteps).max().float())
        return float(self.denoiser_time(last))

    @property
    def control(self) -> ControlNet | None:
        """The ControlNet with the inputs of its specification, or None."""
        if self.controlnet is None:
            return None
        return ControlNet(self.controlnet, self.specs[str(self.family.controlnet)])

    @property
    def conditioner(self) -> Conditioner:
        """What tells the denoiser what to draw; the text encoders run on the CPU or wherever they are."""
        vae: Any = self.vae
        return Conditioner(
            family=self.family,
            classes=self.classes,
            denoiser=self.denoiser_spec,
            encoders=TextEncoders(
                parts=self.family.text, tokenizers=self.tokenizers, run=self._run_text_encoder
            ),
            pixels_per_latent=vae_scale_factor(None if vae is None else vae.config),
        )

    @torch.no_grad()
    def _run_text_encoder(self, name: str, inputs: Mapping[str, Tensor]) -> Outputs:
        encoder = self.text_encoders[name]
        names = [tensor.name for tensor in self.specs[name].outputs]
        device = first_device(encoder)
        outputs = TextEncoder(encoder, names)(*(value.to(device) for value in inputs.values()))
        return dict(zip(names, outputs, strict=True))


def load_model(source: str | Path, *, deferred: bool = False) -> LoadedModel:
    """Load a diffusers directory, a single-file ``.safetensors`` checkpoint, or a hub id.

    Args:
        source: Which.
        deferred: Leave large weights in their files (:mod:`quest_deploy.model.deferred`), where the names in them are
            the model's own; those of single files are not.

    Raises:
        ModelLoadError: the source is missing, corrupt, pickled, or of an unsupported family.
    """
    path = Path(source)
    refuse_pickle(path)
    if path.is_file() and path.suffix == SINGLE_FILE_SUFFIX:
        with loading_errors(path):
            pipeline = _pipeline_class(SINGLE_FILE_FAMILY).from_single_file(str(path), **_options())
            return _loaded(path, SINGLE_FILE_FAMILY, {}, pipeline)
    directory = path if path.is_dir() else _snapshot(str(source))
    component_specs(directory)
    return load_directory(directory, deferred=deferred)


def load_directory(directory: Path, *, deferred: bool = False, **components: Any) -> LoadedModel:
    """Load a diffusers directory.

    Args:
        directory: Holds ``model_index.json``.
        deferred: As for :func:`load_model`.
        components: Parts that are there already, by name, and not looked for in the directory.

    Raises:
        ModelLoadError: a part is missing, incomplete, corrupt or pickled.
    """
    _hide_loading_bars()
    family = family_of(directory)
    needed = sorted(set(family.weights) - components.keys())
    for name in needed:
        check_weights(directory / name, family.library_of(name))
    index = read_config(directory / "model_index.json")
    with loading_errors(directory):
        components["scheduler"] = _load_scheduler(directory / "scheduler", index.get("scheduler"))
        for name in needed:
            folder = directory / name
            component_class = _component_class(folder, index.get(name))
            component = _load_deferred(folder, component_class) if deferred else None
            components[name] = load_component(folder, component_class) if component is None else component
        for part in family.text:
            folder = directory / part.tokenizer
            tokenizer_class = _component_class(folder, index.get(part.tokenizer))
            components[part.tokenizer] = load_tokenizer(folder, part, tokenizer_class)
        return _loaded(directory, family, index, SimpleNamespace(**components))


def _component_class(folder: Path, entry: object) -> Any:
    """The class that a line of ``model_index.json`` names."""
    if not (isinstance(entry, list) and len(entry) == 2 and entry[0] in ("diffusers", "transformers")):
        raise ModelLoadError(
            f"{folder.parent / 'model_index.json'}: {folder.name!r} is {entry!r}, "
            "expected a class of diffusers or transformers; restore the file from its source"
        )
    library, class_name = entry
    component_class = class_of(library, str(class_name))
    if component_class is None:
        raise ModelLoadError(
            f"{folder}: the installed {library} has no class {class_name!r}; upgrade {library}"
        )
    return component_class


def _load_scheduler(folder: Path, entry: object) -> Any:
    # Where the file is missing, diffusers would ask the hub for a model with the folder's name.
    scheduler_config(folder)
    with loading_errors(folder / "scheduler_config.json"):
        return _component_class(folder, entry).from_pretrained(folder, local_files_only=True)


def _load_deferred(folder: Path, component_class: Any) -> nn.Module | None:
    """One part with its large weights left in their files; None where that cannot be."""
    from accelerate import init_empty_weights

    library = component_class.__module__.partition(".")[0]
    with init_empty_weights(include_buffers=False):
        if library == TRANSFORMERS:
            component: nn.Module = component_class(
                component_class.config_class.from_pretrained(folder, local_files_only=True)
            )
        else:
            component = component_class.from_config(
                component_class.load_config(folder, local_files_only=True)
            )
    # A configuration may ask for the type that its weights are stored in.
    component.float()
    stored = matching(component, stored_tensors(folder, library))
    if stored is None:
        return None
    fill(component, stored)
    return component.eval()


def load_component(folder: Path, component_class: Any) -> nn.Module:
    """One part with all its weights, float32. Where a file lacks a tensor, both libraries make one up and only warn.

    Args:
        folder: Its configuration, and its weights as safetensors.
        component_class: A model class of diffusers or transformers.

    Raises:
        ModelLoadError: a tensor is missing or has another shape.
    """
    _hide_loading_bars()
    # diffusers refuses tensors of other shapes by itself and names them; transformers does not name them.
    options = {"torch_dtype": _dtype()}
    if any(base.__module__.startswith("transformers.") for base in component_class.__mro__):
        options = {"dtype": _dtype(), "ignore_mismatched_sizes": True}
    module, info = component_class.from_pretrained(
        folder, use_safetensors=True, output_loading_info=True, local_files_only=True, **options
    )
    mismatched = {key: (list(got), list(wanted)) for key, got, wanted in info["mismatched_keys"]}
    if mismatched:
        key = min(mismatched)
        got, wanted = mismatched[key]
        raise ModelLoadError(
            f"{folder}: tensor {key!r} has shape {got}, expected {wanted}; restore the model from its source"
        )
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelLoadError(
            f"{folder}: {len(missing)} tensors of the {component_class.__name__} are missing, the first is "
            f"{missing[0]!r}; restore the model from its source"
        )
    return module


def _dtype() -> Any:
    return torch.float32


def _pipeline_class(family: Family) -> Any:
    return class_of("diffusers", family.pipeline)


def _options() -> dict[str, Any]:
    return {"torch_dtype": _dtype(), "safety_checker": None, "requires_safety_checker": False}


@contextlib.contextmanager
def loading_errors(source: Path) -> Iterator[None]:
    """What goes wrong while weights are read, as a message that names `source`."""
    try:
        yield
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelLoadError(
            f"{source}: cannot be loaded ({_first_line(error)}); restore it from its source"
        ) from error
    except Exception as error:
        # safetensors' own error derives from Exception alone.
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelLoadError(
            f"{source}: a weight file is corrupt ({error}); restore it from its source"
        ) from error


def _loaded(path: Path, family: Family, index: Mapping[str, Any], pipeline: Any) -> LoadedModel:
    denoiser = getattr(pipeline, family.denoiser)
    vae = None if family.autoencoder is None else getattr(pipeline, family.autoencoder)
    text_encoders = {name: getattr(pipeline, name) for name in family.text_encoders}
    configs = {name: encoder.config.to_dict() for name, encoder in text_encoders.items()}
    corrected = corrected_denoiser(denoiser.config, family)
    if corrected is not denoiser.config:
        denoiser.register_to_config(sample_size=corrected["sample_size"])
    configs[family.denoiser] = denoiser.config
    controlnet = None if family.controlnet is None else getattr(pipeline, family.controlnet)
    if family.controlnet is not None and controlnet is not None:
        configs[family.controlnet] = controlnet.config
    if vae is not None:
        configs[VAE_DECODER] = vae.config
        if family.reads_images:
            configs[VAE_ENCODER] = vae.config
    return LoadedModel(
        path=path,
        family=family,
        specs={name: make_spec(family, name, config) for name, config in configs.items()},
        denoiser=parameters_frozen(denoiser),
        scheduler=corrected_scheduler(pipeline.scheduler, family),
        text_encoders={name: parameters_frozen(encoder) for name, encoder in text_encoders.items()},
        tokenizers={part.name: getattr(pipeline, part.tokenizer) for part in family.text},
        controlnet=None if controlnet is None else parameters_frozen(controlnet),
        vae=None if vae is None else parameters_frozen(vae),
        classes=read_classes(index, denoiser.config),
        index=index,
    )


def wrap_components(model: LoadedModel) -> dict[str, nn.Module]:
    """The components with the signatures of :func:`quest_deploy.model.spec.component_specs`, by name."""
    modules: dict[str, nn.Module] = {
        name: TextEncoder(encoder, [tensor.name for tensor in model.specs[name].outputs])
        for name, encoder in model.text_encoders.items()
    }
    modules[model.family.denoiser] = Denoiser(model.denoiser, model.denoiser_spec)
    if model.family.controlnet is not None and model.controlnet is not None:
        spec = model.specs[model.family.controlnet]
        modules[model.family.controlnet] = ControlNet(model.controlnet, spec)
    if model.vae is not None:
        modules[VAE_DECODER] = VaeDecoder(model.vae)
        if model.family.reads_images:
            modules[VAE_ENCODER] = VaeEncoder(model.vae)
    return {name: parameters_frozen(module) for name, module in modules.items()}


def _hide_loading_bars() -> None:
    """Loading takes seconds, and these bars would break into the progress of the stage; downloads keep theirs."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def _snapshot(source: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    unreachable = f"{source}: is neither a model directory nor a .safetensors file"
    try:
        return Path(
            snapshot_download(source, ignore_patterns=["*.bin", "*.ckpt", "*.pt", "*.pth", "*.msgpack"])
        )
    except HFValidationError as error:
        raise ModelLoadError(f"{unreachable}, nor a valid hub id; check the path") from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelLoadError(
            f"{unreachable}, and the hub does not give it ({_first_line(error)}); "
            "check the path, or download the model first"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]

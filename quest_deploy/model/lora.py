"""LoRAs merged into a model's weights, by diffusers and peft."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from quest_deploy.artifacts import refuse_pickle
from quest_deploy.config import LoraConfig
from quest_deploy.errors import ConfigError, MissingDependencyError, ModelLoadError
from quest_deploy.model.components import parameters_frozen
from quest_deploy.model.load import LoadedModel

logger = logging.getLogger(__name__)

# How the first of a LoRA's two matrices is named: by peft, by kohya's scripts, by older versions of diffusers.
DOWN = ("lora_A.weight", "lora_down.weight", "lora.down.weight")


def merge_loras(model: LoadedModel, loras: Sequence[LoraConfig]) -> frozenset[str]:
    """Add every LoRA, times its scale, to the weights of the denoiser and of the text encoders, in place.

    Which text encoders take one is diffusers' choice: CLIP's do, T5 and Gemma do not.

    Args:
        model: Of a pipeline into which diffusers loads LoRAs.
        loras: One after the other.

    Returns:
        The names of the parts that have other weights now.

    Raises:
        MissingDependencyError: peft is not installed.
        ConfigError: the model's pipeline takes no LoRA.
        ModelLoadError: a file is missing, pickled, or no LoRA of this model.
    """
    if not loras:
        return frozenset()
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("merging a LoRA needs peft; pip install 'quest-deploy[lora]'")
    pipeline = _pipeline(model)
    changed = frozenset[str]().union(*(_merge(pipeline, lora) for lora in loras))
    parameters_frozen(model.denoiser)
    for encoder in model.text_encoders.values():
        parameters_frozen(encoder)
    return changed


def _pipeline(model: LoadedModel) -> Any:
    """diffusers' pipeline around the parts of `model`, which are shared; what else it could have is left out."""
    import diffusers

    name = model.family.pipeline
    pipeline_class = getattr(diffusers, name)
    if not hasattr(pipeline_class, "load_lora_weights"):
        raise ConfigError(f"diffusers loads no LoRA into a {name}; leave --lora out")
    parts: dict[str, Any] = {
        **model.text_encoders,
        **{part.tokenizer: model.tokenizers[part.name] for part in model.family.text},
        model.family.denoiser: model.denoiser,
        "scheduler": model.scheduler,
        "vae": model.vae,
        "controlnet": model.controlnet,
    }
    options: dict[str, Any] = {"requires_safety_checker": False, "add_watermarker": False}
    taken = {
        key: parts.get(key, options.get(key))
        for key, parameter in inspect.signature(pipeline_class.__init__).parameters.items()
        if key in parts or key in options or parameter.default is inspect.Parameter.empty and key != "self"
    }
    return pipeline_class(**taken)


def _merge(pipeline: Any, lora: LoraConfig) -> list[str]:
    """Add one LoRA; the names of the parts that it changes."""
    path = lora.path
    refuse_pickle(path)
    if not path.is_file():
        raise ModelLoadError(f"{path}: is no file; give the .safetensors file of a LoRA")
    taking = {
        name: module
        for name in pipeline._lora_loadable_modules
        if (module := getattr(pipeline, name, None)) is not None
    }
    before = {name: _weights(module) for name, module in taking.items()}
    try:
        pairs = _count_pairs(path)
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
        found = sum(_count_layers(module) for module in taking.values())
        pipeline.fuse_lora(components=list(taking), lora_scale=lora.scale)
        for module in taking.values():
            if getattr(module, "_transformer_norm_layers", None):
                # Those of a LoRA of FLUX: diffusers would put the model's own back in their place.
                module._transformer_norm_layers = None
        pipeline.unload_lora_weights()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise ModelLoadError(
            f"{path}: is no LoRA of this model ({_reason(error)}); choose one made for it"
        ) from error
    except Exception as error:
        # safetensors' own error derives from Exception alone.
        if type(error).__name__ != "SafetensorError":
            raise
        raise ModelLoadError(
            f"{path}: is no safetensors file ({error}); restore it from its source"
        ) from error
    for name, module in taking.items():
        _check_shapes(path, before[name], module)
    changed = [name for name, module in taking.items() if not _same(before[name], module)]
    # diffusers only warns where names in the file are none of the model's.
    if not found or (lora.scale and not changed):
        raise ModelLoadError(f"{path}: changes no weight of this model; choose a LoRA made for it")
    if found < pairs:
        logger.warning("%s: %d of its %d layers are none of this model's", path, pairs - found, pairs)
    return changed


def _check_shapes(path: Path, before: Mapping[str, Tensor], module: nn.Module) -> None:
    """Refuse what diffusers widened: a FLUX, to the inputs of a LoRA that shows it pictures."""
    for name, value in module.state_dict().items():
        if name in before and value.shape != before[name].shape:
            raise ModelLoadError(
                f"{path}: makes {name!r} {list(value.shape)}, which is {list(before[name].shape)} in this model; "
                "choose a LoRA that leaves the model's inputs as they are"
            )


def _weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def _same(before: Mapping[str, Tensor], module: nn.Module) -> bool:
    after = module.state_dict()
    return after.keys() == before.keys() and all(
        torch.equal(after[name], value) for name, value in before.items()
    )


def _count_pairs(path: Path) -> int:
    """How many layers a LoRA file speaks of, in whatever way it writes their names."""
    with safe_open(path, framework="pt") as file:
        return sum(name.endswith(DOWN) for name in file.keys())  # noqa: SIM118


def _count_layers(module: nn.Module) -> int:
    """How many layers of a module hold a LoRA that is not merged yet."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return sum(isinstance(layer, BaseTunerLayer) for layer in module.modules())


def _reason(error: Exception) -> str:
    """The line of an error that says most: the first tensor of another shape, else its first line."""
    lines = str(error).strip().splitlines() or ["no message"]
    return next((line.strip().rstrip(".") for line in lines if "size mismatch" in line), lines[0])

"""LoRAs merged into a model's weights, by diffusers and peft."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from quest_deploy.artifacts import refuse_pickle
from quest_deploy.config import LoraConfig
from quest_deploy.errors import ConfigError, MissingDependencyError, ModelLoadError
from quest_deploy.model.components import parameters_frozen
from quest_deploy.model.load import LoadedModel


def merge_loras(model: LoadedModel, loras: Sequence[LoraConfig]) -> None:
    """Add every LoRA, times its scale, to the weights of the denoiser and of the text encoder, in place.

    Raises:
        MissingDependencyError: peft is not installed.
        ConfigError: the model's pipeline takes no LoRA.
        ModelLoadError: a file is missing, pickled, or no LoRA of this model.
    """
    if not loras:
        return
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("merging a LoRA needs peft; pip install 'quest-deploy[lora]'")
    pipeline = _pipeline(model)
    for lora in loras:
        _merge(pipeline, lora, model)
    parameters_frozen(model.denoiser)
    for encoder in model.text_encoders.values():
        parameters_frozen(encoder)


def _pipeline(model: LoadedModel) -> Any:
    import diffusers

    pipeline_class = getattr(diffusers, model.family.pipeline)
    if not hasattr(pipeline_class, "load_lora_weights"):
        raise ConfigError(f"{model.family.pipeline} takes no LoRA; leave --lora out")
    if model.family.pipeline != "StableDiffusionPipeline":
        raise ConfigError(
            f"merging a LoRA into a {model.family.pipeline} is not supported yet; "
            "merge it with diffusers (fuse_lora), save the model, and finetune that"
        )
    return pipeline_class(
        unet=model.denoiser,
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        scheduler=model.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def _merge(pipeline: Any, lora: LoraConfig, model: LoadedModel) -> None:
    path = lora.path
    refuse_pickle(path)
    if not path.is_file():
        raise ModelLoadError(f"{path}: is no file; give the .safetensors file of a LoRA")
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    if model.text_encoder is not None:
        told = {name: value.clone() for name, value in model.text_encoder.state_dict().items()}
    else:
        told = {}
    try:
        pipeline.load_lora_weights(str(path.parent), weight_name=path.name, use_safetensors=True)
        pipeline.fuse_lora(lora_scale=lora.scale)
        pipeline.unload_lora_weights()
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise ModelLoadError(f"{path}: is no LoRA of this model ({first}); choose one made for it") from error
    after = model.denoiser.state_dict()
    same = after.keys() == before.keys() and all(
        torch.equal(after[name], value) for name, value in before.items()
    )
    if same and model.text_encoder is not None:
        words = model.text_encoder.state_dict()
        same = all(torch.equal(words[name], value) for name, value in told.items())
    # diffusers only warns where no name in the file is one of the model's.
    if same and lora.scale != 0:
        raise ModelLoadError(f"{path}: changes no weight of this model; choose a LoRA made for it")

"""Models whose configurations say what those of diffusers' examples do not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PixArtTransformer2DModel, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging

from quest_deploy import sampling
from quest_deploy.config import FinetuneConfig, GenerateConfig
from quest_deploy.errors import ArtifactError, ModelLoadError
from quest_deploy.model.load import load_model
from quest_deploy.model.packing import unpack
from quest_deploy.model.spec import component_configs, component_specs
from quest_deploy.pipeline import generate, load_pipeline
from quest_deploy.quantize.checkpoint import load_checkpoint
from quest_deploy.quantize.finetune import finetune
from tests.families.conftest import RECIPE
from tests.families.text_parts import HIDDEN, shaken

SEEDS, PROMPTS = [5, 9], ["a red heart", "Pizza 7"]
SETTINGS = {"guidance_scale": 4.0}


def check_same(path: Path, **call: object) -> None:
    """Check that torch draws the latents of diffusers, bit for bit."""
    diffusers_logging.set_verbosity_error()
    theirs = DiffusionPipeline.from_pretrained(str(path), torch_dtype=torch.float32)
    theirs.set_progress_bar_config(disable=True)
    generators = sampling.generators_of(SEEDS)
    expected = theirs(
        PROMPTS, generator=generators, num_inference_steps=3, output_type="latent", **SETTINGS, **call
    ).images
    generators = sampling.generators_of(SEEDS)
    with load_pipeline(path) as pipeline:
        got = pipeline.denoise(
            sampling.draw_noise(generators, pipeline.latent_shape()),
            pipeline.encode(PROMPTS),
            pipeline.encode_negative(len(PROMPTS)),
            steps=3,
            generators=generators,
            **SETTINGS,
        )
    assert torch.equal(got, unpack(expected, *got.shape[-2:]) if expected.ndim == 3 else expected)


@pytest.fixture
def first_pixart(altered: Callable[..., Path]) -> Path:
    """As PixArt-alpha is on the hub: saved before its transformer had a class of its own."""
    altered("pixart-alpha", "transformer/config.json", _class_name="Transformer2DModel")
    return altered("pixart-alpha", "model_index.json", transformer=["diffusers", "Transformer2DModel"])


def test_a_pixart_of_the_first_class_draws_as_in_diffusers(
    first_pixart: Path, text_models: ModuleType
) -> None:
    check_same(first_pixart, **text_models.CALLS["pixart-alpha"])


def test_a_pixart_of_the_first_class_is_the_same_model(
    first_pixart: Path, model_of: Callable[[str], Path]
) -> None:
    path = first_pixart / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["patch_size"], config["out_channels"]
    path.write_text(json.dumps(config))
    assert component_specs(first_pixart) == component_specs(model_of("pixart-alpha"))
    assert component_configs(first_pixart)["transformer"]["patch_size"] == 2
    for deferred in (False, True):
        assert type(load_model(first_pixart, deferred=deferred).denoiser) is PixArtTransformer2DModel


def test_a_dit_of_the_first_class_is_the_same_model(
    altered: Callable[..., Path], model_of: Callable[[str], Path]
) -> None:
    path = altered("dit", "transformer/config.json", _class_name="Transformer2DModel")
    assert component_specs(path) == component_specs(model_of("dit"))


@pytest.mark.thorough
def test_a_pixart_of_the_first_class_is_finetuned(first_pixart: Path, tmp_path: Path) -> None:
    finetune(first_pixart, tmp_path / "checkpoint", FinetuneConfig(recipe=RECIPE))
    assert type(load_checkpoint(tmp_path / "checkpoint").denoiser) is PixArtTransformer2DModel


@pytest.mark.parametrize("solver", ["UniPCMultistepScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.parametrize("kind", ["sd3", "flux-dev"])
def test_a_solver_s_flow_is_shifted_by_the_size_as_in_diffusers(
    kind: str, solver: str, altered: Callable[..., Path], text_models: ModuleType
) -> None:
    altered(kind, "model_index.json", scheduler=["diffusers", solver])
    path = altered(kind, "scheduler/scheduler_config.json")
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "use_dynamic_shifting": True}
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(settings | {"_class_name": solver}))
    check_same(path, **text_models.CALLS.get(kind, {}))


@pytest.mark.parametrize(
    ("kind", "file", "changes", "message"),
    [
        ("controlnet", "controlnet/config.json", {"global_pool_conditions": True}, "global_pool_conditions"),
        (
            "controlnet",
            "model_index.json",
            {"controlnet": ["diffusers", "MultiControlNetModel"]},
            "several ControlNets",
        ),
        ("sd2", "text_encoder/config.json", {"use_attention_mask": True}, "use_attention_mask"),
        (
            "sd2",
            "unet/config.json",
            {"cross_attention_dim": [16, 24]},
            r"\[16, 24\], and levels of different",
        ),
        ("sd2", "unet/config.json", {"encoder_hid_dim_type": "image_proj"}, "'image_proj'"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    kind: str, file: str, changes: dict[str, Any], message: str, altered: Callable[..., Path]
) -> None:
    with pytest.raises(ModelLoadError, match=f"{message}.*not supported"):
        load_model(altered(kind, file, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"cross_attention_dim": [HIDDEN, HIDDEN]},
        {"cross_attention_dim": 24, "encoder_hid_dim": HIDDEN, "encoder_hid_dim_type": "text_proj"},
    ],
    ids=["a list of one width", "projected text"],
)
def test_a_unet_is_told_the_width_that_it_takes(
    changes: dict[str, Any], text_models: ModuleType, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    pipe = text_models.sd2()
    pipe.register_modules(unet=shaken(UNet2DConditionModel(**(text_models.UNET | changes))))
    pipe.save_pretrained(tmp_path / "model")
    check_same(tmp_path / "model")
    told = component_specs(tmp_path / "model")["unet"].inputs[2]
    assert told.shape == ("batch", "sequence", HIDDEN)


SCHEDULER, UNET = "scheduler/scheduler_config.json", "unet/config.json"


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        (SCHEDULER, {"beta_schedule": "nonsense"}),
        (SCHEDULER, {"prediction_type": "v-prediction"}),
        (UNET, {"block_out_channels": 64}),
        (UNET, {"sample_size": "big"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_broken_configuration_is_named(
    file: str, changes: dict[str, Any], altered: Callable[..., Path], tmp_path: Path
) -> None:
    path, config = altered("sd2", file, **changes), GenerateConfig(prompts=("cat",), steps=2)
    with pytest.raises((ArtifactError, ModelLoadError), match=f"{file}: "):
        generate(path, tmp_path / "images", config)
    with pytest.raises((ArtifactError, ModelLoadError), match=f"{file}: "):
        load_model(path)

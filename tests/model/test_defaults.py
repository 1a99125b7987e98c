"""Configurations that leave fields out are read as their classes read them."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, Gemma2Config, T5Config

from quest_deploy.config import BuildConfig, ExportConfig, GenerateConfig, ShapeRange
from quest_deploy.engines.profiles import latent_ranges
from quest_deploy.errors import ConfigError, ModelLoadError
from quest_deploy.export.lint.read import default_dimensions
from quest_deploy.export.to_onnx import export
from quest_deploy.model.defaults import DIFFUSERS_DEFAULTS, TRANSFORMERS_DEFAULTS
from quest_deploy.model.denoisers import DENOISERS
from quest_deploy.model.families import FAMILIES
from quest_deploy.model.spec import component_configs, component_specs
from quest_deploy.pipeline import generate, load_pipeline
from quest_deploy.pipeline.request import check_request, own_scheduler

READ = {field for fields in DIFFUSERS_DEFAULTS.values() for field in fields}
# Read of some classes only, where another class's field of that name means something else.
UNREAD = {
    "AutoencoderKL": {"layers_per_block", "sample_size"},
    "VQModel": {"layers_per_block", "sample_size", "norm_type"},
    "UNet2DConditionModel": {"attention_head_dim"},
    "UNet2DModel": {"layers_per_block", "attention_head_dim"},
    "ControlNetModel": {"attention_head_dim"},
    "DiTTransformer2DModel": {"attention_head_dim"},
    "PixArtTransformer2DModel": {"attention_head_dim", "norm_type", "num_embeds_ada_norm"},
    "SD3Transformer2DModel": {"attention_head_dim"},
    "SanaTransformer2DModel": {"attention_head_dim", "cross_attention_dim"},
    "FluxTransformer2DModel": {"attention_head_dim", "patch_size"},
}
CONFIG = GenerateConfig(prompts=("rocket",), steps=2, guidance_scale=3.0, seed=1)


@pytest.mark.parametrize("name", DIFFUSERS_DEFAULTS)
def test_defaults_are_the_installed_classes(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    expected = {
        field: parameters[field].default
        for field in (READ & parameters.keys()) - UNREAD.get(name, set())
        if parameters[field].default is not None
    }
    assert DIFFUSERS_DEFAULTS[name] == expected


def test_every_denoiser_and_autoencoder_has_defaults() -> None:
    assert DENOISERS.keys() <= DIFFUSERS_DEFAULTS.keys()
    assert {family.denoiser_class for family in FAMILIES.values()} <= DIFFUSERS_DEFAULTS.keys()


@pytest.mark.parametrize(
    ("kind", "config"), [("clip", CLIPTextConfig), ("t5", T5Config), ("gemma", Gemma2Config)]
)
def test_defaults_of_text_encoders_are_the_installed_classes(kind: str, config: Callable[[], Any]) -> None:
    made = config()
    assert {field: getattr(made, field) for field in TRANSFORMERS_DEFAULTS[kind]} == TRANSFORMERS_DEFAULTS[
        kind
    ]


@pytest.fixture
def without(tiny_model: Path, tiny_onnx: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the tiny model, or of its export, whose configuration of a component lacks a field, or has another."""

    def make(folder: str, field: str, exported: bool = False, **new: Any) -> Path:
        source = tiny_onnx if exported else tiny_model
        copy = shutil.copytree(source, tmp_path / source.name, dirs_exist_ok=True)
        (copy / "manifest.json").unlink(missing_ok=True)
        path = copy / folder / "config.json"
        config = json.loads(path.read_text())
        del config[field]
        path.write_text(json.dumps({**config, **new}))
        return copy

    return make


@pytest.mark.parametrize("exported", [False, True], ids=["torch", "onnxruntime"])
def test_an_autoencoder_without_a_scaling_factor_has_its_classs(
    without: Callable[..., Path], tiny_model: Path, tmp_path: Path, exported: bool
) -> None:
    path = without("vae_decoder" if exported else "vae", "scaling_factor", exported)
    generate(path, tmp_path / "left out", CONFIG)
    generate(tiny_model, tmp_path / "written", CONFIG)
    images = [
        diffusers.utils.load_image(str(next((tmp_path / name).glob("*.png"))))
        for name in ("left out", "written")
    ]
    left_out, written = (np.asarray(image, dtype=np.int16) for image in images)
    assert abs(left_out - written).max() <= 1
    assert component_configs(path)["vae_decoder"]["scaling_factor"] == 0.18215


def test_specifications_know_what_is_left_out(without: Callable[..., Path], tiny_model: Path) -> None:
    path = without("vae", "latent_channels")
    assert component_specs(path) == component_specs(tiny_model)


SIZED = GenerateConfig(prompts=("rocket",), steps=2, height=64, width=32)


@pytest.mark.parametrize("new", [{}, {"sample_size": None}], ids=["left out", "null"])
def test_a_unet_that_does_not_say_its_size_draws_the_size_that_is_asked_for(
    without: Callable[..., Path], tmp_path: Path, new: dict[str, None]
) -> None:
    path = without("unet", "sample_size", **new)
    with pytest.raises(ModelLoadError, match=r"no sample_size.*write it there, or, to draw, give --height"):
        check_request(path, CONFIG, "torch")
    generate(path, tmp_path / "images", SIZED)
    with load_pipeline(path) as pipeline:
        assert pipeline.latent_shape(64, 32)[1:] == (32, 16)


@pytest.mark.thorough
def test_a_unet_that_does_not_say_its_size_is_exported(without: Callable[..., Path], tmp_path: Path) -> None:
    path = without("unet", "sample_size")
    onnx = tmp_path / "onnx"
    export(path, onnx, ExportConfig(mode="none"))
    generate(onnx, tmp_path / "exported", SIZED)
    export(path, tmp_path / "half", ExportConfig(mode="none", dtype="fp16"))
    assert "height" not in default_dimensions(onnx)
    denoiser = component_specs(onnx)["unet"]
    with pytest.raises(ModelLoadError, match="no sample_size"):
        latent_ranges(onnx, denoiser, BuildConfig(backend="tensorrt-rtx"))
    side = ShapeRange(min=32, opt=64, max=64)
    ranges = latent_ranges(onnx, denoiser, BuildConfig(backend="tensorrt-rtx", height=side, width=side))
    assert ranges["height"] == ShapeRange(min=16, opt=32, max=32)


@pytest.mark.parametrize("exported", [False, True], ids=["torch", "onnxruntime"])
def test_the_index_says_which_scheduler_a_model_has(
    tiny_model: Path, tiny_onnx: Path, tmp_path: Path, exported: bool, caplog: pytest.LogCaptureFixture
) -> None:
    copy = shutil.copytree(tiny_onnx if exported else tiny_model, tmp_path / "copy")
    (copy / "manifest.json").unlink(missing_ok=True)
    index = json.loads((copy / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "EulerDiscreteScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    assert type(own_scheduler(copy)) is diffusers.EulerDiscreteScheduler
    with load_pipeline(copy) as pipeline:
        assert type(pipeline.scheduler) is diffusers.EulerDiscreteScheduler
    if not exported:
        theirs = diffusers.EulerDiscreteScheduler.from_pretrained(copy, subfolder="scheduler")
        assert dict(own_scheduler(copy).config) == {**theirs.config, "steps_offset": 1}
    index["scheduler"] = ["diffusers", "NoSuchScheduler"]
    (copy / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="'NoSuchScheduler' is unknown"):
        own_scheduler(copy)


def test_schedulers_draw_with_the_pipelines_eta(tiny_model: Path) -> None:
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        tiny_model, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = diffusers.TCDScheduler.from_config(pipe.scheduler.config)
    with load_pipeline(tiny_model) as pipeline:
        pipeline.scheduler = pipe.scheduler
        noise = pipeline.initial_noise([0])
        latents = pipeline.denoise(
            noise, pipeline.encode(["rocket"]), pipeline.encode([""]), steps=3, guidance_scale=3.0
        )
    expected = pipe(
        "rocket", num_inference_steps=3, guidance_scale=3.0, latents=noise, output_type="latent"
    ).images
    assert torch.equal(latents, expected)

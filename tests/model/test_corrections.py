"""Models of diffusers' first days: what its pipelines correct holds for every artifact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)

from quest_deploy.model.corrections import corrected_denoiser, corrected_scheduler
from quest_deploy.model.families import FAMILIES
from quest_deploy.model.load import load_model
from quest_deploy.pipeline import load_pipeline
from quest_deploy.pipeline.request import own_scheduler

TEXT, INPAINT = FAMILIES["StableDiffusionPipeline"], FAMILIES["StableDiffusionInpaintPipeline"]
LEFT_OUT: dict[str, Any] = {}
WRITTEN = {"steps_offset": 0, "clip_sample": True}


@pytest.fixture
def old(tmp_path: Path) -> Callable[..., Path]:
    """A copy of an artifact whose scheduler's file has other settings of these names, or none."""

    def make(source: Path, settings: dict[str, Any]) -> Path:
        copy = tmp_path / source.name
        shutil.copytree(source, copy)
        path = copy / "scheduler" / "scheduler_config.json"
        kept = {key: value for key, value in json.loads(path.read_text()).items() if key not in WRITTEN}
        path.write_text(json.dumps({**kept, **settings}))
        return copy

    return make


@pytest.mark.parametrize("settings", [LEFT_OUT, WRITTEN], ids=["left out", "written"])
def test_old_scheduler_draws_what_diffusers_draws_and_exports_step_likewise(
    old: Callable[..., Path], tiny_model: Path, settings: dict[str, Any]
) -> None:
    path = old(tiny_model, settings)
    assert isinstance(own_scheduler(path), DDIMScheduler)
    theirs = StableDiffusionPipeline.from_pretrained(path, safety_checker=None, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    with load_pipeline(path) as pipeline:
        noise = pipeline.initial_noise([0])
        latents = pipeline.denoise(
            noise, pipeline.encode(["rocket"]), pipeline.encode([""]), steps=3, guidance_scale=3.0
        )
    expected = theirs(
        ["rocket"], num_inference_steps=3, guidance_scale=3.0, latents=noise.clone(), output_type="latent"
    )
    torch.testing.assert_close(latents, expected.images, rtol=0, atol=0)
    # What an exported directory, which holds the same file, steps with.
    for name in WRITTEN:
        assert (
            own_scheduler(path).config[name]
            == pipeline.scheduler.config[name]
            == theirs.scheduler.config[name]
        )


def test_corrected_settings_go_into_another_scheduler() -> None:
    corrected = corrected_scheduler(DDIMScheduler(), TEXT)
    assert EulerDiscreteScheduler.from_config(corrected.config).config.steps_offset == 1


def test_inpainting_corrects_what_diffusers_does() -> None:
    scheduler = PNDMScheduler()
    theirs = StableDiffusionInpaintPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=None,
        scheduler=PNDMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    corrected = corrected_scheduler(scheduler, INPAINT)
    for name in ("steps_offset", "skip_prk_steps"):
        assert corrected.config[name] == theirs.scheduler.config[name] != scheduler.config[name]


def test_other_families_and_settings_stay() -> None:
    scheduler = DDIMScheduler()
    assert corrected_scheduler(scheduler, FAMILIES["LDMPipeline"]) is scheduler
    euler = EulerDiscreteScheduler(timestep_spacing="trailing")
    assert dict(corrected_scheduler(euler, TEXT).config) == {
        **euler.config,
        "steps_offset": 1,
        "_use_default_values": [n for n in euler.config["_use_default_values"] if n != "steps_offset"],
    }


@pytest.mark.parametrize(
    ("version", "size", "expected"),
    [("0.6.0", 32, 64), ("0.8.1", 96, 96), ("0.9.0", 32, 32), ("0.10.2", 32, 32), (None, 32, 32)],
)
def test_u_nets_saved_before_diffusers_0_9_draw_512_pixels(
    version: str | None, size: int, expected: int
) -> None:
    config = {"sample_size": size, "_diffusers_version": version}
    assert corrected_denoiser(config, TEXT)["sample_size"] == expected


def test_the_size_is_that_of_all_who_ask(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny_model, copy)
    path = copy / "unet" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_diffusers_version": "0.6.0"}))
    with load_pipeline(copy) as pipeline:
        assert pipeline.latent_shape()[-2:] == (64, 64)
    assert load_model(copy).latent_shape[-2:] == (64, 64)

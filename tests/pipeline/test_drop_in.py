"""The diffusers drop-in: a real StableDiffusionPipeline that draws what our own loop draws."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quest_deploy import sampling
from quest_deploy.errors import ConfigError
from quest_deploy.pipeline import Pipeline, load_pipeline

PROMPTS, NEGATIVE, SEEDS = ["red heart", "snowman"], ["blue", "blue"], [1, 2]


@pytest.fixture(scope="module", params=["torch", "onnxruntime"])
def opened(request: pytest.FixtureRequest) -> Iterator[Pipeline]:
    path: Path = request.getfixturevalue("tiny_model" if request.param == "torch" else "tiny_onnx")
    with load_pipeline(path) as pipeline:
        assert pipeline.backend == request.param
        yield pipeline


@pytest.fixture(scope="module")
def drop_in(opened: Pipeline) -> Any:
    pipeline = opened.as_diffusers()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline: Any, **options: Any) -> Any:
    """Draw with diffusers' own call, both prompts unless `options` say otherwise."""
    defaults = {
        "prompt": PROMPTS,
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "generator": sampling.generators_of(SEEDS),
        "output_type": "pt",
    }
    return pipeline(**defaults | options).images


def test_it_is_a_pipeline_of_diffusers(drop_in: Any) -> None:
    from diffusers import StableDiffusionPipeline

    assert isinstance(drop_in, StableDiffusionPipeline)


@pytest.mark.parametrize("scheduler", ["ddim", "euler-ancestral", "dpm++"])
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_it_draws_what_our_loop_draws(
    opened: Pipeline, drop_in: Any, scheduler: str, guidance_scale: float
) -> None:
    generators = sampling.generators_of(SEEDS)
    latents = opened.denoise(
        sampling.draw_noise(generators, opened.latent_shape()),
        opened.encode(PROMPTS),
        opened.encode(NEGATIVE),
        steps=2,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        generators=generators,
    )
    drop_in.scheduler = opened.make_scheduler(scheduler)
    images = call(drop_in, negative_prompt=NEGATIVE, guidance_scale=guidance_scale)
    assert torch.equal(images, opened.decode(latents))


def test_one_prompt_several_images_and_another_size(drop_in: Any) -> None:
    images = call(drop_in, prompt="cat", num_images_per_prompt=2, height=32, width=24, output_type="pil")
    assert [image.size for image in images] == [(24, 32), (24, 32)]


@pytest.mark.parametrize(
    "option",
    [{"clip_skip": 1}, {"cross_attention_kwargs": {"ip_adapter_masks": 1}}],
    ids=lambda option: next(iter(option)),
)
def test_what_engines_cannot_do_is_refused_by_name(drop_in: Any, option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"got {next(iter(option))}, which an engine cannot take"):
        call(drop_in, **option)


def test_its_scheduler_is_not_the_pipelines(opened: Pipeline, drop_in: Any) -> None:
    assert drop_in.scheduler is not opened.scheduler

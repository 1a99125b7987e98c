"""Every kind of model that reads text draws the latents of diffusers' own pipeline, bit for bit, on torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from quest_deploy import sampling
from quest_deploy.config import GenerateConfig
from quest_deploy.errors import ConfigError
from quest_deploy.model.packing import unpack
from quest_deploy.pipeline import Pipeline, generate, load_pipeline

SEEDS, STEPS = [5, 9], 3
PROMPTS = ["a red heart", "Pizza 7"]
# The refiner of diffusers starts from an image; nothing there tells a PixArt of this size about its size.
KINDS = (
    "sd2",
    "sdxl",
    "lcm",
    "inpaint",
    "controlnet",
    "pixart-alpha",
    "pixart-sigma",
    "sd3",
    "sd35",
    "flux-dev",
    "flux-schnell",
    "sana",
)


def theirs(path: Path, kind: str) -> Any:
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    # diffusers wants to be told of what the directory says.
    without_t5 = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd35" else {}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(str(path), torch_dtype=torch.float32, **without_t5)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(pipeline: Pipeline, *, steps: int, guidance_scale: float, negative: str = "") -> torch.Tensor:
    generators = sampling.generators_of(SEEDS)
    return pipeline.denoise(
        sampling.draw_noise(generators, pipeline.latent_shape()),
        pipeline.encode(PROMPTS),
        pipeline.encode_negative(len(PROMPTS), negative),
        steps=steps,
        guidance_scale=guidance_scale,
        generators=generators,
    )


def check_same(
    kind: str, path: Path, text_models: ModuleType, *, steps: int, guidance_scale: float, **call: Any
) -> None:
    expected = theirs(path, kind)(
        prompt=PROMPTS,
        guidance_scale=guidance_scale,
        generator=sampling.generators_of(SEEDS),
        num_inference_steps=steps,
        output_type="latent",
        **text_models.CALLS.get(kind, {}),
        **call,
    ).images
    with load_pipeline(path) as pipeline:
        got = ours(
            pipeline, steps=steps, guidance_scale=guidance_scale, negative=call.get("negative_prompt", "")
        )
    if expected.ndim == 3:
        expected = unpack(expected, *got.shape[-2:])
    assert torch.equal(got, expected)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("kind", KINDS)
def test_latents_are_those_of_diffusers(
    kind: str, guidance_scale: float, model_of: Callable[[str], Path], text_models: ModuleType
) -> None:
    check_same(kind, model_of(kind), text_models, steps=STEPS, guidance_scale=guidance_scale)


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "sana"])
def test_latents_with_a_negative_prompt_are_those_of_diffusers(
    kind: str, model_of: Callable[[str], Path], text_models: ModuleType
) -> None:
    path = model_of(kind)
    check_same(kind, path, text_models, steps=2, guidance_scale=3.0, negative_prompt="a rocket")


@pytest.mark.parametrize("kind", ["sdxl", "lcm", "flux-schnell"])
def test_one_step_is_that_of_diffusers(
    kind: str, model_of: Callable[[str], Path], text_models: ModuleType
) -> None:
    check_same(kind, model_of(kind), text_models, steps=1, guidance_scale=1.0)


def test_images_are_those_of_diffusers(model_of: Callable[[str], Path], text_models: ModuleType) -> None:
    expected = theirs(model_of("flux-dev"), "flux-dev")(
        prompt=PROMPTS,
        guidance_scale=3.5,
        generator=sampling.generators_of(SEEDS),
        num_inference_steps=STEPS,
        output_type="np",
        **text_models.CALLS["flux-dev"],
    ).images
    with load_pipeline(model_of("flux-dev")) as pipeline:
        got = pipeline.decode(ours(pipeline, steps=STEPS, guidance_scale=3.5)).permute(0, 2, 3, 1)
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=0, atol=2e-5)


def test_the_guidance_scale_reaches_a_model_with_an_input_for_it(model_of: Callable[[str], Path]) -> None:
    for kind in ("lcm", "flux-dev"):
        with load_pipeline(model_of(kind)) as pipeline:
            assert not pipeline.has_negative
            one, other = (ours(pipeline, steps=1, guidance_scale=scale) for scale in (2.0, 6.0))
        assert not torch.equal(one, other), kind


def test_no_guidance_is_told_where_no_input_takes_it(
    model_of: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = GenerateConfig(prompts=("pizza",), steps=1, guidance_scale=3.0)
    for kind, told in (("flux-schnell", True), ("flux-dev", False)):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            generate(model_of(kind), tmp_path / kind, config)
        assert ("guidance scale has no effect" in caplog.text) == told


def test_a_cut_prompt_is_told_for_the_encoder_that_reads_most(
    model_of: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with load_pipeline(model_of("flux-dev")) as pipeline:
        with caplog.at_level(logging.WARNING):
            pipeline.encode("z" * 100)
            assert "tokens" not in caplog.text
            pipeline.encode("z" * 600)
    assert "has 601 tokens, the model reads 511" in caplog.text


def test_a_picture_is_looked_at_as_in_diffusers(
    model_of: Callable[[str], Path], text_models: ModuleType
) -> None:
    picture = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    expected = theirs(model_of("controlnet"), "controlnet")(
        prompt=PROMPTS,
        image=picture,
        guidance_scale=3.0,
        generator=sampling.generators_of(SEEDS),
        num_inference_steps=2,
        output_type="latent",
    ).images
    generators = sampling.generators_of(SEEDS)
    with load_pipeline(model_of("controlnet")) as pipeline:
        told, negative = (pipeline.encode(PROMPTS), pipeline.encode_negative(2))
        got = pipeline.denoise(
            sampling.draw_noise(generators, pipeline.latent_shape()),
            told | {"controlnet_cond": picture},
            negative | {"controlnet_cond": picture},
            steps=2,
            guidance_scale=3.0,
            generators=generators,
        )
        black = ours(pipeline, steps=2, guidance_scale=3.0)
    assert torch.equal(got, expected) and not torch.equal(got, black)


def test_only_what_is_masked_is_drawn_anew_as_in_diffusers(model_of: Callable[[str], Path]) -> None:
    generator = torch.Generator().manual_seed(3)
    mask = (torch.rand(2, 1, 8, 8, generator=generator) > 0.5).float()
    kept = torch.randn(2, 4, 8, 8, generator=generator)
    expected = theirs(model_of("inpaint"), "inpaint")(
        prompt=PROMPTS,
        image=torch.zeros(2, 3, 16, 16),
        mask_image=mask.repeat_interleave(2, 2).repeat_interleave(2, 3),
        masked_image_latents=kept,
        guidance_scale=3.0,
        generator=sampling.generators_of(SEEDS),
        num_inference_steps=2,
        output_type="latent",
    ).images
    generators, given = sampling.generators_of(SEEDS), {"masked_latents": torch.cat([mask, kept], dim=1)}
    with load_pipeline(model_of("inpaint")) as pipeline:
        got = pipeline.denoise(
            sampling.draw_noise(generators, pipeline.latent_shape()),
            pipeline.encode(PROMPTS) | given,
            pipeline.encode_negative(2) | given,
            steps=2,
            guidance_scale=3.0,
            generators=generators,
        )
    assert torch.equal(got, expected)


def test_latents_of_an_image_are_those_of_diffusers(model_of: Callable[[str], Path]) -> None:
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    vae = theirs(model_of("sdxl-refiner"), "sdxl-refiner").vae
    with torch.no_grad():
        expected = vae.encode(images * 2 - 1).latent_dist.mode() * vae.config.scaling_factor
    with load_pipeline(model_of("sdxl-refiner")) as pipeline:
        assert torch.equal(pipeline.encode_images(images), expected)
    with load_pipeline(model_of("sdxl")) as pipeline, pytest.raises(ConfigError, match="reads no images"):
        pipeline.encode_images(images)

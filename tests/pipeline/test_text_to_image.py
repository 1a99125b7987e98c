"""The pipeline: sizes, prompts, guidance and the decoder's scaling, whatever runs the components."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quest_deploy import sampling
from quest_deploy.errors import ConfigError, EngineInputError
from quest_deploy.model.families import TEXT_ENCODER, VAE_DECODER
from quest_deploy.pipeline import Pipeline, load_pipeline

TEXT = "encoder_hidden_states"


def test_the_models_own_size_is_the_default(pipeline: Pipeline) -> None:
    assert pipeline.latent_shape() == (4, 8, 8)


def test_pixels_are_counted_in_latents(pipeline: Pipeline) -> None:
    assert pipeline.latent_shape(32, 8) == (4, 16, 4)


@pytest.mark.parametrize("size", [{"height": 17}, {"width": 17}, {"height": 0}, {"width": -2}])
def test_a_size_that_no_latents_have_is_refused(pipeline: Pipeline, size: dict[str, int]) -> None:
    name, pixels = next(iter(size.items()))
    with pytest.raises(ConfigError, match=f"{name} is {pixels} pixels, expected a multiple of 2"):
        pipeline.initial_noise([0], **size)


def test_a_size_that_an_exported_unet_cannot_halve_is_refused(pipeline: Pipeline) -> None:
    exported = dataclasses.replace(pipeline, backend="onnxruntime")
    assert pipeline.latent_shape(18) == (4, 9, 8)
    with pytest.raises(
        ConfigError, match=r"height: got 18 pixels, expected multiples of 4 .* choose 16 or 20"
    ):
        exported.latent_shape(18)


def test_a_rectangular_sample_size_is_understood(pipeline: Pipeline) -> None:
    configs = {**pipeline.configs, "unet": {**pipeline.configs["unet"], "sample_size": [4, 6]}}
    assert dataclasses.replace(pipeline, configs=configs).latent_shape() == (4, 4, 6)


def test_one_prompt_is_not_taken_for_a_list_of_letters(pipeline: Pipeline) -> None:
    one, several = (pipeline.encode(prompts)[TEXT] for prompts in ("red heart", ["red heart"]))
    assert torch.equal(one, several)


def test_a_prompt_that_is_cut_is_told_with_the_lost_words(
    pipeline: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        pipeline.encode(["heart " * 22 + "zebra"])
    assert "does not see 'zebra'" in caplog.text and "the model reads 22" in caplog.text


def test_a_negative_prompt_that_is_cut_is_told(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipeline.encode_negative(2, "heart " * 22 + "zebra")
    assert "does not see 'zebra'" in caplog.text and len(caplog.records) == 1


def test_a_prompt_that_fits_exactly_is_not_told(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pipeline.encode(["heart " * 22])
    assert not caplog.records


def test_a_cut_prompt_is_told_once(pipeline: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            pipeline.encode(["heart " * 30])
    assert len(caplog.records) == 1


def test_a_server_does_not_keep_every_prompt(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quest_deploy.pipeline.text_to_image.MOST_TOLD", 3)
    for number in range(9):
        pipeline.encode([f"cat {number}", f"cat {number} " + "heart " * 30])
    assert len(pipeline._told) == 3


def test_noise_is_the_same_at_any_batch_size(pipeline: Pipeline) -> None:
    assert torch.equal(pipeline.initial_noise([3, 4])[1:], pipeline.initial_noise([4]))


@pytest.mark.parametrize(("guidance_scale", "batch"), [(3.0, 4), (1.0, 2), (0.0, 2)])
def test_only_guidance_above_one_doubles_the_batch(
    pipeline: Pipeline, guidance_scale: float, batch: int
) -> None:
    text = pipeline.encode(["a", "b"])
    pipeline.denoise(pipeline.initial_noise([0, 1]), text, text, steps=2, guidance_scale=guidance_scale)
    assert pipeline.engines["unet"].batches == [batch, batch]


def test_forced_predictions_equal_those_of_the_loop(pipeline: Pipeline) -> None:
    steps: list[sampling.Step] = []
    positive, negative = pipeline.encode(["red heart"]), pipeline.encode([""])
    pipeline.denoise(
        pipeline.initial_noise([0]), positive, negative,
        steps=2, guidance_scale=3.0, scheduler="euler", callback=steps.append,
    )  # fmt: skip
    for step in steps:
        again = pipeline.predict_noise(step.latents, step.timestep, positive, negative, guidance_scale=3.0)
        assert torch.equal(again, step.noise_pred)


def test_a_scheduler_that_draws_noise_repeats_itself_without_generators(pipeline: Pipeline) -> None:
    noise, text = pipeline.initial_noise([0]), pipeline.encode(["a"])

    def run() -> torch.Tensor:
        return pipeline.denoise(noise, text, text, steps=2, guidance_scale=1.0, scheduler="euler-ancestral")

    assert torch.equal(run(), run())


@pytest.mark.parametrize("seeds", [[0], [0, 1]])
def test_without_generators_noise_goes_on_behind_that_of_the_seeds(
    pipeline: Pipeline, seeds: list[int]
) -> None:
    text = pipeline.encode(["a"] * len(seeds))
    generators = sampling.generators_of(seeds)
    noise = sampling.draw_noise(generators, pipeline.latent_shape())

    def run(generators: list[torch.Generator] | None) -> torch.Tensor:
        return pipeline.denoise(
            noise, text, text, steps=2, guidance_scale=1.0, scheduler="euler-ancestral", generators=generators
        )

    assert torch.equal(run(None), run(generators))


def test_two_runs_do_not_share_a_scheduler(pipeline: Pipeline) -> None:
    noise, text = pipeline.initial_noise([0]), pipeline.encode(["a"])
    first, second = (
        pipeline.denoise(noise, text, text, steps=3, guidance_scale=1.0, scheduler="dpm++") for _ in range(2)
    )
    assert torch.equal(first, second)


def test_images_are_those_of_diffusers(pipeline: Pipeline, tiny_model: Path) -> None:
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(str(tiny_model), safety_checker=None)
    theirs.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        pixels = theirs.vae.decode(latents / theirs.vae.config.scaling_factor).sample
    expected = theirs.image_processor.postprocess(pixels, output_type="pt")
    # Loaded twice, weights may be aligned differently in memory, which changes last bits.
    assert torch.allclose(pipeline.decode(latents), expected, rtol=0, atol=1e-5)


def test_a_shift_of_the_latents_is_undone_before_decoding(pipeline: Pipeline) -> None:
    config = {**pipeline.configs[VAE_DECODER], "shift_factor": 0.25}
    shifted = dataclasses.replace(pipeline, configs={**pipeline.configs, VAE_DECODER: config})
    latents = torch.randn(1, 4, 8, 8)
    moved = latents + 0.25 * config["scaling_factor"]
    assert torch.allclose(shifted.decode(latents), pipeline.decode(moved), atol=1e-5)


def test_images_are_clamped(pipeline: Pipeline) -> None:
    images = pipeline.decode(torch.randn(1, 4, 8, 8) * 1e4)
    assert (images.min().item(), images.max().item()) == (0.0, 1.0)


def test_noise_of_another_model_is_refused(pipeline: Pipeline) -> None:
    text = pipeline.encode(["a"])
    with pytest.raises(EngineInputError, match="unet input 'sample'"):
        pipeline.denoise(torch.randn(1, 3, 8, 8), text, text, steps=1, guidance_scale=1.0)


def test_leaving_the_context_closes_every_engine(tiny_model: Path) -> None:
    with load_pipeline(tiny_model) as opened:
        opened.encode(["a"])
    for component in (TEXT_ENCODER, "unet", VAE_DECODER):
        assert opened.engines[component].module is None


@pytest.fixture(scope="module")
def on_onnxruntime(tiny_onnx: Path) -> Iterator[Pipeline]:
    with load_pipeline(tiny_onnx) as opened:
        yield opened


@pytest.mark.parametrize("guidance_scale", [3.0, 1.0])
def test_onnx_runtime_draws_what_torch_draws(
    pipeline: Pipeline, on_onnxruntime: Pipeline, guidance_scale: float
) -> None:
    noise = pipeline.initial_noise([0, 1])

    def draw(candidate: Pipeline) -> torch.Tensor:
        positive, negative = candidate.encode(["red heart", "cat"]), candidate.encode(["", ""])
        return candidate.decode(
            candidate.denoise(noise, positive, negative, steps=3, guidance_scale=guidance_scale)
        )

    # Below half of a step of an 8-bit image.
    assert torch.allclose(draw(on_onnxruntime), draw(pipeline), rtol=0, atol=1e-3)


def test_what_the_denoiser_is_given_lies_where_it_runs(pipeline: Pipeline) -> None:
    """Parity gives it latents of the CPU, where a ControlNet's engine on a GPU refuses them."""
    elsewhere = dataclasses.replace(pipeline, device=torch.device("meta"))
    latents = pipeline.initial_noise([0])
    told = elsewhere.complete(pipeline.encode(["rocket"]), latents, 3.0)
    inputs = elsewhere.denoiser_inputs(latents, torch.tensor([10.0]), told)
    assert {tensor.device.type for tensor in inputs.values()} == {"meta"}

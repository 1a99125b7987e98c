"""Every kind draws what diffusers' own pipeline draws, on the torch backend."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quest_deploy import sampling
from quest_deploy.config import GenerateConfig
from quest_deploy.errors import ConfigError
from quest_deploy.pipeline import Pipeline, generate, load_pipeline

SEEDS, STEPS = [5, 9], 3
# What multiplying the batch in another order leaves in the last bits.
ROUNDING = 2e-5


def theirs(path: Path) -> Any:
    import diffusers
    from diffusers import DiffusionPipeline

    diffusers.utils.logging.set_verbosity_error()
    pipeline = DiffusionPipeline.from_pretrained(str(path), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def ours(pipeline: Pipeline, prompts: list[str], guidance_scale: float = 1.0) -> torch.Tensor:
    generators = sampling.generators_of(SEEDS)
    latents = pipeline.denoise(
        sampling.draw_noise(generators, pipeline.latent_shape()),
        pipeline.encode(prompts),
        pipeline.encode_negative(len(prompts)),
        steps=STEPS,
        guidance_scale=guidance_scale,
        generators=generators,
    )
    return pipeline.decode(latents).permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    ("kind", "index"),
    [("ddpm", {}), ("ldm", {}), ("ddpm", {"_class_name": "DDIMPipeline"})],
    ids=["ddpm", "ldm", "ddim over a scheduler of ddpm"],
)
def test_images_without_conditions_are_those_of_diffusers(
    kind: str, index: dict[str, str], altered: Callable[..., Path]
) -> None:
    path = altered(kind, "model_index.json", **index)
    expected = theirs(path)(
        batch_size=2,
        generator=sampling.generators_of(SEEDS),
        num_inference_steps=STEPS,
        output_type="np",
    ).images
    with load_pipeline(path) as pipeline:
        got = ours(pipeline, ["", ""])
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=0, atol=ROUNDING)


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_images_of_classes_are_those_of_diffusers(
    guidance_scale: float, model_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = theirs(model_of("dit"))
    # diffusers writes ImageNet's null class, 1000, into its loop.
    embed = pipeline.transformer.transformer_blocks[0].norm1.emb.class_embedder.embedding_table
    original = type(embed).forward
    monkeypatch.setattr(type(embed), "forward", lambda self, labels: original(self, labels.clamp(max=3)))
    expected = pipeline(
        class_labels=[1, 2],
        guidance_scale=guidance_scale,
        generator=sampling.generators_of(SEEDS),
        num_inference_steps=STEPS,
        output_type="np",
    ).images
    monkeypatch.undo()
    with load_pipeline(model_of("dit")) as candidate:
        got = ours(candidate, ["one", "2"], guidance_scale)
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=0, atol=ROUNDING)


def test_a_class_is_a_name_a_synonym_or_a_number(model_of: Callable[[str], Path]) -> None:
    with load_pipeline(model_of("dit")) as pipeline:
        assert pipeline.encode(["nought", "zero", "0", "two", ""])["class_labels"].tolist() == [0, 0, 0, 2, 3]


@pytest.mark.parametrize("prompt", ["twoo", "3", "-1"])
def test_a_prompt_that_is_no_class_is_refused(prompt: str, model_of: Callable[[str], Path]) -> None:
    with load_pipeline(model_of("class-unet")) as pipeline:
        with pytest.raises(ConfigError, match=f"'{prompt}' is no class of this model.* number from 0 to 2"):
            pipeline.encode([prompt])


def test_an_unconditional_model_is_told_nothing(model_of: Callable[[str], Path]) -> None:
    with load_pipeline(model_of("ldm")) as pipeline:
        assert (pipeline.encode(["a", "b"]), pipeline.encode_negative(2)) == ({}, None)


@pytest.mark.parametrize(
    ("kind", "prompts", "message"),
    [
        ("ddpm", ("a cat",), "draws without any; leave them out"),
        ("dit", (), "give the name or number of a class"),
    ],
)
def test_prompts_that_the_model_does_not_take_are_refused(
    kind: str, prompts: tuple[str, ...], message: str, model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(model_of(kind), tmp_path / "images", GenerateConfig(prompts=prompts))


def test_a_model_of_one_size_refuses_another(model_of: Callable[[str], Path]) -> None:
    with load_pipeline(model_of("dit")) as pipeline:
        assert pipeline.latent_shape(16, 16) == (4, 8, 8)
        with pytest.raises(ConfigError, match="height is 32 pixels, but this model draws 16 only"):
            pipeline.latent_shape(32, 16)

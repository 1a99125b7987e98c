"""Text encoder and autoencoder: quantized where the recipe asks, stored, and near what they were."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.artifacts import write_artifact
from quest_deploy.config import FinetuneConfig, StaticMode
from quest_deploy.errors import ConfigError
from quest_deploy.model.components import TextEncoder, VaeDecoder
from quest_deploy.model.conditioning import tokenize
from quest_deploy.model.families import TextPart
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import static
from quest_deploy.quantize.checkpoint import freeze, load_checkpoint, save_checkpoint
from quest_deploy.quantize.insert import quantizable_layers, quantized_layers
from quest_deploy.quantize.memory import GIGABYTE
from quest_deploy.quantize.recipe import load_recipe
from quest_deploy.quantize.static import final_latents, quantize_companions

PROMPTS = ("a red heart", "a blue car", "the moon", "a cat")
Answers = Callable[..., dict[str, Tensor]]


def config(text_encoder: StaticMode | None = None, vae_decoder: StaticMode | None = None) -> FinetuneConfig:
    recipe = dataclasses.replace(
        load_recipe("w8a8"),
        calibration_prompts=4,
        validation_prompts=1,
        calibration_steps=2,
        text_encoder=text_encoder,
        vae_decoder=vae_decoder,
    )
    return FinetuneConfig(recipe=recipe, prompts=PROMPTS)


@pytest.fixture(scope="module")
def w8a8(float_model: LoadedModel) -> dict[str, nn.Module]:
    """Both components of the tiny model at W8A8."""
    return quantize_companions(float_model, config("w8a8", "w8a8"))


@pytest.fixture(scope="module")
def answers(float_model: LoadedModel) -> Answers:
    """What both components make of prompts and latents like those that they were calibrated on."""
    ids = tokenize(TextPart(), float_model.tokenizer, ["a red moon", "the blue cat"])["input_ids"]
    latents = final_latents(float_model, PROMPTS[:2], config()) / float_model.vae.config.scaling_factor

    def run(text_encoder: nn.Module, vae: nn.Module) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"text_encoder": TextEncoder(text_encoder)(ids)[0], "vae": VaeDecoder(vae)(latents)[0]}

    return run


def snr_db(reference: Tensor, got: Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - got).square().sum()))


@pytest.mark.parametrize("name", ["text_encoder", "vae"])
def test_eight_bits_hardly_change_a_component(
    float_model: LoadedModel, w8a8: dict[str, nn.Module], answers: Answers, name: str
) -> None:
    weights = quantize_companions(float_model, config("int8-weight-only", "int8-weight-only"))
    true = answers(float_model.text_encoder, float_model.vae)[name]
    both, weights_alone = (answers(**found)[name] for found in (w8a8, weights))
    assert 100 > snr_db(true, weights_alone) > 25
    assert 100 > snr_db(true, both) > 25


def test_the_encoder_of_the_autoencoder_stays_as_it_was(w8a8: dict[str, nn.Module]) -> None:
    layers = quantized_layers(w8a8["vae"])
    assert layers and all(name.startswith(("decoder.", "post_quant_conv")) for name in layers)
    left = [
        name for name in quantizable_layers(w8a8["vae"]) if not name.startswith(("encoder.", "quant_conv"))
    ]
    assert left == []


def test_activations_have_one_scale_and_weights_alone_none(
    float_model: LoadedModel, w8a8: dict[str, nn.Module]
) -> None:
    alone = quantize_companions(float_model, config("int8-weight-only"))
    assert all(layer.quantizer.num_groups == 1 for layer in quantized_layers(w8a8["text_encoder"]).values())
    assert all(layer.quantizer is None for layer in quantized_layers(alone["text_encoder"]).values())


def test_weights_alone_need_no_images(float_model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static, "final_latents", lambda *args: pytest.fail("drawn"))
    assert set(static.quantize_companions(float_model, config(vae_decoder="int8-weight-only"))) == {"vae"}


def test_nothing_is_quantized_unless_asked_for(float_model: LoadedModel) -> None:
    assert quantize_companions(float_model, config()) == {}


def test_the_model_stays_as_it_was(float_model: LoadedModel, w8a8: dict[str, nn.Module]) -> None:
    assert not quantized_layers(float_model.text_encoder) and not quantized_layers(float_model.vae)


def test_latents_are_those_that_the_pipeline_draws(float_model: LoadedModel) -> None:
    from diffusers import StableDiffusionPipeline

    got = final_latents(float_model, PROMPTS[:2], config())
    pipeline = StableDiffusionPipeline(
        vae=float_model.vae,
        text_encoder=float_model.text_encoder,
        tokenizer=float_model.tokenizer,
        unet=float_model.denoiser,
        scheduler=float_model.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    expected = pipeline(
        list(PROMPTS[:2]),
        num_inference_steps=2,
        guidance_scale=config().recipe.guidance_scale,
        height=8 * pipeline.vae_scale_factor,
        width=8 * pipeline.vae_scale_factor,
        generator=generators,
        output_type="latent",
    ).images
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("missing", [{"text_encoders": {}}, {"vae": None}], ids=str)
def test_a_component_that_is_not_there_is_refused(float_model: LoadedModel, missing: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="to null in the recipe"):
        quantize_companions(dataclasses.replace(float_model, **missing), config("w8a8", "w8a8"))


@pytest.mark.parametrize("mode", ["w8a8", "int8-weight-only"])
def test_a_checkpoint_holds_quantized_components(
    tmp_path: Path,
    float_model: LoadedModel,
    w8a8: dict[str, nn.Module],
    answers: Answers,
    quantize_tiny,
    mode: StaticMode,
) -> None:
    denoiser, context = quantize_tiny(8, 8)
    freeze(denoiser)
    companions = w8a8 if mode == "w8a8" else quantize_companions(float_model, config(mode, mode))
    path = tmp_path / "checkpoint"
    with write_artifact(path, stage="checkpoint", config={}) as writer:
        save_checkpoint(
            writer.path,
            float_model,
            denoiser,
            recipe=load_recipe("w8a8"),
            activation_bits=dict.fromkeys(quantized_layers(denoiser), 8),
            context=context,
            history={},
            companions=companions,
        )
    assert not list((path / "text_encoder").glob("model*.safetensors"))
    loaded = load_checkpoint(path)
    got, expected = answers(loaded.text_encoder, loaded.vae), answers(**companions)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_latents_are_decoded_within_the_limit_with_the_same_scales(
    float_model: LoadedModel,
) -> None:
    vae = float_model.vae
    assert vae is not None
    each = static.decode_memory(float_model)
    needed = static.held_bytes(float_model, vae) + each.fixed + 3.5 * each.each
    recipe = dataclasses.replace(config().recipe, memory_limit_gb=needed / GIGABYTE)
    assert static.latents_at_once(float_model, recipe) == 3
    assert static.latents_at_once(float_model, dataclasses.replace(recipe, memory_limit_gb=None)) == 8
    latents = torch.randn(5, *float_model.latent_shape)
    layers = static.decoder_layers(vae)
    whole, chunked = (
        static._collect(layers, static._decoding(vae, latents, at_once), 0) for at_once in (8, 3)
    )
    counts: list[int] = []
    handle = vae.decoder.register_forward_pre_hook(lambda module, args: counts.append(len(args[0])))
    static._collect(layers, static._decoding(vae, latents, 3), 0)
    handle.remove()
    assert counts == [3, 2]
    for name, rows in whole.items():
        torch.testing.assert_close(chunked[name], rows, rtol=1e-4, atol=1e-5)

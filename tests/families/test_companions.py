"""Text encoders that are quantized, of every kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quest_deploy.config import FinetuneConfig, PhaseConfig, StaticMode
from quest_deploy.export.to_onnx import quantized_layer_names, weight_only_layer_names
from quest_deploy.model.deferred import streamed
from quest_deploy.model.load import LoadedModel, wrap_components
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize.checkpoint import load_checkpoint
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.static import quantize_companions
from tests.families.conftest import RECIPE

NONE = PhaseConfig(layers="none", steps=0)


def told(model: LoadedModel) -> dict[str, torch.Tensor]:
    with streamed(*model.text_encoders.values()):
        return model.conditioner.encode(["a red heart"])


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("pixart-alpha", "w8a8"),
        ("pixart-alpha", "int8-weight-only"),
        ("sd3", "int8-weight-only"),
        ("flux-dev", "int8-weight-only"),
        pytest.param("sdxl", "w8a8", marks=pytest.mark.thorough),
        pytest.param("sana", "w8a8", marks=pytest.mark.thorough),
    ],
)
def test_a_checkpoint_s_text_encoders_answer_as_those_that_were_saved(
    kind: str,
    mode: StaticMode,
    model_of: Callable[[str], Path],
    loaded: Callable[[str], LoadedModel],
    tmp_path: Path,
) -> None:
    recipe = dataclasses.replace(RECIPE, text_encoder=mode, temporal=NONE, sensitive=NONE)
    finetune(model_of(kind), tmp_path / "out", FinetuneConfig(recipe=recipe))
    config = FinetuneConfig(recipe=recipe, prompts=load_prompts(default="calibration"))
    quantized = quantize_companions(loaded(kind), config)
    expected = told(dataclasses.replace(loaded(kind), text_encoders=quantized))
    float_told = told(loaded(kind))
    assert any(not torch.equal(value, float_told[name]) for name, value in expected.items())
    for deferred in (False, True):
        got = told(load_checkpoint(tmp_path / "out", deferred=deferred))
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], value) for name, value in expected.items())


def test_the_embeddings_of_a_loaded_t5_are_one_tensor_again(
    model_of: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe = dataclasses.replace(RECIPE, text_encoder="int8-weight-only", temporal=NONE, sensitive=NONE)
    finetune(model_of("pixart-alpha"), tmp_path / "out", FinetuneConfig(recipe=recipe))
    encoder = load_checkpoint(tmp_path / "out").text_encoder
    assert encoder.encoder.embed_tokens.weight is encoder.shared.weight


def test_a_quantized_decoder_is_no_product_of_the_encoder_that_reads_images(
    loaded: Callable[[str], LoadedModel],
) -> None:
    recipe = dataclasses.replace(RECIPE, vae_decoder="int8-weight-only")
    vae = quantize_companions(loaded("inpaint"), FinetuneConfig(recipe=recipe))["vae"]
    modules = wrap_components(dataclasses.replace(loaded("inpaint"), vae=vae))
    assert weight_only_layer_names(modules["vae_decoder"])
    # An export counts these in the component's graph, and refuses one that has others.
    for names_of in (quantized_layer_names, weight_only_layer_names):
        assert names_of(modules["vae_encoder"]) == []

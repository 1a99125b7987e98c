"""The ladder over a model whose text encoder and decoder are quantized."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from quest_deploy.config import ExportConfig, FinetuneConfig, ParityConfig
from quest_deploy.export.to_onnx import export
from quest_deploy.parity import compare
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.recipe import load_recipe


@pytest.mark.slow  # half a minute, most of it calibrating; codes of each component are compared in tests/export
def test_codes_of_every_quantized_component_are_counted(
    tmp_path: Path, tiny_model: Path, tiny_recipe: Path
) -> None:
    recipe = dataclasses.replace(load_recipe(str(tiny_recipe)), text_encoder="w8a8", vae_decoder="w8a8")
    finetune(tiny_model, tmp_path / "checkpoint", FinetuneConfig(recipe=recipe, prompts=("rocket", "pizza")))
    export(tmp_path / "checkpoint", tmp_path / "onnx", ExportConfig())
    config = ParityConfig(num_prompts=2, steps=2)
    result = compare(
        tiny_model, tmp_path / "onnx", tmp_path / "parity", config, via=[tmp_path / "checkpoint"]
    )
    codes = result.report["edges"][1]["codes"]
    layers = {layer["layer"].partition(".")[0] for layer in codes["layers"]}
    assert {"text_encoder", "vae_decoder"} < layers
    assert codes["companions_snr_db"].keys() == {"text_encoder", "vae_decoder"}
    gates = {gate.quantity: gate for gate in result.gates if gate.rung == "onnx"}
    assert gates["text encoder SNR"].passed and gates["VAE decoder SNR"].passed
    assert codes["max_difference"] <= 1

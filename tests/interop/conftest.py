"""Exports of the bundled model that other tools are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from quest_deploy.config import ExportConfig, FinetuneConfig
from quest_deploy.export.to_onnx import export
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.recipe import load_recipe

BITS = {"w8a8": (8, 8), "w4a8": (4, 8)}


def make_export(folder: Path, model: Path, kind: str) -> Path:
    """The model as ONNX for ONNX Runtime: "fp32", or quantized by a recipe that takes seconds."""
    if kind == "fp32":
        export(model, folder / "onnx", ExportConfig(mode="none"))
        return folder / "onnx"
    weight_bits, activation_bits = BITS[kind]
    phase = "{layers: all, steps: 1, batch_size: 1}"
    (folder / "recipe.yaml").write_text(
        f"weight_bits: {weight_bits}\nactivation_bits: {activation_bits}\ncalibration_prompts: 2\n"
        f"validation_prompts: 1\ncalibration_steps: 2\ntemporal: {phase}\nsensitive: {phase}\n"
    )
    recipe = load_recipe(str(folder / "recipe.yaml"))
    finetune(model, folder / "checkpoint", FinetuneConfig(recipe=recipe, prompts=("rocket", "pizza")))
    export(folder / "checkpoint", folder / "onnx", ExportConfig())
    return folder / "onnx"


@pytest.fixture(scope="session", params=["fp32", *BITS])
def reference_onnx(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, reference_model: Path
) -> Path:
    """The bundled model as ONNX."""
    return make_export(tmp_path_factory.mktemp(request.param), reference_model, request.param)

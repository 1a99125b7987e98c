"""The ladder on the bundled model, end to end."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from quest_deploy.config import ParityConfig
from quest_deploy.parity import compare

REFERENCE_MODEL = Path(__file__).parents[2] / "reference-model" / "pipeline"


def test_the_reference_model_agrees_with_itself_in_torch(tmp_path: Path) -> None:
    config = ParityConfig(num_prompts=2, steps=3)
    result = compare(REFERENCE_MODEL, REFERENCE_MODEL, tmp_path / "parity", config)
    assert result.verdict == "passed"
    assert result.report["rungs"][1]["against_reference"]["image_psnr_db"]["mean"] == "identical"
    assert len(result.report["timesteps"]) == 3 and len(result.report["prompts"]) == 2


def test_a_reference_model_with_one_changed_weight_fails(tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(REFERENCE_MODEL, damaged)
    weights = load_file(damaged / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"] = weights["conv_out.bias"] + 0.05
    save_file(weights, damaged / "unet" / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    result = compare(REFERENCE_MODEL, damaged, tmp_path / "parity", ParityConfig(num_prompts=2, steps=3))
    gates = {gate.quantity: gate for gate in result.gates}
    assert not result and gates["noise SNR, worst step"].passed is False
    assert gates["text encoder SNR"].measured == math.inf

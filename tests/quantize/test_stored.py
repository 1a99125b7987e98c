"""Checkpoints that earlier versions really wrote are read as they were meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quest_deploy.artifacts import write_artifact
from quest_deploy.manifest import QUANTIZATION_NAME
from quest_deploy.metrics import snr_db
from quest_deploy.quantize.checkpoint import WEIGHTS, load_checkpoint

STORED = Path(__file__).parent / "stored"
# The same products on another processor differ in the last bit, which moves a value to the next code now and then.
LEAST_SNR_DB = 40.0


@pytest.mark.parametrize("version", [1, 2, 3])
def test_a_denoiser_of_an_earlier_version_answers_as_it_did(
    version: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    stored = STORED / str(version)
    assert json.loads((stored / QUANTIZATION_NAME).read_text())["schema_version"] == version
    with write_artifact(tmp_path / "checkpoint", stage="checkpoint", config={}) as writer:
        shutil.copytree(
            tiny_checkpoint, writer.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json")
        )
        shutil.copy(stored / QUANTIZATION_NAME, writer.path)
        for name in ("config.json", WEIGHTS):
            shutil.copy(stored / name, writer.path / "unet")
    denoiser = load_checkpoint(tmp_path / "checkpoint").denoiser
    torch.manual_seed(0)
    answers = load_file(stored / "answers.safetensors")
    for timestep in sorted(answers, key=float):
        sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 16)
        with torch.no_grad():
            got = denoiser(sample, torch.tensor(float(timestep)), encoder_hidden_states=text).sample
        assert snr_db(answers[timestep], got).min() >= LEAST_SNR_DB

"""Checkpoints that earlier versions really wrote are read as they were meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from quest_deploy.artifacts import read_manifest, write_artifact
from quest_deploy.commands.inspect import summarize_layers
from quest_deploy.config import ExportConfig, ParityConfig
from quest_deploy.export.to_onnx import export
from quest_deploy.manifest import QUANTIZATION_NAME
from quest_deploy.metrics import snr_db
from quest_deploy.parity import compare
from quest_deploy.quantize.checkpoint import WEIGHTS, load_checkpoint

STORED = Path(__file__).parent / "stored"
# The same products on another processor differ in the last bit, which moves a value to the next code now and then.
LEAST_SNR_DB = 40.0


@pytest.fixture(params=[1, 2, 3])
def stored(request: pytest.FixtureRequest) -> Path:
    """A denoiser of that version of ``quest.json``, and what it answered."""
    return STORED / str(request.param)


@pytest.fixture
def checkpoint(stored: Path, tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint of the tiny model with that denoiser."""
    summary = json.loads((stored / QUANTIZATION_NAME).read_text())
    assert summary["schema_version"] == int(stored.name)
    inputs, config = read_manifest(tiny_checkpoint).inputs, {"recipe": summary["recipe"]}
    with write_artifact(tmp_path / "checkpoint", stage="checkpoint", config=config, inputs=inputs) as writer:
        shutil.copytree(
            tiny_checkpoint, writer.path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json")
        )
        shutil.copy(stored / QUANTIZATION_NAME, writer.path)
        for name in ("config.json", WEIGHTS):
            shutil.copy(stored / name, writer.path / "unet")
    return tmp_path / "checkpoint"


def test_a_denoiser_of_an_earlier_version_answers_as_it_did(stored: Path, checkpoint: Path) -> None:
    denoiser = load_checkpoint(checkpoint).denoiser
    torch.manual_seed(0)
    answers = load_file(stored / "answers.safetensors")
    for timestep in sorted(answers, key=float):
        sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, 16)
        with torch.no_grad():
            got = denoiser(sample, torch.tensor(float(timestep)), encoder_hidden_states=text).sample
        assert snr_db(answers[timestep], got).min() >= LEAST_SNR_DB


# Version 3 has all that version 2 had.
@pytest.mark.parametrize("stored", [1, 3], indirect=True)
@pytest.mark.thorough
def test_a_checkpoint_of_an_earlier_version_is_exported_and_draws_the_same(
    checkpoint: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert summarize_layers(checkpoint / QUANTIZATION_NAME)["timestep_groups"] == 3
    export(checkpoint, tmp_path / "onnx", ExportConfig())
    config = ParityConfig(num_prompts=1, steps=2)
    result = compare(tiny_model, tmp_path / "onnx", tmp_path / "parity", config, via=(checkpoint,))
    assert result

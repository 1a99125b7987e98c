"""Parity looks at every component of a family: each one damaged alone fails."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quest_deploy.config import ParityConfig
from quest_deploy.parity import compare

CONFIG = ParityConfig(num_prompts=2, steps=2, batch_size=2)
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# kind, folder of the component, which of its tensors (by the start of their names), and what tells.
DAMAGES = [
    ("sdxl", "text_encoder_2", "text_projection", "text encoder SNR"),
    ("flux-dev", "text_encoder", "", "text encoder SNR"),
    ("inpaint", "vae", "encoder.", "VAE encoder SNR"),
    ("controlnet", "controlnet", "controlnet_cond_embedding.", "noise SNR, worst step"),
]


def damaged(source: Path, folder: str, start: str, target: Path) -> Path:
    """A copy whose component has other numbers in the tensors whose names begin with `start`."""
    shutil.copytree(source, target)
    (file,) = (target / folder).glob("*.safetensors")
    generator = torch.Generator().manual_seed(0)
    tensors = load_file(file)
    chosen = [name for name, value in tensors.items() if name.startswith(start) and value.dtype in FLOATS]
    assert chosen
    for name in chosen:
        value = tensors[name]
        tensors[name] = torch.randn(value.shape, generator=generator).to(value.dtype) * 0.3
    save_file(tensors, file, {"format": "pt"})
    return target


@pytest.mark.parametrize(("kind", "folder", "start", "quantity"), DAMAGES, ids=[case[0] for case in DAMAGES])
def test_a_damaged_component_fails(
    model_of: Callable[[str], Path], tmp_path: Path, kind: str, folder: str, start: str, quantity: str
) -> None:
    model = model_of(kind)
    bad = damaged(model, folder, start, tmp_path / "bad")
    result = compare(model, bad, tmp_path / "report", CONFIG)
    assert result.verdict == "failed"
    failed = {gate.quantity for gate in result.gates if gate.passed is False}
    assert quantity in failed
    if "encoder" in quantity:
        # The denoiser is given the upper rung's embeddings, and draws what it drew.
        assert not any("noise" in one for one in failed)


@pytest.mark.parametrize("kind", [case[0] for case in DAMAGES])
def test_the_same_model_passes(model_of: Callable[[str], Path], tmp_path: Path, kind: str) -> None:
    same = shutil.copytree(model_of(kind), tmp_path / "same")
    result = compare(model_of(kind), same, tmp_path / "report", CONFIG)
    assert result.verdict == "passed"
    assert ("VAE encoder SNR" in {gate.quantity for gate in result.gates}) == (kind == "inpaint")

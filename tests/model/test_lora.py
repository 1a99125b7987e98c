"""LoRAs merged into a model before it is quantized."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quest_deploy.config import LoraConfig
from quest_deploy.errors import ConfigError, MissingDependencyError, ModelLoadError
from quest_deploy.model import lora
from quest_deploy.model.load import load_model
from quest_deploy.model.lora import merge_loras

TARGET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra lora")


def write(path: Path, name: str, layer: torch.nn.Module, rank: int = 2) -> torch.Tensor:
    """A LoRA of one linear layer, by its name in the file; returns what it adds to the weight."""
    rows, columns = layer.weight.shape
    down, up = torch.randn(rank, columns), torch.randn(rows, rank)
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, path)
    return up @ down


@needs_peft
def test_a_lora_is_added_times_its_scale(tiny_model: Path, tmp_path: Path) -> None:
    model = load_model(tiny_model)
    before = model.denoiser.get_submodule(TARGET).weight.clone()
    path = tmp_path / "style.safetensors"
    change = write(path, f"unet.{TARGET}", model.denoiser.get_submodule(TARGET))
    merge_loras(model, [LoraConfig(file=str(path), scale=0.5)])
    got = model.denoiser.get_submodule(TARGET).weight
    torch.testing.assert_close(got, before + 0.5 * change, rtol=1e-5, atol=1e-6)
    assert type(model.denoiser.get_submodule(TARGET)) is torch.nn.Linear
    assert not any(p.requires_grad for p in model.denoiser.parameters())


@needs_peft
def test_a_lora_of_another_model_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write(path, "unet.no.such.layer", torch.nn.Linear(4, 4))
    with pytest.raises(
        ModelLoadError, match=r"other\.safetensors: (is no LoRA|changes no weight) of this model"
    ):
        merge_loras(load_model(tiny_model), [LoraConfig(file=str(path))])


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'quest-deploy\[lora\]'"):
        merge_loras(load_model(tiny_model), [LoraConfig(file="style.safetensors")])


@pytest.mark.parametrize("name", ["style.pt", "style.ckpt", "style"])
def test_only_safetensors_are_read(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a \.safetensors file"):
        LoraConfig(file=name)

"""LoRAs merged into models of other kinds than Stable Diffusion 1."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quest_deploy.config import LoraConfig
from quest_deploy.errors import ConfigError, ModelLoadError
from quest_deploy.model.load import LoadedModel, load_model
from quest_deploy.model.lora import merge_loras

needs_peft = pytest.mark.skipif(importlib.util.find_spec("peft") is None, reason="needs the extra lora")
# The parts into which diffusers loads a LoRA, and an attention layer of each.
PARTS = {
    "sd2": ("unet", "text_encoder"),
    "lcm": ("unet", "text_encoder"),
    "inpaint": ("unet", "text_encoder"),
    "controlnet": ("unet", "text_encoder"),
    "sdxl": ("unet", "text_encoder", "text_encoder_2"),
    "sdxl-refiner": ("unet", "text_encoder_2"),
    "sd3": ("transformer", "text_encoder", "text_encoder_2"),
    "flux-dev": ("transformer", "text_encoder"),
    "sana": ("transformer",),
}


@needs_peft
@pytest.mark.parametrize("kind", PARTS)
def test_every_part_that_takes_a_lora_gets_it(
    model_of: Callable[[str], Path], tmp_path: Path, kind: str
) -> None:
    model, path = load_model(model_of(kind)), tmp_path / "style.safetensors"
    parts = {**model.text_encoders, model.family.denoiser: model.denoiser}
    tensors, wanted = {}, {}
    for part in PARTS[kind]:
        names = [name for name, _ in parts[part].named_modules() if name.endswith(("to_q", "q_proj"))]
        weight = parts[part].get_submodule(names[0]).weight
        down, up = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
        tensors[f"{part}.{names[0]}.lora_A.weight"] = down
        tensors[f"{part}.{names[0]}.lora_B.weight"] = up
        wanted[part, names[0]] = weight + 0.5 * up @ down
    save_file(tensors, path)
    changed = merge_loras(model, [LoraConfig(file=str(path), scale=0.5)])
    assert changed == set(PARTS[kind])
    for (part, name), weight in wanted.items():
        torch.testing.assert_close(parts[part].get_submodule(name).weight, weight, rtol=1e-5, atol=1e-6)


def flux_lora(model: LoadedModel, path: Path, **others: torch.Tensor) -> LoraConfig:
    """A LoRA of one layer of the transformer, with other tensors beside it."""
    name = "transformer_blocks.0.attn.to_q"
    weight = model.denoiser.get_submodule(name).weight
    tensors = {"lora_A": torch.randn(2, weight.shape[1]), "lora_B": torch.randn(weight.shape[0], 2)}
    own = {f"transformer.{name}.{which}.weight": tensor for which, tensor in tensors.items()}
    save_file(own | others, path)
    return LoraConfig(file=str(path))


@needs_peft
def test_norms_that_a_lora_brings_stay(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(model_of("flux-dev"))
    name = "transformer_blocks.0.attn.norm_q.weight"
    wanted = torch.full_like(model.denoiser.get_parameter(name), 3.0)
    merge_loras(model, [flux_lora(model, tmp_path / "norms.safetensors", **{f"transformer.{name}": wanted})])
    assert torch.equal(model.denoiser.get_parameter(name), wanted)


@needs_peft
def test_a_lora_that_widens_the_model_is_refused(model_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(model_of("flux-dev"))
    rows, columns = model.denoiser.get_submodule("x_embedder").weight.shape
    wide = {"lora_A": torch.randn(2, 2 * columns), "lora_B": torch.randn(rows, 2)}
    others = {f"transformer.x_embedder.{which}.weight": tensor for which, tensor in wide.items()}
    lora = flux_lora(model, tmp_path / "control.safetensors", **others)
    with pytest.raises(
        ModelLoadError, match=r"makes 'x_embedder.weight' \[\d+, 32\], .* leaves the model's inputs"
    ):
        merge_loras(model, [lora])


@needs_peft
@pytest.mark.parametrize("kind", ["pixart-sigma", "dit"])
def test_a_pipeline_that_takes_none_says_so(model_of: Callable[[str], Path], kind: str) -> None:
    with pytest.raises(ConfigError, match=r"diffusers loads no LoRA into a \w+; leave --lora out"):
        merge_loras(load_model(model_of(kind)), [LoraConfig(file="style.safetensors")])

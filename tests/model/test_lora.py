"""LoRAs merged into a model before it is quantized."""

from __future__ import annotations

import dataclasses
import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from quest_deploy.config import FinetuneConfig, LoraConfig, PhaseConfig
from quest_deploy.errors import ConfigError, MissingDependencyError, ModelLoadError
from quest_deploy.model import lora
from quest_deploy.model.load import LoadedModel, load_model
from quest_deploy.model.lora import merge_loras
from quest_deploy.quantize.estimate import estimate
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.recipe import load_recipe

TARGET = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
WORDS = tuple(f"encoder.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1"))
LAYERS = (("unet", TARGET), *(("text_encoder", name) for name in WORDS))
TOKENS = torch.tensor([[0, 5, 9, 1]])
LATENTS = torch.linspace(-1, 1, 4 * 64).reshape(1, 4, 8, 8)
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


def down_and_up(layer: torch.nn.Module, rank: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """The two matrices of a LoRA of one linear layer."""
    rows, columns = layer.weight.shape
    return torch.randn(rank, columns), torch.randn(rows, rank)


def peft_file(path: Path, model: LoadedModel) -> None:
    """A LoRA of a U-Net and its text encoder as diffusers and peft write one."""
    tensors = {}
    for component, layer in LAYERS:
        down, up = down_and_up(_part(model, component).get_submodule(layer))
        prefix = "" if component == "unet" else "text_model."
        tensors[f"{component}.{prefix}{layer}.lora_A.weight"] = down
        tensors[f"{component}.{prefix}{layer}.lora_B.weight"] = up
    save_file(tensors, path)


def kohya_file(path: Path, model: LoadedModel) -> None:
    """The same as kohya's scripts write one, with alpha half the rank."""
    tensors = {}
    for component, layer in LAYERS:
        down, up = down_and_up(_part(model, component).get_submodule(layer))
        short = "unet" if component == "unet" else "te_text_model"
        name = f"lora_{short}_{layer.replace('.', '_')}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(tensors, path)


def _part(model: LoadedModel, name: str) -> torch.nn.Module:
    return model.denoiser if name == model.family.denoiser else model.text_encoders[name]


@needs_peft
@pytest.mark.parametrize("write_file", [peft_file, kohya_file])
def test_outputs_are_those_of_diffusers_with_the_lora(
    tiny_model: Path, tmp_path: Path, write_file: Callable[[Path, LoadedModel], None]
) -> None:
    model, path = load_model(tiny_model), tmp_path / "style.safetensors"
    write_file(path, model)
    bare = model.text_encoder(TOKENS).last_hidden_state
    merge_loras(model, [LoraConfig(file=str(path), scale=0.5)])

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_model)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    # Beside the weights, not added to them.
    pipeline.set_adapters(pipeline.get_active_adapters(), 0.5)
    with torch.no_grad():
        wanted = pipeline.text_encoder(TOKENS).last_hidden_state
        drawn = pipeline.unet(LATENTS, 500, wanted).sample
        got = model.text_encoder(TOKENS).last_hidden_state
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model.denoiser(LATENTS, 500, got).sample, drawn, rtol=1e-4, atol=1e-5)
    assert (got - bare).abs().max() > 0.01


@needs_peft
def test_a_checkpoint_has_the_merged_text_encoder(
    tiny_model: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    path = tmp_path / "style.safetensors"
    merged = load_model(tiny_model)
    peft_file(path, merged)
    lora = LoraConfig(file=str(path))
    merge_loras(merged, [lora])
    recipe = load_recipe(str(tiny_recipe))
    finetune(
        tiny_model,
        tmp_path / "checkpoint",
        FinetuneConfig(recipe=recipe, prompts=("rocket", "pizza"), loras=(lora,)),
    )
    written = CLIPTextModel.from_pretrained(tmp_path / "checkpoint" / "text_encoder")
    for name, value in merged.text_encoder.state_dict().items():
        torch.testing.assert_close(written.state_dict()[name], value, rtol=0, atol=0)


@needs_peft
def test_what_a_lora_does_not_change_is_carried_as_it_lies_on_disk(
    tiny_model: Path, tiny_recipe: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    file = model / "text_encoder" / "model.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file, {"format": "pt"})
    path = tmp_path / "style.safetensors"
    write(path, f"unet.{TARGET}", load_model(model).denoiser.get_submodule(TARGET))
    none = PhaseConfig(layers="none", steps=0)
    recipe = dataclasses.replace(
        load_recipe(str(tiny_recipe)), initializer="nearest", temporal=none, sensitive=none
    )
    lora = LoraConfig(file=str(path))
    finetune(model, tmp_path / "checkpoint", FinetuneConfig(recipe=recipe, prompts=("a", "b"), loras=(lora,)))
    assert (tmp_path / "checkpoint" / "text_encoder" / file.name).read_bytes() == file.read_bytes()


@needs_peft
@pytest.mark.thorough
def test_the_size_of_what_a_lora_changes_is_told(tiny_model: Path, tiny_recipe: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    file, path = model / "text_encoder" / "model.safetensors", tmp_path / "style.safetensors"
    save_file({name: value.half() for name, value in load_file(file).items()}, file, {"format": "pt"})
    peft_file(path, load_model(model))
    config = FinetuneConfig(recipe=load_recipe(str(tiny_recipe)), prompts=("rocket", "pizza"))
    loras = (LoraConfig(file=str(path)),)
    without, merged = (
        estimate(model, one)[0][-1] for one in (config, dataclasses.replace(config, loras=loras))
    )
    # It is written in float32.
    assert merged.disk_bytes - without.disk_bytes == pytest.approx(file.stat().st_size, rel=0.1)


@needs_peft
@pytest.mark.parametrize("tensors", [{"unet.no.such.layer": (4, 4)}, {"something.else": (4, 4)}])
def test_a_lora_of_another_model_is_refused(
    tiny_model: Path, tmp_path: Path, tensors: dict[str, tuple[int, int]]
) -> None:
    path = tmp_path / "other.safetensors"
    for name, shape in tensors.items():
        write(path, name, torch.nn.Linear(*shape))
    with pytest.raises(
        ModelLoadError, match=r"other\.safetensors: (is no LoRA|changes no weight) of this model"
    ):
        merge_loras(load_model(tiny_model), [LoraConfig(file=str(path))])


@needs_peft
def test_a_lora_of_a_wider_model_is_refused_by_the_tensor(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    write(path, f"unet.{TARGET}", torch.nn.Linear(320, 320))
    with pytest.raises(ModelLoadError, match=r"wide\.safetensors: is no LoRA .*size mismatch for \S*to_q"):
        merge_loras(load_model(tiny_model), [LoraConfig(file=str(path))])


@needs_peft
def test_a_pickle_by_another_name_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "pickled.safetensors"
    torch.save({"unet.x.lora_A.weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ModelLoadError, match=r"pickled\.safetensors: is no safetensors file"):
        merge_loras(load_model(tiny_model), [LoraConfig(file=str(path))])


@needs_peft
def test_layers_that_the_model_lacks_are_told_of(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = load_model(tiny_model), tmp_path / "mixed.safetensors"
    down, up = down_and_up(model.denoiser.get_submodule(TARGET))
    names = (f"unet.{TARGET}", "unet.no.such.layer")
    tensors = {f"{name}.lora_A.weight": down.clone() for name in names}
    tensors |= {f"{name}.lora_B.weight": up.clone() for name in names}
    save_file(tensors, path)
    merge_loras(model, [LoraConfig(file=str(path))])
    assert "1 of its 2 layers are none of this model's" in caplog.text


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setattr(lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'quest-deploy\[lora\]'"):
        merge_loras(load_model(tiny_model), [LoraConfig(file="style.safetensors")])


@pytest.mark.parametrize("name", ["style.pt", "style.ckpt", "style"])
def test_only_safetensors_are_read(name: str) -> None:
    with pytest.raises(ConfigError, match=r"expected a \.safetensors file"):
        LoraConfig(file=name)

"""Checkpoints: what comes back is what was saved, bit for bit, and what is broken is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quest_deploy.artifacts import write_artifact
from quest_deploy.errors import ArtifactError, StaleArtifactError
from quest_deploy.manifest import QUANTIZATION_NAME
from quest_deploy.model.carried import copy_part
from quest_deploy.model.components import predict
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.checkpoint import (
    freeze,
    load_checkpoint,
    save_checkpoint,
)
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.recipe import load_recipe

WEIGHTS = "unet/quest.safetensors"
Make = Callable[[int, int], tuple[nn.Module, TimestepContext]]
Save = Callable[..., tuple[Path, nn.Module]]


@pytest.fixture
def save(tmp_path: Path, float_model: LoadedModel, quantize_tiny: Make) -> Save:
    """Writes a checkpoint of the tiny model, and gives the denoiser that it holds."""

    def make(weight_bits: int = 4, activation_bits: int = 4) -> tuple[Path, nn.Module]:
        denoiser, context = quantize_tiny(weight_bits, activation_bits)
        # A row of its own for one layer, as recipes below 8 bits make.
        layer = quantized_layers(denoiser)["time_embedding.linear_2"]
        row = torch.linspace(0.5, 2.0, layer.weight.shape[1])
        layer.quantizer.row, layer.quantizer.inverse_row = row, 1 / row
        freeze(denoiser)
        path = tmp_path / "checkpoint"
        with write_artifact(path, stage="checkpoint", config={}) as writer:
            save_checkpoint(
                writer.path,
                float_model,
                denoiser,
                recipe=load_recipe("w4a4"),
                activation_bits=dict.fromkeys(quantized_layers(denoiser), activation_bits),
                context=context,
                history={},
            )
        return path, denoiser

    return make


@pytest.fixture
def damaged(tmp_path: Path, save: Save) -> Callable[[Callable[[Path], object]], Path]:
    """A checkpoint with an edit that its manifest vouches for."""
    return lambda edit: edited(save()[0], tmp_path / "damaged", edit)


def edited(source: Path, path: Path, edit: Callable[[Path], object]) -> Path:
    with write_artifact(path, stage="checkpoint", config={}) as writer:
        shutil.copytree(source, writer.path, dirs_exist_ok=True)
        (writer.path / "manifest.json").unlink()
        edit(writer.path)
    return path


def answer(denoiser: nn.Module, data: CalibrationSet) -> Tensor:
    sample, timestep, conditioning, _ = data.batch(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 2]))
    with torch.no_grad():
        return predict(denoiser, sample, timestep, conditioning)


@pytest.mark.parametrize(
    ("weight_bits", "activation_bits"), [(8, 8), (4, 8), (4, 4)], ids=["W8A8", "W4A8", "W4A4"]
)
def test_a_checkpoint_answers_as_the_denoiser_that_was_saved(
    save: Save, recorded: CalibrationSet, weight_bits: int, activation_bits: int
) -> None:
    path, denoiser = save(weight_bits, activation_bits)
    assert torch.equal(answer(load_checkpoint(path).denoiser, recorded), answer(denoiser, recorded))


def test_saving_twice_gives_the_same_bytes(save: Save) -> None:
    path, _ = save()
    first = {file: (path / file).read_bytes() for file in (WEIGHTS, QUANTIZATION_NAME, "unet/config.json")}
    shutil.rmtree(path)
    save()
    assert all((path / file).read_bytes() == content for file, content in first.items())


def test_no_file_names_the_place_that_the_model_came_from(save: Save, float_model: LoadedModel) -> None:
    path, _ = save()
    for file in path.rglob("*.json"):
        assert str(float_model.path) not in file.read_text()


def test_four_bit_weights_take_half_a_byte(save: Save) -> None:
    path, denoiser = save()
    tensors = load_file(path / WEIGHTS)
    layer = quantized_layers(denoiser)["down_blocks.0.resnets.0.conv1"]
    stored = tensors["down_blocks.0.resnets.0.conv1.codes"]
    assert stored.numel() * stored.element_size() == layer.codes.numel() // 2


def test_a_checkpoint_stands_on_its_own(save: Save, float_model: LoadedModel) -> None:
    path, _ = save()
    loaded = load_checkpoint(path)
    for name in ("text_encoder", "vae"):
        expected = getattr(float_model, name).state_dict()
        got = getattr(loaded, name).state_dict()
        assert all(torch.equal(got[key], value) for key, value in expected.items())
    assert loaded.scheduler.config == float_model.scheduler.config


def test_the_summary_tells_the_bits_of_each_layer(save: Save) -> None:
    path, denoiser = save()
    layers = json.loads((path / QUANTIZATION_NAME).read_text())["layers"]
    assert layers.keys() == quantized_layers(denoiser).keys()
    entry = layers["time_embedding.linear_2"]
    assert (entry["kind"], entry["weight_bits"], entry["groups"]) == ("Linear", 4, 3)
    assert entry["channel_wise"]
    assert not layers["conv_in"]["channel_wise"]


def drop(tensor: str) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        del tensors[tensor]
        save_file(tensors, path / WEIGHTS)

    return edit


def add_tensor(path: Path) -> None:
    save_file(load_file(path / WEIGHTS) | {"rest.surplus": torch.ones(1)}, path / WEIGHTS)


def rewrite(**changes: object) -> Callable[[Path], object]:
    def edit(path: Path) -> None:
        (path / QUANTIZATION_NAME).write_text(
            json.dumps(json.loads((path / QUANTIZATION_NAME).read_text()) | changes)
        )

    return edit


def cut(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-100])


@pytest.mark.parametrize(
    "tensor",
    [
        "conv_in.codes",
        "conv_in.weight_scale",
        "conv_in.group_scale",
        "conv_in.bias",
        "time_embedding.linear_2.row",
        "rest.conv_norm_out.weight",
    ],
)
def test_a_missing_tensor_is_refused_by_name(damaged: Callable, tensor: str) -> None:
    path = damaged(drop(tensor))
    with pytest.raises(ArtifactError, match=f"not a complete checkpoint .*{tensor.removeprefix('rest.')}"):
        load_checkpoint(path)


def test_a_surplus_tensor_is_refused_by_name(damaged: Callable) -> None:
    path = damaged(add_tensor)
    with pytest.raises(ArtifactError, match="unexpected: .*surplus"):
        load_checkpoint(path)


def test_codes_of_another_shape_are_refused(damaged: Callable) -> None:
    def edit(path: Path) -> None:
        tensors = load_file(path / WEIGHTS)
        tensors["conv_in.codes"] = tensors["conv_in.codes"][:2].clone()
        save_file(tensors, path / WEIGHTS)

    path = damaged(edit)
    with pytest.raises(ArtifactError, match=r"'conv_in' has codes \[2, 4, 3, 3\], expected \[8, 4"):
        load_checkpoint(path)


def test_a_truncated_weight_file_is_refused_even_where_the_manifest_vouches_for_it(damaged: Callable) -> None:
    path = damaged(cut)
    with pytest.raises(ArtifactError, match="is not a complete checkpoint"):
        load_checkpoint(path)


def test_a_weight_file_truncated_later_is_refused_as_such(save: Save) -> None:
    path, _ = save()
    cut(path)
    with pytest.raises(ArtifactError, match=f"{WEIGHTS} is truncated"):
        load_checkpoint(path)


def test_another_schema_version_is_refused(damaged: Callable) -> None:
    path = damaged(rewrite(schema_version=99))
    with pytest.raises(
        StaleArtifactError, match="schema version 99, expected 1 or 2 or 3 or 4; finetune the model again"
    ):
        load_checkpoint(path)


def test_a_summary_without_layers_is_refused(damaged: Callable) -> None:
    path = damaged(rewrite(layers=None))
    with pytest.raises(ArtifactError, match="is not a complete checkpoint"):
        load_checkpoint(path)


def test_a_layer_that_the_model_lacks_is_refused(damaged: Callable) -> None:
    def edit(path: Path) -> None:
        summary = json.loads((path / QUANTIZATION_NAME).read_text())
        summary["layers"]["conv_inn"] = summary["layers"]["conv_in"]
        (path / QUANTIZATION_NAME).write_text(json.dumps(summary))

    path = damaged(edit)
    with pytest.raises(ArtifactError, match="is not a complete checkpoint .*conv_inn"):
        load_checkpoint(path)


def test_tokenizers_of_sentencepiece_are_carried_and_pickles_are_not(tmp_path: Path) -> None:
    (tmp_path / "tokenizer").mkdir()
    for name in ("spiece.model", "tokenizer_config.json", "merges.txt", "pytorch_model.bin", ".cache"):
        (tmp_path / "tokenizer" / name).touch()
    copy_part(tmp_path / "tokenizer", tmp_path / "copy", "transformers")
    kept = sorted(file.name for file in (tmp_path / "copy").iterdir())
    assert kept == ["merges.txt", "spiece.model", "tokenizer_config.json"]


def test_codes_can_be_read_by_whoever_reads_the_rest(tiny_checkpoint: Path) -> None:
    modes = {
        (tiny_checkpoint / "unet" / name).stat().st_mode for name in ("quest.safetensors", "config.json")
    }
    assert len(modes) == 1

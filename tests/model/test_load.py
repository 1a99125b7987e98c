"""A model is loaded whole or not at all: what a file lacks is never made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quest_deploy.errors import ArtifactError, ModelLoadError
from quest_deploy.model.load import load_model

WEIGHTS = {
    "text_encoder": "model.safetensors",
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
components = pytest.mark.parametrize("component", WEIGHTS)


@pytest.fixture
def model(tmp_path: Path, tiny_model: Path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def change(model: Path, component: str, edit: Callable[[dict[str, torch.Tensor], str], object]) -> str:
    """Edit the weights of a component around one tensor, whose name is returned."""
    file = model / component / WEIGHTS[component]
    tensors = load_file(file)
    name = sorted(tensors)[4]
    edit(tensors, name)
    save_file(tensors, file, metadata={"format": "pt"})
    return name


def keep_tokenizer_files(model: Path, source: Path, names: tuple[str, ...]) -> None:
    """Leave the tokenizer these files of the source's alone."""
    shutil.rmtree(model / "tokenizer")
    (model / "tokenizer").mkdir()
    for name in names:
        shutil.copy(source / "tokenizer" / name, model / "tokenizer" / name)


@components
def test_a_missing_tensor_is_refused_by_name(model: Path, component: str) -> None:
    name = change(model, component, lambda tensors, name: tensors.pop(name))
    with pytest.raises(ModelLoadError, match=f"{component}: 1 tensors of the .* first is '{name}'"):
        load_model(model)


@components
def test_a_tensor_of_another_shape_is_refused_by_name(model: Path, component: str) -> None:
    name = change(model, component, lambda tensors, name: tensors.update({name: torch.ones(3, 7)}))
    with pytest.raises(ModelLoadError, match=name):
        load_model(model)


@components
def test_a_surplus_tensor_does_no_harm(model: Path, component: str) -> None:
    change(model, component, lambda tensors, name: tensors.update({"surplus": torch.ones(1)}))
    assert load_model(model).path == model


def test_every_stored_weight_arrives_in_float32(model: Path) -> None:
    stored = load_file(model / "unet" / WEIGHTS["unet"])
    save_file({k: v.half() for k, v in stored.items()}, model / "unet" / WEIGHTS["unet"])
    loaded = load_model(model).denoiser.state_dict()
    assert loaded.keys() == stored.keys()
    assert all(torch.equal(loaded[name], stored[name].half().float()) for name in stored)


def test_a_loaded_model_is_in_evaluation_mode_and_asks_for_no_gradient(tiny_model: Path) -> None:
    loaded = load_model(tiny_model)
    for module in (loaded.text_encoder, loaded.denoiser, loaded.vae):
        assert not module.training
        assert not any(parameter.requires_grad for parameter in module.parameters())


@pytest.mark.parametrize("entry", [None, ["my_package", "CLIPTextModel"], "CLIPTextModel"], ids=str)
def test_a_component_of_no_known_library_is_refused(model: Path, entry: object) -> None:
    index = model / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": entry}))
    with pytest.raises(ModelLoadError, match="'text_encoder' is .*, expected a class of diffusers"):
        load_model(model)


def test_a_class_that_the_library_lacks_is_refused(model: Path) -> None:
    index = model / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"unet": ["diffusers", "UNet9D"]}))
    with pytest.raises(ModelLoadError, match="the installed diffusers has no class 'UNet9D'"):
        load_model(model)


def test_a_pickled_component_is_refused(model: Path) -> None:
    file = model / "vae" / WEIGHTS["vae"]
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(ArtifactError, match="is a pickle"):
        load_model(model)


def test_a_part_that_is_missing_is_named_and_not_looked_for_on_the_hub(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`model/scheduler` would also be the id of a model there."""
    monkeypatch.chdir(model.parent)

    def ask(*args: object, **kwargs: object) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("socket.getaddrinfo", ask)
    shutil.rmtree(model / "scheduler")
    with pytest.raises(ArtifactError, match="^model/scheduler/scheduler_config.json: cannot be read"):
        load_model("model")


@pytest.mark.parametrize(
    ("kept", "missing"),
    [((), "vocab.json"), (("tokenizer_config.json",), "vocab.json"), (("vocab.json",), "merges.txt")],
    ids=str,
)
def test_a_tokenizer_that_knows_no_word_is_refused(
    model: Path, reference_model: Path, kept: tuple[str, ...], missing: str
) -> None:
    keep_tokenizer_files(model, reference_model, kept)
    with pytest.raises(ArtifactError, match=f"tokenizer/{missing}' is missing; restore"):
        load_model(model)


@pytest.mark.parametrize("kept", [("tokenizer.json",), ("vocab.json", "merges.txt")], ids=str)
def test_either_form_of_a_tokenizer_is_enough(
    model: Path, reference_model: Path, kept: tuple[str, ...]
) -> None:
    whole = load_model(model).tokenizer
    keep_tokenizer_files(model, reference_model, (*kept, "tokenizer_config.json"))
    assert load_model(model).tokenizer("a red heart").input_ids == whole("a red heart").input_ids


def test_a_tokenizer_without_a_length_is_refused(model: Path) -> None:
    file = model / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["model_max_length"]
    file.write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="the tokenizer has no length"):
        load_model(model)

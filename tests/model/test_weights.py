"""Which files hold a component's weights: those that its library loads, whatever else lies beside them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from quest_deploy.artifacts import stage_of
from quest_deploy.errors import ModelLoadError
from quest_deploy.model.carried import copy_part
from quest_deploy.model.deferred import deferred_tensors
from quest_deploy.model.load import load_model
from quest_deploy.model.spec import component_configs
from quest_deploy.model.weights import check_weights, stray_weights, weight_files

NAMES = {"diffusers": "diffusion_pytorch_model.safetensors", "transformers": "model.safetensors"}
STRAY = (
    "ema.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "zz-step-100.safetensors",
    "model.safetensors",
)


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model, tmp_path / "model")


def other_weights(file: Path, target: Path) -> None:
    """A file of the same names and shapes with other values."""
    save_file({name: torch.full_like(value, 7.0) for name, value in load_file(file).items()}, target)


def split_into_parts(file: Path, value: float | None = None) -> list[str]:
    """The tensors of `file` in two files with a list, beside it; all `value` where one is given."""
    tensors, stem = load_file(file), file.name.removesuffix(".safetensors")
    if value is not None:
        tensors = {name: torch.full_like(tensor, value) for name, tensor in tensors.items()}
    weight_map = {}
    for index, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2]), 1):
        part = f"{stem}-0000{index}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names}, file.with_name(part), {"format": "pt"})
        weight_map |= dict.fromkeys(names, part)
    listed = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(listed))
    return sorted(set(weight_map.values()))


def deferred_state(path: Path) -> dict[str, torch.Tensor]:
    """What export would write of the denoiser, autoencoder and text encoder."""
    model = load_model(path, deferred=True)
    state = {}
    for part in (model.denoiser, model.vae, model.text_encoder):
        assert part is not None
        names = {module: name for name, module in part.named_modules()}
        state |= {f"{type(part).__name__}.{name}": value for name, value in part.state_dict().items()}
        for (module, name), read in deferred_tensors(part).items():
            state[f"{type(part).__name__}.{names[module]}.{name}"] = read()
    return state


def theirs(path: Path) -> dict[str, torch.Tensor]:
    """The same, as diffusers loads it."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        path, safety_checker=None, requires_safety_checker=False
    )
    parts = (pipeline.unet, pipeline.vae, pipeline.text_encoder)
    return {
        f"{type(part).__name__}.{name}": value for part in parts for name, value in part.state_dict().items()
    }


def assert_same(path: Path) -> None:
    ours, expected = deferred_state(path), theirs(path)
    assert ours.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(ours[name], expected[name])] == []


@pytest.mark.parametrize("stray", STRAY)
def test_what_else_lies_in_a_denoisers_folder_is_not_read(copy: Path, stray: str) -> None:
    other_weights(copy / "unet" / NAMES["diffusers"], copy / "unet" / stray)
    assert_same(copy)


@pytest.mark.parametrize("folder", ["unet", "text_encoder"])
@pytest.mark.parametrize("both", [False, True], ids=["parts alone", "parts beside one file"])
def test_parts_count_where_the_library_has_them_count(copy: Path, folder: str, both: bool) -> None:
    file = copy / folder / NAMES["transformers" if folder == "text_encoder" else "diffusers"]
    split_into_parts(file, value=3.0)
    if not both:
        file.unlink()
    assert_same(copy)


def test_a_checkpoint_carries_what_the_library_loads(copy: Path, tmp_path: Path) -> None:
    vae, text = copy / "vae", copy / "text_encoder"
    for stray in STRAY:
        other_weights(vae / NAMES["diffusers"], vae / stray)
    parts = split_into_parts(text / NAMES["transformers"])
    copy_part(vae, tmp_path / "vae", "diffusers")
    copy_part(text, tmp_path / "text_encoder", "transformers")
    assert sorted(file.name for file in (tmp_path / "vae").iterdir()) == ["config.json", NAMES["diffusers"]]
    kept = sorted(file.name for file in (tmp_path / "text_encoder").iterdir())
    assert kept == ["config.json", NAMES["transformers"]]
    assert parts[0] in stray_weights(text, "transformers")
    expected = AutoencoderKL.from_pretrained(vae).state_dict()
    carried = AutoencoderKL.from_pretrained(tmp_path / "vae").state_dict()
    assert all(torch.equal(carried[name], value) for name, value in expected.items())


def test_parts_are_carried_with_their_list(copy: Path, tmp_path: Path) -> None:
    text = copy / "text_encoder"
    parts = split_into_parts(text / NAMES["transformers"])
    (text / NAMES["transformers"]).unlink()
    copy_part(text, tmp_path / "text", "transformers")
    assert {*parts, f"{NAMES['transformers']}.index.json"} <= {
        file.name for file in (tmp_path / "text").iterdir()
    }
    CLIPTextModel.from_pretrained(tmp_path / "text")


@pytest.mark.parametrize(
    ("present", "message"),
    [
        ((), "holds no diffusion_pytorch_model.safetensors; restore"),
        (("ema.safetensors",), "only ema.safetensors, which diffusers does not load"),
        (
            ("diffusion_pytorch_model.fp16.safetensors",),
            "holds diffusion_pytorch_model.fp16.safetensors, a variant",
        ),
        (
            ("diffusion_pytorch_model.fp16-00001-of-00002.safetensors",),
            "a variant, and no diffusion_pytorch_model",
        ),
    ],
)
def test_missing_weights_are_told_with_what_is_there(
    tmp_path: Path, present: tuple[str, ...], message: str
) -> None:
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(ModelLoadError, match=message):
        check_weights(tmp_path, "diffusers")


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../b.safetensors"}}',
        '{"weight_map": {"a": 1}}',
        "[]",
    ],
)
def test_a_list_of_parts_that_lists_none_in_its_folder_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / f"{NAMES['diffusers']}.index.json").write_text(content)
    with pytest.raises(ModelLoadError, match="lists no parts"):
        weight_files(tmp_path, "diffusers")


@pytest.mark.parametrize("folder", ["unet", "vae_decoder"])
def test_onnx_beside_weights_is_a_model_and_alone_it_is_onnx(copy: Path, folder: str) -> None:
    # Stable Diffusion XL has both on the hub.
    for graph in {folder, "unet"}:
        (copy / graph).mkdir(exist_ok=True)
        (copy / graph / "model.onnx").touch()
    assert stage_of(copy) == "model"
    for file in copy.glob("*/*.safetensors"):
        file.unlink()
    assert stage_of(copy) == "onnx"


def test_another_tools_export_beside_weights_does_not_configure_the_model(copy: Path) -> None:
    (copy / "vae_decoder").mkdir()
    (copy / "vae_decoder" / "model.onnx").touch()
    (copy / "vae_decoder" / "config.json").write_text('{"scaling_factor": 7.0}')
    expected = json.loads((copy / "vae" / "config.json").read_text())["scaling_factor"]
    assert component_configs(copy)["vae_decoder"]["scaling_factor"] == expected
    shutil.rmtree(copy / "vae")
    assert component_configs(copy)["vae_decoder"]["scaling_factor"] == 7.0

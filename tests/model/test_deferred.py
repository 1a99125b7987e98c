"""Weights that stay in their files: the same model, loaded, traced and run with less in memory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from quest_deploy.model import deferred
from quest_deploy.model.components import TextEncoder
from quest_deploy.model.deferred import (
    DEFERRED_BYTES,
    StoredFile,
    defer,
    deferred_tensors,
    fill,
    is_deferred,
    matching,
    stood_in,
    stored_tensors,
    streamed,
)
from quest_deploy.model.load import LoadedModel, load_model

REFERENCE = Path("reference-model") / "pipeline"
SIDE = 512
assert SIDE * SIDE * 4 >= DEFERRED_BYTES


@pytest.fixture(scope="module")
def whole() -> LoadedModel:
    return load_model(REFERENCE)


@pytest.fixture
def lazy() -> LoadedModel:
    return load_model(REFERENCE, deferred=True)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIDE, SIDE), nn.Linear(SIDE, 2))


def emptied(folder: Path) -> tuple[nn.Sequential, nn.Sequential]:
    """The same layers twice: in memory, and with the large weight in a file."""
    layers = two_layers()
    save_file(layers.state_dict(), folder / "model.safetensors")
    empty = two_layers().to("meta")
    stored = matching(empty, stored_tensors(folder, "transformers"))
    assert stored is not None
    fill(empty, stored)
    return layers, empty


def test_large_tensors_stay_in_the_file_and_small_ones_do_not(tmp_path: Path) -> None:
    _, empty = emptied(tmp_path)
    assert {(type(module), name) for module, name in deferred_tensors(empty)} == {(nn.Linear, "weight")}
    assert empty[0].weight.device.type == "meta"
    assert empty[1].weight.device.type == empty[0].bias.device.type == "cpu"
    assert is_deferred(empty)
    assert not is_deferred(empty[1])


def test_a_deferred_module_does_not_run_by_itself(tmp_path: Path) -> None:
    _, empty = emptied(tmp_path)
    with pytest.raises(RuntimeError, match="still in a file"):
        empty(torch.zeros(1, SIDE))


@torch.no_grad()
def test_streaming_reads_a_layer_at_a_time_and_gives_the_same(tmp_path: Path) -> None:
    layers, empty = emptied(tmp_path)
    x = torch.randn(3, SIDE, generator=torch.Generator().manual_seed(1))
    with streamed(empty):
        assert torch.equal(empty(x), layers(x))
        assert empty[0].weight.device.type == "meta"
    with pytest.raises(RuntimeError, match="still in a file"):
        empty(x)


@torch.no_grad()
def test_streaming_lets_go_of_weights_when_a_layer_fails(tmp_path: Path) -> None:
    _, empty = emptied(tmp_path)
    with streamed(empty), pytest.raises(RuntimeError):
        empty(torch.zeros(1, SIDE + 1))
    assert empty[0].weight.device.type == "meta"


def test_stand_ins_are_there_while_tracing_and_gone_after_it(tmp_path: Path) -> None:
    layers, empty = emptied(tmp_path)
    with stood_in(empty) as readers:
        weight = empty[0].weight
        assert (weight.device.type, weight.shape, weight.dtype) == ("cpu", (SIDE, SIDE), torch.float32)
        assert torch.equal(readers[weight.data_ptr()](), layers[0].weight)
    assert empty[0].weight.device.type == "meta"


def test_a_deferred_buffer_stays_a_buffer(tmp_path: Path) -> None:
    module = nn.Module()
    module.register_buffer("codes", torch.zeros(1, dtype=torch.int8))
    defer(module, "codes", (4,), torch.int8, lambda: torch.arange(4, dtype=torch.int8))
    with stood_in(module) as readers:
        assert [read().tolist() for read in readers.values()] == [[0, 1, 2, 3]]
    assert [name for name, _ in module.named_buffers()] == ["codes"]


def test_weights_that_another_module_reads_are_in_memory(tmp_path: Path) -> None:
    attention = nn.Sequential(nn.MultiheadAttention(SIDE, 2))
    save_file(attention.state_dict(), tmp_path / "model.safetensors")
    empty = nn.Sequential(nn.MultiheadAttention(SIDE, 2)).to("meta")
    stored = matching(empty, stored_tensors(tmp_path, "transformers"))
    assert stored is not None
    fill(empty, stored)
    assert not is_deferred(empty)
    assert torch.equal(empty[0].out_proj.weight, attention[0].out_proj.weight)


@pytest.mark.parametrize("change", ["missing", "shape"])
def test_what_does_not_match_is_left_to_the_library(tmp_path: Path, change: str) -> None:
    tensors = two_layers().state_dict()
    if change == "missing":
        del tensors["1.bias"]
    else:
        tensors["1.bias"] = torch.zeros(3)
    save_file(tensors, tmp_path / "model.safetensors")
    assert matching(two_layers().to("meta"), stored_tensors(tmp_path, "transformers")) is None


def test_a_common_prefix_is_found(tmp_path: Path) -> None:
    tensors = {f"text_model.{name}": value for name, value in two_layers().state_dict().items()}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = matching(two_layers().to("meta"), stored_tensors(tmp_path, "transformers"))
    assert stored is not None
    assert stored["0.weight"].key == "text_model.0.weight"


def test_parts_are_those_that_the_index_lists(tmp_path: Path) -> None:
    tensors = two_layers().state_dict()
    parts = {
        "model-00001-of-00002.safetensors": ["0.weight"],
        "model-00002-of-00002.safetensors": ["1.weight"],
    }
    for file, names in parts.items():
        save_file({name: tensors[name] for name in names}, tmp_path / file)
    save_file({"0.weight": torch.zeros(1)}, tmp_path / "model.fp16.safetensors")
    weight_map = {name: file for file, names in parts.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert {
        name: one.file.name for name, one in stored_tensors(tmp_path, "transformers").items()
    } == weight_map


def test_variants_are_not_mixed_with_the_model(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "model.fp16.safetensors")
    assert stored_tensors(tmp_path, "transformers")["a"].shape == (1,)


def test_a_stored_file_has_no_other_names(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    stored = StoredFile(tmp_path / "model.safetensors")
    assert list(stored) == ["a"]
    assert len(stored) == 1
    assert "b" not in stored
    for ask in (stored.__getitem__, stored.stored):
        with pytest.raises(KeyError):
            ask("b")


@torch.no_grad()
def test_the_reference_model_is_the_same_model(whole: LoadedModel, lazy: LoadedModel) -> None:
    assert is_deferred(lazy.denoiser)
    inputs = (torch.randn(1, 4, 16, 16), torch.tensor([500.0]), torch.randn(1, 16, 128))
    with streamed(lazy.denoiser):
        got = lazy.denoiser(*inputs).sample
    assert torch.equal(got, whole.denoiser(*inputs).sample)


@torch.no_grad()
def test_text_encoders_are_filled_under_the_names_of_their_files(
    whole: LoadedModel, lazy: LoadedModel
) -> None:
    outputs = [tensor.name for tensor in whole.specs["text_encoder"].outputs]
    tokens = torch.tensor([[1, 2, 3]])

    def answer(model: LoadedModel) -> Tensor:
        assert model.text_encoder is not None
        with streamed(model.text_encoder):
            return torch.cat([one.flatten() for one in TextEncoder(model.text_encoder, outputs)(tokens)])

    assert torch.equal(answer(lazy), answer(whole))


def test_weights_stored_in_half_precision_are_float32(tmp_path: Path) -> None:
    shutil.copytree(REFERENCE, tmp_path / "model")
    for file in (tmp_path / "model" / "text_encoder").glob("*.safetensors"):
        save_file({name: value.half() for name, value in load_file(file).items()}, file)
    config = tmp_path / "model" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "float16"}))
    encoder = load_model(tmp_path / "model", deferred=True).text_encoder
    assert encoder is not None
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert all(read().dtype == torch.float32 for read in deferred_tensors(encoder).values())


def test_readers_do_not_keep_modules_alive() -> None:
    module = nn.Linear(2, 2)
    defer(module, "weight", (2, 2), torch.float32, lambda: torch.zeros(2, 2))
    before = len(deferred._readers)
    del module
    assert len(deferred._readers) == before - 1

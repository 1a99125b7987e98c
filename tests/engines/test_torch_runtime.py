"""The torch engines: the same function as diffusers' modules, with checked inputs and a lifetime."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.artifacts import write_artifact
from quest_deploy.engines.base import Engine
from quest_deploy.engines.torch_runtime import (
    InHalf,
    TorchEngine,
    limited_threads,
    load_torch_engines,
    load_torch_model,
)
from quest_deploy.errors import ArtifactError, EngineInputError
from quest_deploy.model.families import TEXT_ENCODER, VAE_DECODER
from quest_deploy.model.spec import ComponentSpec, TensorSpec


@pytest.fixture(scope="module")
def engines(tiny_model: Path) -> Iterator[dict[str, Engine]]:
    loaded = load_torch_engines(tiny_model, device="cpu")
    yield loaded
    for engine in loaded.values():
        engine.close()


def unet_inputs(batch: int = 2) -> dict[str, Tensor]:
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(batch, 24, 16),
    }


def test_every_component_is_loaded(engines: dict[str, Engine]) -> None:
    assert set(engines) == {TEXT_ENCODER, "unet", VAE_DECODER}


def test_the_denoiser_is_that_of_diffusers(engines: dict[str, Engine], tiny_model: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(tiny_model / "unet")
    inputs = unet_inputs()
    with torch.no_grad():
        expected = unet(inputs["sample"], 500, inputs["encoder_hidden_states"]).sample
    assert torch.equal(engines["unet"](**inputs)["out_sample"], expected)


def test_outputs_have_the_names_and_shapes_of_the_specification(engines: dict[str, Engine]) -> None:
    outputs = engines[TEXT_ENCODER](input_ids=torch.zeros(3, 24, dtype=torch.int64))
    assert {name: list(value.shape) for name, value in outputs.items()} == {
        "last_hidden_state": [3, 24, 16],
        "pooler_output": [3, 16],
    }


def test_outputs_ask_for_no_gradient_and_may_be_written_to(engines: dict[str, Engine]) -> None:
    output = engines["unet"](**unet_inputs())["out_sample"]
    assert not output.requires_grad and not output.is_inference()


def test_a_wrong_shape_is_refused_by_name(engines: dict[str, Engine]) -> None:
    inputs = unet_inputs() | {"sample": torch.randn(2, 5, 8, 8)}
    with pytest.raises(EngineInputError, match=r"unet input 'sample': got shape \[2, 5, 8, 8\], expected"):
        engines["unet"](**inputs)


def test_a_wrong_type_is_refused_by_name(engines: dict[str, Engine]) -> None:
    inputs = unet_inputs() | {"timestep": torch.tensor([500])}
    with pytest.raises(
        EngineInputError, match=r"unet input 'timestep': got torch\.int64, expected torch\.float32"
    ):
        engines["unet"](**inputs)


@pytest.fixture
def doubler() -> TorchEngine:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            self.threads = torch.get_num_threads()
            return (x * 2,)

    spec = ComponentSpec(
        name="double",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch",)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch",)),),
    )
    return TorchEngine(spec, Double(), threads=3)


def test_a_closed_engine_says_so(doubler: TorchEngine) -> None:
    with doubler as engine:
        assert engine(x=torch.ones(1))["y"].item() == 2
    with pytest.raises(RuntimeError, match="double: the engine is closed"):
        doubler(x=torch.ones(1))


def test_threads_are_those_asked_for_while_it_runs(doubler: TorchEngine) -> None:
    before = torch.get_num_threads()
    assert before != 3
    doubler(x=torch.ones(1))
    assert doubler.module is not None
    assert (doubler.module.threads, torch.get_num_threads()) == (3, before)


def test_threads_are_put_back_after_an_error() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError), limited_threads(before + 1):
        raise ValueError
    assert torch.get_num_threads() == before


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="neither"):
        load_torch_engines(tmp_path)


def test_a_checkpoint_is_loaded_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from quest_deploy.quantize import checkpoint

    with write_artifact(tmp_path / "checkpoint", stage="checkpoint", config={}) as writer:
        (writer.path / "model_index.json").write_text("{}")
    loaded: list[Path] = []
    monkeypatch.setattr(checkpoint, "load_checkpoint", loaded.append)
    load_torch_model(tmp_path / "checkpoint")
    assert loaded == [tmp_path / "checkpoint"]


def test_half_precision_is_near_and_hands_on_float32(tiny_model: Path) -> None:
    inputs = unet_inputs()
    with_halves = load_torch_engines(tiny_model, device="cpu")["unet"]
    assert isinstance(with_halves, TorchEngine) and with_halves.module is not None
    expected = with_halves(**inputs)["out_sample"]
    with_halves.module = InHalf(with_halves.module, with_halves.spec, torch.bfloat16)
    found = with_halves(**inputs)["out_sample"]
    assert found.dtype == torch.float32
    assert 0 < (found - expected).norm() / expected.norm() < 0.05


def test_an_engine_never_multiplies_in_tensorfloat(tiny_model: Path) -> None:
    """PyTorch's convolutions do on a GPU unless told otherwise, and s * q would be rounded to 10 bits."""
    seen: list[str] = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor]:
            seen.append(torch.backends.cudnn.conv.fp32_precision)
            return (x,)

    spec = ComponentSpec(
        name="spy",
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch",)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch",)),),
    )
    TorchEngine(spec, Spy())(x=torch.zeros(1))
    assert seen == ["ieee"]

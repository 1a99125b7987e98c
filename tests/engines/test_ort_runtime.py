from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional

from quest_deploy.engines.base import Engine
from quest_deploy.engines.ort_runtime import choose_providers, load_ort_engines
from quest_deploy.errors import ArtifactError, EngineInputError, MissingDependencyError, StaleArtifactError


@pytest.fixture(scope="module")
def engines(tiny_onnx: Path) -> Iterator[dict[str, Engine]]:
    loaded = load_ort_engines(tiny_onnx, threads=1)
    yield loaded
    for engine in loaded.values():
        engine.close()


def weights(folder: Path, component: str) -> dict[str, Tensor]:
    graph = onnx.load(folder / component / "model.onnx").graph
    return {
        tensor.name: torch.from_numpy(np.array(numpy_helper.to_array(tensor))) for tensor in graph.initializer
    }


def denoiser_inputs(batch: int = 2, steps: int = 1) -> dict[str, Tensor]:
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "timestep": torch.linspace(0, 0.9, steps),
        "encoder_hidden_states": torch.randn(batch, 8, 16),
    }


def on_grid(x: Tensor, scale: Tensor) -> Tensor:
    return (x / scale).round().clamp(-128, 127) * scale


@pytest.mark.parametrize("steps", [1, 2])
def test_quantized_denoiser_equals_torch(engines: dict[str, Engine], tiny_onnx: Path, steps: int) -> None:
    inputs, w = denoiser_inputs(steps=steps), weights(tiny_onnx, "unet")
    channel = w["channel_scale"]
    conv = functional.conv2d(
        on_grid(inputs["sample"], w["scale"]), w["conv"].float() * channel.reshape(-1, 1, 1, 1), padding=1
    )
    text = on_grid(inputs["encoder_hidden_states"], w["scale"]) @ (w["gemm"].float() * channel)
    expected = (conv + text.mean(1)[:, :, None, None]) * (1 + inputs["timestep"].reshape(-1, 1, 1, 1))
    got = engines["unet"](**inputs)["out_sample"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_float_decoder_equals_torch(engines: dict[str, Engine], tiny_onnx: Path) -> None:
    latents = torch.randn(1, 4, 8, 8)
    expected = functional.interpolate(
        functional.conv2d(latents, weights(tiny_onnx, "vae_decoder")["weight"], padding=1), scale_factor=2
    )
    got = engines["vae_decoder"](latent_sample=latents)["sample"]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_every_output_of_the_specification_is_given(engines: dict[str, Engine]) -> None:
    outputs = engines["text_encoder"](input_ids=torch.zeros(3, 8, dtype=torch.int64))
    assert {name: list(tensor.shape) for name, tensor in outputs.items()} == {
        "last_hidden_state": [3, 8, 16],
        "pooler_output": [3, 16],
    }


def test_views_and_tensors_with_gradients_are_taken(engines: dict[str, Engine]) -> None:
    latents = torch.randn(1, 8, 8, 4, requires_grad=True)
    got = engines["vae_decoder"](latent_sample=latents.permute(0, 3, 1, 2))["sample"]
    plain = latents.detach().permute(0, 3, 1, 2).contiguous()
    assert torch.equal(got, engines["vae_decoder"](latent_sample=plain)["sample"])


def test_outputs_are_not_overwritten_by_the_next_run(engines: dict[str, Engine]) -> None:
    first = engines["vae_decoder"](latent_sample=torch.ones(1, 4, 8, 8))["sample"]
    copy = first.clone()
    engines["vae_decoder"](latent_sample=torch.zeros(1, 4, 8, 8))
    assert torch.equal(first, copy)


def test_wrong_type_is_refused(engines: dict[str, Engine]) -> None:
    with pytest.raises(EngineInputError, match=r"vae_decoder input 'latent_sample': got torch.float64"):
        engines["vae_decoder"](latent_sample=torch.zeros(1, 4, 8, 8, dtype=torch.float64))


def test_error_inside_the_graph_names_component_and_shapes(engines: dict[str, Engine]) -> None:
    with pytest.raises(
        EngineInputError, match=r"text_encoder: ONNX Runtime cannot run it on input_ids \[1, 8\]"
    ):
        engines["text_encoder"](input_ids=torch.full((1, 8), 99))


def test_threads_are_set(engines: dict[str, Engine]) -> None:
    assert engines["unet"].session.get_session_options().intra_op_num_threads == 1


def test_context_manager_closes(tiny_onnx: Path) -> None:
    with load_ort_engines(tiny_onnx)["vae_decoder"] as engine:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        engine(latent_sample=torch.zeros(1, 4, 8, 8))


def test_flipped_bit_is_refused_before_loading(make_onnx: Callable[..., Path]) -> None:
    source = make_onnx()
    graph = source / "unet" / "model.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(ArtifactError, match="unet/model.onnx has changed"):
        load_ort_engines(source)


def test_file_that_is_not_onnx_says_what_to_run(make_onnx: Callable[..., Path]) -> None:
    with pytest.raises(
        ArtifactError, match=r"text_encoder/model.onnx': ONNX Runtime .*parsing failed.*`quest-deploy export"
    ):
        load_ort_engines(make_onnx(text_encoder=b"\xff" * 64))


def test_graph_with_other_names_is_stale(make_onnx: Callable[..., Path], tiny_onnx: Path) -> None:
    source = make_onnx(unet=(tiny_onnx / "vae_decoder" / "model.onnx").read_bytes())
    with pytest.raises(StaleArtifactError, match=r"unet: the graph has inputs \['latent_sample'\], expected"):
        load_ort_engines(source)


def test_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tiny_onnx: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime"):
        load_ort_engines(tiny_onnx)


@pytest.mark.parametrize(
    ("available", "has_gpu", "chosen"),
    [
        (["CPUExecutionProvider"], True, ["CPUExecutionProvider"]),
        (["CUDAExecutionProvider", "CPUExecutionProvider"], False, ["CPUExecutionProvider"]),
        (
            ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"],
            True,
            ["CUDAExecutionProvider", "CPUExecutionProvider"],
        ),
    ],
    ids=["cpu build", "no gpu", "gpu"],
)
def test_cuda_is_used_where_it_can_run(available: list[str], has_gpu: bool, chosen: list[str]) -> None:
    assert choose_providers(available, has_gpu=has_gpu) == chosen

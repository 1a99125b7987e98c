from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor
from torch.nn import functional

from quest_deploy.artifacts import MANIFEST_NAME, write_artifact
from quest_deploy.config import Provider, RunConfig
from quest_deploy.engines import load_engines, ort_runtime
from quest_deploy.engines.base import Engine
from quest_deploy.engines.ort_runtime import check_started, choose_providers, load_ort_engines, with_options
from quest_deploy.errors import (
    ArtifactError,
    ConfigError,
    EngineInputError,
    MissingDependencyError,
    StaleArtifactError,
)
from quest_deploy.model.spec import TensorSpec


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


def test_tensors_are_read_and_written_where_they_are(
    engines: dict[str, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(3, 4, 8, 8)
    decoder = engines["vae_decoder"]
    expected = decoder(latent_sample=latents)["sample"]
    addresses: dict[str, int] = {}
    bound = ort_runtime.bind

    def note(how: Callable[..., None], tensor: TensorSpec, value: Tensor) -> None:
        addresses[tensor.name] = value.data_ptr()
        bound(how, tensor, value)

    monkeypatch.setattr(ort_runtime, "bind", note)
    got = decoder(latent_sample=latents)["sample"]
    assert addresses == {"latent_sample": latents.data_ptr(), "sample": got.data_ptr()}
    assert torch.equal(got, expected)


def test_other_batch_gets_outputs_of_its_own_size(engines: dict[str, Engine]) -> None:
    for batch in (2, 2, 1, 1, 2):
        latents = torch.randn(batch, 4, 8, 8)
        assert engines["vae_decoder"](latent_sample=latents)["sample"].shape == (batch, 3, 16, 16)


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


def test_a_bf16_export_that_does_not_load_names_the_runtime_that_takes_it(
    make_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    with write_artifact(tmp_path / "bf16", stage="onnx", config={}) as writer:
        shutil.copytree(
            make_onnx(text_encoder=b"\xff" * 64),
            writer.path,
            dirs_exist_ok=True,
            ignore=shutil.ignore_patterns(MANIFEST_NAME),
        )
        writer.details["dtype"] = "bf16"
    with pytest.raises(
        ArtifactError, match=r"parsing failed.*operators are in bf16.*`--backend openvino` does"
    ):
        load_ort_engines(tmp_path / "bf16")


def test_an_older_onnx_runtime_is_told_where_it_fails(
    make_onnx: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.22.1")
    with pytest.raises(ArtifactError, match=r"1\.22\.1 is too old.*pip install --upgrade onnxruntime`"):
        load_ort_engines(make_onnx(text_encoder=b"\xff" * 64))


def test_graph_with_other_names_is_stale(make_onnx: Callable[..., Path], tiny_onnx: Path) -> None:
    source = make_onnx(unet=(tiny_onnx / "vae_decoder" / "model.onnx").read_bytes())
    with pytest.raises(StaleArtifactError, match=r"unet: the graph has inputs \['latent_sample'\], expected"):
        load_ort_engines(source)


def test_missing_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tiny_onnx: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match="pip install onnxruntime"):
        load_ort_engines(tiny_onnx)


TENSORRT, CUDA, CPU = "TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.mark.parametrize(
    ("available", "has_gpu", "wanted", "chosen"),
    [
        ([CPU], True, None, [CPU]),
        ([CUDA, CPU], False, None, [CPU]),
        ([TENSORRT, CUDA, CPU], True, None, [CUDA, CPU]),
        ([TENSORRT, CUDA, CPU], True, "cpu", [CPU]),
        ([TENSORRT, CUDA, CPU], True, "tensorrt", [TENSORRT, CUDA, CPU]),
        ([TENSORRT, CPU], True, "tensorrt", [TENSORRT, CPU]),
    ],
    ids=["cpu build", "no gpu", "gpu", "cpu asked for", "tensorrt asked for", "tensorrt without cuda"],
)
def test_cuda_is_used_where_it_can_run_and_tensorrt_when_asked_for(
    available: list[str], has_gpu: bool, wanted: Provider | None, chosen: list[str]
) -> None:
    assert choose_providers(available, has_gpu=has_gpu, wanted=wanted) == chosen


def test_provider_that_this_build_lacks_names_those_it_has_and_the_package() -> None:
    with pytest.raises(
        MissingDependencyError, match=r"no TensorrtExec.* \(it has CPUExec.*\); .*pip install onnxruntime-gpu"
    ):
        choose_providers([CPU], has_gpu=True, wanted="tensorrt")


def test_provider_without_a_gpu_says_so() -> None:
    with pytest.raises(MissingDependencyError, match="CUDAExec.* needs an NVIDIA GPU"):
        choose_providers([CUDA, CPU], has_gpu=False, wanted="cuda")


def test_provider_that_did_not_start_is_an_error(engines: dict[str, Engine]) -> None:
    with pytest.raises(MissingDependencyError, match="could not start CUDAExecutionProvider"):
        check_started(engines["unet"].session, CUDA)


def test_cuda_multiplies_float32_as_it_is() -> None:
    told = [(TENSORRT, {"device_id": "1"}), (CUDA, {"device_id": "1", "use_tf32": "0"}), CPU]
    assert with_options([TENSORRT, CUDA, CPU], 1) == told
    assert with_options([CPU], 0) == [CPU]


class GpuSession:
    """A session of the CPU that says that it runs where it was asked to."""

    def __init__(self, session: Any, providers: list[Any]) -> None:
        self.session = session
        self.options = dict(map(pair, providers))

    def get_providers(self) -> list[str]:
        return list(self.options)

    def get_provider_options(self) -> dict[str, dict[str, str]]:
        return self.options

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)


def pair(provider: Any) -> tuple[str, dict[str, str]]:
    return provider if isinstance(provider, tuple) else (provider, {})


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with two GPUs, of which this thread has chosen the second, and a CUDA build of ONNX Runtime."""
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort_runtime, "gpus", lambda: ["first", "second"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    return monkeypatch


@pytest.mark.parametrize("provider", [None, "cuda"])
def test_the_gpu_is_the_one_that_the_thread_has_chosen(
    two_gpus: pytest.MonkeyPatch, tiny_onnx: Path, provider: Provider | None
) -> None:
    real = ort_runtime.open_session
    two_gpus.setattr(
        ort_runtime, "open_session", lambda *given: GpuSession(real(*given[:2], [CPU], given[3]), given[2])
    )
    engines = load_ort_engines(tiny_onnx, provider=provider)
    assert {engine.device for engine in engines.values()} == {torch.device("cuda", 1)}  # type: ignore[attr-defined]


def test_the_cpu_leaves_cuda_alone(two_gpus: pytest.MonkeyPatch, tiny_onnx: Path) -> None:
    def initialize() -> int:
        raise AssertionError("CUDA was initialized")

    two_gpus.setattr(torch.cuda, "current_device", initialize)
    load_ort_engines(tiny_onnx, provider="cpu")


def test_a_gpu_that_is_there_and_does_not_run_is_told(
    two_gpus: pytest.MonkeyPatch, tiny_onnx: Path, caplog: pytest.LogCaptureFixture
) -> None:
    real = ort_runtime.open_session
    two_gpus.setattr(ort_runtime, "open_session", lambda *given: real(*given[:2], [CPU], given[3]))
    engines = load_ort_engines(tiny_onnx)
    assert {engine.device for engine in engines.values()} == {torch.device("cpu")}  # type: ignore[attr-defined]
    (message,) = (record.getMessage() for record in caplog.records if record.levelname == "WARNING")
    assert message.startswith(
        "the CPU runs text_encoder, unet, vae_decoder, since ONNX Runtime could not start CUDA"
    )
    caplog.clear()
    load_ort_engines(tiny_onnx, provider="cpu")
    assert not caplog.records


@pytest.mark.parametrize(
    ("provider", "override", "told"),
    [(TENSORRT, None, True), (TENSORRT, "1", True), (TENSORRT, "0", False), (CUDA, None, False)],
)
def test_tensor_float_of_the_tensorrt_provider_is_told(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    provider: str,
    override: str | None,
    told: bool,
) -> None:
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if override is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    ort_runtime.tell_tensor_float(provider)
    assert ("start the process with NVIDIA_TF32_OVERRIDE=0" in caplog.text) is told


def test_a_session_with_the_tensorrt_provider_tells_it(
    two_gpus: pytest.MonkeyPatch, tiny_onnx: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two_gpus.setattr("onnxruntime.get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    two_gpus.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    real = ort_runtime.open_session
    two_gpus.setattr(
        ort_runtime, "open_session", lambda *given: GpuSession(real(*given[:2], [CPU], given[3]), given[2])
    )
    load_ort_engines(tiny_onnx, provider="tensorrt")
    assert "NVIDIA_TF32_OVERRIDE=0" in caplog.text


def test_provider_is_refused_where_another_runtime_runs(tiny_onnx: Path) -> None:
    with pytest.raises(ConfigError, match="provider is cuda, but only onnxruntime has execution providers"):
        load_engines(tiny_onnx, backend="openvino", run=RunConfig(provider="cuda"))


@pytest.mark.gpu
def test_cuda_provider_equals_the_cpu(engines: dict[str, Engine], tiny_onnx: Path) -> None:
    inputs = denoiser_inputs()
    expected = engines["unet"](**inputs)["out_sample"]
    with load_ort_engines(tiny_onnx, provider="cuda")["unet"] as engine:
        for _ in range(2):
            got = engine(**{name: value.cuda() for name, value in inputs.items()})["out_sample"]
            assert got.is_cuda
            torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-4)

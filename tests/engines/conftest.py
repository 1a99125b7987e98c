"""A pipeline small enough to build in a second: three hand-made graphs and the files that describe them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from quest_deploy.artifacts import Artifact, read_artifact, write_artifact
from quest_deploy.config import BuildConfig
from tests.engines.simulated_trt import SimulatedEngine, SimulatedStream, simulate_cuda

TOKENS, HIDDEN, CHANNELS, LATENTS = 8, 16, 4, 8
SCALE = 0.05


def array(name: str, value: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(np.ascontiguousarray(value), name)


def value(name: str, shape: list[int | str], kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes: list, inputs: list, outputs: list, initializers: list) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto, full_check=True)
    return proto


def text_encoder(rng: np.random.Generator) -> onnx.ModelProto:
    """Embedding lookup; the pooled output is its mean over the tokens."""
    return model(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["last_hidden_state"]),
            helper.make_node("ReduceMean", ["last_hidden_state", "axes"], ["pooler_output"], keepdims=0),
        ],
        [value("input_ids", ["batch", TOKENS], TensorProto.INT64)],
        [
            value("last_hidden_state", ["batch", TOKENS, HIDDEN]),
            value("pooler_output", ["batch", HIDDEN]),
        ],
        [
            array("table", rng.standard_normal((32, HIDDEN), dtype=np.float32)),
            array("axes", np.array([1], np.int64)),
        ],
    )


def unet(
    rng: np.random.Generator, weight: onnx.TensorProto | None = None, *, cast: bool = False
) -> onnx.ModelProto:
    """Int8 convolution of the latents, plus the mean of the text through an int8 MatMul, times 1 + timestep."""
    conv = rng.integers(-127, 128, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
    gemm = rng.integers(-127, 128, (HIDDEN, CHANNELS)).astype(np.int8)
    source = "conv_cast" if cast else "conv"
    nodes = [
        helper.make_node("QuantizeLinear", ["sample", "scale", "zero"], ["sample_q"]),
        helper.make_node("DequantizeLinear", ["sample_q", "scale", "zero"], ["sample_dq"]),
        *([helper.make_node("Cast", ["conv"], [source], to=TensorProto.INT8)] if cast else []),
        helper.make_node("DequantizeLinear", [source, "channel_scale"], ["conv_dq"], axis=0),
        helper.make_node("Conv", ["sample_dq", "conv_dq"], ["conv_out"], pads=[1, 1, 1, 1]),
        helper.make_node("QuantizeLinear", ["encoder_hidden_states", "scale", "zero"], ["text_q"]),
        helper.make_node("DequantizeLinear", ["text_q", "scale", "zero"], ["text_dq"]),
        helper.make_node("DequantizeLinear", ["gemm", "channel_scale"], ["gemm_dq"], axis=1),
        helper.make_node("MatMul", ["text_dq", "gemm_dq"], ["projected"]),
        helper.make_node("ReduceMean", ["projected", "token_axis"], ["pooled"], keepdims=0),
        helper.make_node("Unsqueeze", ["pooled", "spatial_axes"], ["pooled_4d"]),
        helper.make_node("Unsqueeze", ["timestep", "trailing_axes"], ["timestep_4d"]),
        helper.make_node("Add", ["timestep_4d", "one"], ["factor"]),
        helper.make_node("Add", ["conv_out", "pooled_4d"], ["sum"]),
        helper.make_node("Mul", ["sum", "factor"], ["out_sample"]),
    ]
    return model(
        nodes,
        [
            value("sample", ["batch", CHANNELS, "height", "width"]),
            value("timestep", ["steps"]),
            value("encoder_hidden_states", ["batch", "sequence", HIDDEN]),
        ],
        [value("out_sample", ["batch", CHANNELS, "height", "width"])],
        [
            weight if weight is not None else array("conv", conv),
            array("gemm", gemm),
            array("channel_scale", np.linspace(0.001, 0.002, CHANNELS, dtype=np.float32)),
            array("scale", np.float32(SCALE)),
            array("zero", np.int8(0)),
            array("one", np.float32(1)),
            array("token_axis", np.array([1], np.int64)),
            array("spatial_axes", np.array([2, 3], np.int64)),
            array("trailing_axes", np.array([1, 2, 3], np.int64)),
        ],
    )


def four_bit_weight(rng: np.random.Generator) -> onnx.TensorProto:
    codes = rng.integers(-8, 8, CHANNELS * CHANNELS * 9)
    return helper.make_tensor("conv", TensorProto.INT4, [CHANNELS, CHANNELS, 3, 3], codes)


def vae_decoder(rng: np.random.Generator) -> onnx.ModelProto:
    """Float convolution to three channels, then nearest-neighbour doubling."""
    return model(
        [
            helper.make_node("Conv", ["latent_sample", "weight"], ["rgb"], pads=[1, 1, 1, 1]),
            helper.make_node(
                "Resize",
                ["rgb", "", "scales"],
                ["sample"],
                mode="nearest",
                nearest_mode="floor",
                coordinate_transformation_mode="asymmetric",
            ),
        ],
        [value("latent_sample", ["batch", CHANNELS, "height", "width"])],
        [value("sample", ["batch", 3, "image_height", "image_width"])],
        [
            array("weight", rng.standard_normal((3, CHANNELS, 3, 3), dtype=np.float32)),
            array("scales", np.array([1, 1, 2, 2], np.float32)),
        ],
    )


CONFIGS = {
    "model_index.json": {"_class_name": "StableDiffusionPipeline"},
    "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler"},
    "tokenizer/vocab.json": {"a": 0},
    "text_encoder/config.json": {"max_position_embeddings": TOKENS, "hidden_size": HIDDEN},
    "unet/config.json": {
        "in_channels": CHANNELS,
        "out_channels": CHANNELS,
        "cross_attention_dim": HIDDEN,
        "sample_size": LATENTS,
        "block_out_channels": [8, 16],
    },
    "vae_decoder/config.json": {"latent_channels": CHANNELS, "out_channels": 3, "block_out_channels": [8, 8]},
    "quest.json": {"recipe": "w8a8"},
}


def write_configs(folder: Path) -> None:
    for name, content in CONFIGS.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))


def write_onnx(output: Path, **replaced: bytes) -> Artifact:
    """An `onnx` artifact of the tiny pipeline, with some components' graphs replaced."""
    rng = np.random.default_rng(0)
    graphs = {
        "text_encoder": text_encoder(rng).SerializeToString(),
        "unet": unet(rng).SerializeToString(),
        "vae_decoder": vae_decoder(rng).SerializeToString(),
        **replaced,
    }
    config = {"target": "tensorrt-rtx", "mode": "int8", "opset": 21}
    with write_artifact(output, stage="onnx", config=config) as writer:
        write_configs(writer.path)
        for name, content in graphs.items():
            (writer.path / name / "model.onnx").write_bytes(content)
    return read_artifact(output, stage="onnx")


@pytest.fixture(autouse=True)
def own_digest_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("digests")))


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    """Configuration files alone: latents 8x8, 2 pixels a latent, one halving in the U-Net."""
    write_configs(tmp_path / "model")
    (tmp_path / "model" / "quest.json").unlink()  # only checkpoints and what is made from them have one
    return tmp_path / "model"


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as an `onnx` artifact."""
    return write_onnx(tmp_path_factory.mktemp("tiny") / "onnx").path


@pytest.fixture
def make_onnx(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny pipeline with some graphs replaced (bytes, by component)."""

    def make(**replaced: bytes) -> Path:
        return write_onnx(tmp_path / "onnx", **replaced).path

    return make


@pytest.fixture
def asymmetric_unet() -> bytes:
    """The tiny U-Net with a zero-point of 3, which ONNX Runtime takes and TensorRT does not."""
    proto = unet(np.random.default_rng(0))
    zero = next(tensor for tensor in proto.graph.initializer if tensor.name == "zero")
    zero.CopyFrom(array("zero", np.int8(3)))
    return proto.SerializeToString()


@pytest.fixture
def four_bit_unet() -> Callable[..., bytes]:
    """The tiny U-Net with 4-bit convolution weights; `cast=True` casts them to 8 bits in the graph."""

    def make(*, cast: bool) -> bytes:
        rng = np.random.default_rng(0)
        return unet(rng, four_bit_weight(rng), cast=cast).SerializeToString()

    return make


@pytest.fixture
def engines(make_onnx: Callable[..., Path], tmp_path: Path) -> Artifact:
    """Of the tiny pipeline, in `tmp_path`; its ONNX lies in `onnx` beside it."""
    from quest_deploy.engines.trt_build import build_engine

    return build_engine(make_onnx(), tmp_path / "engines", BuildConfig())


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The components of every job that a worker is given."""
    from quest_deploy.engines import trt_build

    seen: list[list[str]] = []
    build = trt_build.ladder.build

    def keep(job, progress, **options):
        seen.append([component["name"] for component in job["components"]])
        return build(job, progress, **options)

    monkeypatch.setattr(trt_build.ladder, "build", keep)
    return seen


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> SimulatedStream:
    """The current stream of a simulated CUDA."""
    return simulate_cuda(monkeypatch)


@pytest.fixture
def cuda() -> SimulatedEngine:
    """An engine of the simulated runtime."""
    return SimulatedEngine()

"""`--mode int4-weight-only`: blocks of INT4 where k divides, int8 elsewhere, and the same model as its torch twin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from quest_deploy.config import ExportConfig, Target
from quest_deploy.engines.openvino_runtime import Graph, compile_options
from quest_deploy.errors import ExportError
from quest_deploy.export.estimate import _weights
from quest_deploy.export.passes.block_int4 import BlockInt4
from quest_deploy.export.to_onnx import export, export_component, weight_only_layer_names
from quest_deploy.model.components import parameters_frozen
from quest_deploy.model.spec import ComponentSpec, TensorSpec
from quest_deploy.quantize.affine import minmax_weight_scale
from quest_deploy.quantize.checkpoint import freeze
from quest_deploy.quantize.insert import LayerQParams, insert, quantized_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.weight_only import ChannelRow, drop_activation_quantizers
from tests.export.conftest import run_onnx
from tests.export.passes.test_passes import graph
from tests.export.tensorrt import build

CONTEXT = TimestepContext(torch.tensor([500.0]))
SPEC = ComponentSpec(
    name="net",
    inputs=(
        TensorSpec(name="sample", dtype="float32", shape=("batch", 8, "height", "width")),
        TensorSpec(name="timestep", dtype="float32", shape=("steps",)),
    ),
    outputs=(TensorSpec(name="out", dtype="float32", shape=("batch", "positions", 16)),),
)


class Net(nn.Module):
    """A convolution, a product whose k has a block, one whose k has none, and one of 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(8, 64, 3, padding=1)
        self.wide = nn.Linear(64, 40)
        self.odd = nn.Linear(40, 64)
        self.eight = nn.Linear(64, 16)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor]:
        CONTEXT.set_timestep(timestep)
        hidden = self.conv(sample).flatten(2).transpose(1, 2)
        return (self.eight(torch.relu(self.odd(torch.tanh(self.wide(hidden))))),)


def quantized(*, row: bool = True) -> Net:
    net = Net()
    qparams = {}
    for name, layer in (("conv", net.conv), ("wide", net.wide), ("odd", net.odd), ("eight", net.eight)):
        bits = 8 if name == "eight" else 4
        channels = layer.weight.shape[1]
        qparams[name] = LayerQParams(
            weight_bits=bits,
            weight_scale=minmax_weight_scale(layer.weight.detach(), bits),
            activation_bits=8,
            group_scale=torch.tensor([0.02, 0.03]),
            qmin=-128,
            qmax=127,
            row=torch.linspace(0.5, 2, channels) if row and name != "eight" else None,
        )
    insert(net, qparams, CONTEXT)
    freeze(net)
    return net


def feeds() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"sample": torch.randn(2, 8, 4, 6), "timestep": torch.tensor([700.0])}


def test_activations_are_not_rounded_and_rows_stay() -> None:
    net, twin = quantized(), quantized()
    drop_activation_quantizers(twin)
    kinds = {name: type(layer.quantizer) for name, layer in quantized_layers(twin).items()}
    assert kinds == {"conv": ChannelRow, "wide": ChannelRow, "odd": ChannelRow, "eight": type(None)}
    x = torch.randn(3, 64)
    layer, bare = quantized_layers(net)["wide"], quantized_layers(twin)["wide"]
    weight = layer.quantized_weight() / layer.row()
    assert torch.allclose(bare(x), x @ weight.T + layer.bias, atol=1e-5)
    assert weight_only_layer_names(twin) == ["conv", "wide", "odd", "eight"]
    assert weight_only_layer_names(net) == []


@pytest.fixture(scope="module", params=["onnxruntime", "tensorrt-rtx"])
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Net, Path, dict[str, str]]:
    net = quantized()
    drop_activation_quantizers(net)
    path = tmp_path_factory.mktemp("weights") / "model.onnx"
    config = ExportConfig(mode="int4-weight-only", target=request.param)
    summary, _ = export_component(
        parameters_frozen(net), SPEC, path, config, granularity=1, quantized_layers=0, weight_only_layers=4
    )
    return net, path, summary.stay_int8


def test_runs_as_its_torch_twin(exported: tuple[Net, Path, dict[str, str]]) -> None:
    net, path, _ = exported
    given = feeds()
    expected = net(**given)[0].detach().numpy()
    (got,) = run_onnx(onnx.load(path), given).values()
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_openvino_does_not_round_activations(exported: tuple[Net, Path, dict[str, str]]) -> None:
    openvino = pytest.importorskip("openvino")
    net, path, _ = exported
    given = feeds()
    expected = net(**given)[0].detach().numpy()
    graph = Graph(openvino.Core(), path, compile_options(threads=1)).compile(None)
    (got,) = graph({name: value.numpy() for name, value in given.items()}).values()
    # By itself it rounds them to 8 bits, which leaves an error of half a per cent.
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


def test_says_which_layers_stay_int8_and_why(exported: tuple[Net, Path, dict[str, str]]) -> None:
    stay = exported[2]
    assert set(stay) == {"conv", "odd", "eight"}
    assert "convolution" in stay["conv"]
    assert "40 inputs" in stay["odd"]
    assert stay["eight"] == "8-bit weights"


def test_the_size_that_is_told_is_that_of_codes_and_scales(
    exported: tuple[Net, Path, dict[str, str]],
) -> None:
    net, path, _ = exported
    tensors = {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}
    codes, scales = (tensors[f"wide.codes{end}"] for end in ("", "_block_scale"))
    told = [count * size for count, size in _weights(net, ExportConfig(mode="int4-weight-only"))]
    assert len(codes.raw_data) + len(scales.raw_data) in told


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
def test_the_same_layers_stay_int8_in_half_precision(target: Target, tmp_path: Path) -> None:
    """Their weights get a Cast behind, which the count of quantized products sees through."""
    net = quantized()
    drop_activation_quantizers(net)
    config = ExportConfig(mode="int4-weight-only", target=target, dtype="fp16")
    summary, _ = export_component(
        parameters_frozen(net),
        SPEC,
        tmp_path / "model.onnx",
        config,
        granularity=1,
        quantized_layers=0,
        weight_only_layers=4,
    )
    assert set(summary.stay_int8) == {"conv", "odd", "eight"}


def test_builds(exported: tuple[Net, Path, dict[str, str]], request: pytest.FixtureRequest) -> None:
    if "onnxruntime" in request.node.name:
        pytest.skip("packed for ONNX Runtime: TensorRT takes INT4 of products alone")
    assert build(onnx.load(exported[1])) > 0


def test_a_model_without_quantizers_is_refused(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="'int4-weight-only' expects a checkpoint"):
        export(tiny_pipeline, tmp_path / "out", ExportConfig(mode="int4-weight-only"))


PRODUCT = """
g (float[n, {k}] x) => (float[n, 3] y) {{
    w = DequantizeLinear<axis = 1>(codes, scale)
    y = MatMul(x, w)
}}"""
SCALE = np.array([0.5, 0.25, 2.0], dtype=np.float32)


def codes(k: int, limit: int = 8) -> np.ndarray:
    return np.random.default_rng(0).integers(-limit, limit, size=(k, 3)).astype(np.int8)


class TestBlockInt4:
    @pytest.mark.parametrize(
        ("k", "block"), [(32, 32), (96, 32), (64, 64), (192, 64), (256, 128), (384, 128)]
    )
    def test_takes_the_largest_block_and_loses_nothing(self, k: int, block: int) -> None:
        model = graph(PRODUCT.format(k=k), codes=codes(k), scale=SCALE)
        x = np.random.default_rng(1).normal(size=(2, k)).astype(np.float32)
        before = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]
        assert BlockInt4()(model).modified
        proto = ir.to_proto(model)
        onnx.checker.check_model(proto, full_check=True)
        (dequantize,) = [node for node in proto.graph.node if node.op_type == "DequantizeLinear"]
        found = {one.name: one.i for one in dequantize.attribute}
        assert (found["axis"], found["block_size"]) == (0, block)
        got = run_onnx(proto, {"x": torch.from_numpy(x)})["y"]
        assert np.allclose(got, before, rtol=1e-5, atol=1e-5 * np.abs(before).max())

    @pytest.mark.parametrize(
        ("text", "values"),
        [
            (PRODUCT.format(k=40), codes(40)),
            (PRODUCT.format(k=64), codes(64, limit=20)),
            (PRODUCT.format(k=64).replace("axis = 1", "axis = 0"), codes(64)),
            (PRODUCT.format(k=64).replace("y = MatMul(x, w)", "t = Mul(w, w)  y = MatMul(x, t)"), codes(64)),
        ],
        ids=["no block", "eight bits", "scales along k", "another reader"],
    )
    def test_leaves(self, text: str, values: np.ndarray) -> None:
        scale = np.ones(64, dtype=np.float32) if "axis = 0" in text else SCALE
        assert not BlockInt4()(graph(text, codes=values, scale=scale)).modified

    def test_leaves_integer_products(self) -> None:
        text = PRODUCT.format(k=64).replace("float[n, 64] x", "int8[n, 64] q")
        text = text.replace("y = MatMul", "x = DequantizeLinear(q, step)  y = MatMul")
        constants = {"codes": codes(64), "scale": SCALE, "step": np.array(0.5, dtype=np.float32)}
        assert not BlockInt4()(graph(text, **constants)).modified

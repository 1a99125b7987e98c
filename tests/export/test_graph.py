from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from quest_deploy.errors import ExportError
from quest_deploy.export.check import gated_layers
from quest_deploy.export.codes import code_names, force_codes, forced_name, mark_codes
from quest_deploy.export.graph import component_graph
from quest_deploy.model.spec import ComponentSpec, TensorSpec
from quest_deploy.quantize import grid
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.layers import ActivationQuantizer
from tests.export.conftest import Exported, run_onnx, snr_db, unet_inputs

SHAPES = [
    pytest.param(1, 1, 8, 8, 5, id="one-sample"),
    pytest.param(2, 2, 8, 12, 5, id="one-timestep-a-sample"),
    pytest.param(5, 1, 16, 8, 3, id="one-timestep-for-all"),
    pytest.param(70, 1, 4, 4, 2, id="more-than-was-traced"),
]


def torch_codes(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """int8 codes of every activation quantizer, by the name that they have in ONNX."""
    codes = {}

    def keep(name: str) -> object:
        def hook(quantizer: nn.Module, args: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
            codes[f"{name}/codes"] = (output[0] / quantizer.scale).round().to(torch.int8).numpy()

        return hook

    handles = [
        quantizer.register_forward_hook(keep(name))
        for name, quantizer in module.named_modules()
        if isinstance(quantizer, ActivationQuantizer)
    ]
    with torch.no_grad():
        module(*inputs.values())
    for handle in handles:
        handle.remove()
    return codes


@pytest.mark.parametrize(("batch", "steps", "height", "width", "sequence"), SHAPES)
def test_float_graph_computes_what_torch_computes(
    float_unet: Exported, batch: int, steps: int, height: int, width: int, sequence: int
) -> None:
    inputs = unet_inputs(batch, steps, height, width, sequence)
    with torch.no_grad():
        expected = float_unet.module(*inputs.values())[0].numpy()
    assert snr_db(expected, run_onnx(float_unet.proto, inputs)["out_sample"]) >= 90


def test_layers_of_one_input_and_one_grid_read_the_same_codes(w4a4_unet: Exported) -> None:
    quantized = [node.name for node in w4a4_unet.proto.graph.node if node.op_type == "QuantizeLinear"]
    attention = [name for name in quantized if ".attn1.to_" in name and ".to_out." not in name]
    assert attention and all(".attn1.to_q.quantizer" in name for name in attention)
    to_keys = [name for name in quantized if ".attn2.to_k." in name]
    assert to_keys and not any(".attn2.to_v." in name for name in quantized)


@pytest.mark.parametrize(("batch", "steps", "height", "width", "sequence"), SHAPES)
def test_codes_agree_layer_by_layer(
    w4a4_unet: Exported, batch: int, steps: int, height: int, width: int, sequence: int
) -> None:
    inputs = unet_inputs(batch, steps, height, width, sequence)
    codes = torch_codes(w4a4_unet.module, inputs)
    names = code_names(w4a4_unet.proto)
    # Layers with the same input and the same scale share one quantizer in the graph.
    assert names and set(names) <= set(codes)
    forced = {forced_name(name): torch.from_numpy(codes[name]) for name in names}
    got = run_onnx(force_codes(w4a4_unet.proto), {**inputs, **forced})
    differing = sum(int((got[name] != codes[name]).sum()) for name in names)
    largest = max(int(np.abs(got[name].astype(int) - codes[name]).max()) for name in names)
    # Float operators between the products may round differently: DESIGN §7 allows one code in 10^4, by one.
    assert differing <= 1e-4 * sum(codes[name].size for name in names) and largest <= 1


def test_gated_layers_are_two_products(w4a4_unet: Exported) -> None:
    gated = sum(name.endswith(".ff.net.0.proj") for name in quantized_layers(w4a4_unet.module))
    assert gated_layers(w4a4_unet.proto.graph) == {False: gated, True: 0}
    assert gated > 0


@pytest.mark.parametrize("unet", ["float_unet", "w4a4_unet"])
def test_no_attention_keeps_its_scores(unet: str, request: pytest.FixtureRequest) -> None:
    exported: Exported = request.getfixturevalue(unet)
    kinds = [node.op_type for node in exported.proto.graph.node]
    attentions = sum(name.endswith((".attn1", ".attn2")) for name, _ in exported.module.named_modules())
    assert kinds.count("MultiHeadAttention") == attentions > 0
    assert "Softmax" not in kinds


def test_each_sample_has_the_scale_of_its_own_timestep(w4a4_unet: Exported) -> None:
    inputs = unet_inputs(1, 1, 8, 8, 5)
    outputs = []
    for timestep in (10.0, 990.0):
        inputs["timestep"] = torch.tensor([timestep])
        outputs.append(run_onnx(w4a4_unet.proto, inputs)["out_sample"])
    mixed = {name: value.expand(2, *value.shape[1:]) for name, value in inputs.items() if name != "timestep"}
    mixed["timestep"] = torch.tensor([10.0, 990.0])
    got = run_onnx(w4a4_unet.proto, mixed)["out_sample"]
    assert snr_db(np.concatenate(outputs), got) >= 60


def test_marking_codes_leaves_the_output(w4a4_unet: Exported) -> None:
    inputs = unet_inputs(1, 1, 8, 8, 5)
    marked = run_onnx(mark_codes(w4a4_unet.proto), inputs)
    np.testing.assert_array_equal(marked["out_sample"], run_onnx(w4a4_unet.proto, inputs)["out_sample"])
    assert list(marked) == ["out_sample", *code_names(w4a4_unet.proto)]


def test_marking_codes_leaves_the_model(w4a4_unet: Exported) -> None:
    before = w4a4_unet.proto.SerializeToString(deterministic=True)
    force_codes(w4a4_unet.proto)
    assert w4a4_unet.proto.SerializeToString(deterministic=True) == before


def test_scales_and_clip_bounds_are_stored(w4a4_unet: Exported) -> None:
    graph = w4a4_unet.proto.graph
    stored = {tensor.name for tensor in graph.initializer}
    constants = [
        name
        for node in graph.node
        if node.op_type in ("Clip", "QuantizeLinear", "DequantizeLinear")
        for name in node.input[1:]
    ]
    assert constants and stored.issuperset(constants)


def test_zero_points_are_zero(w4a4_unet: Exported) -> None:
    graph = w4a4_unet.proto.graph
    names = {node.input[2] for node in graph.node if node.op_type.endswith("eLinear") and len(node.input) > 2}
    values = [onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in names]
    assert values and all(not value.any() for value in values)


def test_four_bit_weights_take_half_a_byte(w4a4_unet: Exported) -> None:
    packed = [
        tensor for tensor in w4a4_unet.proto.graph.initializer if tensor.data_type == onnx.TensorProto.INT4
    ]
    assert packed
    assert all(len(tensor.raw_data) == -(-int(np.prod(tensor.dims)) // 2) for tensor in packed)


def test_products_read_dequantized_weights_directly(w4a4_unet: Exported) -> None:
    producers = {name: node for node in w4a4_unet.proto.graph.node for name in node.output}
    behind_transpose = [
        node.name
        for node in w4a4_unet.proto.graph.node
        if node.op_type == "Transpose" and producers.get(node.input[0], node).op_type == "DequantizeLinear"
    ]
    assert behind_transpose == []


class Root(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor]:
        if float(x.sum()) > 0:
            return (x,)
        return (-x,)


def test_a_module_that_torch_cannot_trace_is_an_export_error() -> None:
    tensor = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    spec = ComponentSpec(
        name="vae_decoder",
        inputs=(tensor,),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 3)),),
    )
    with pytest.raises(ExportError, match="vae_decoder: torch cannot export it"):
        component_graph(Root(), spec, granularity=1, opset=21, target="onnxruntime")


class Layer(nn.Module):
    """One quantized layer behind its own quantizer."""

    def __init__(self, layer: nn.Module, bounds: tuple[int, int], bits: int) -> None:
        super().__init__()
        self.bounds, self.bits, self.stride = bounds, bits, getattr(layer, "stride", None)
        low, high = grid.weight_bounds(bits)
        self.register_buffer("scale", torch.tensor(0.0371))
        self.register_buffer("codes", torch.randint(low, high + 1, layer.weight.shape, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.rand(layer.weight.shape[0]) + 0.1)

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        x = torch.ops.quest_deploy.quantize_dequantize(sample, self.scale, *self.bounds)
        weight = torch.ops.quest_deploy.dequantize_weight(self.codes, self.weight_scale, 0, self.bits)
        if self.stride is None:
            return (nn.functional.linear(x, weight),)
        return (nn.functional.conv2d(x, weight, None, self.stride, 1),)


def layer_spec(kind: str) -> ComponentSpec:
    shape: tuple[int | str, ...] = ("batch", 5, 8) if kind == "linear" else ("batch", 8, "height", "width")
    out: tuple[int | str, ...] = ("batch", 5, 6) if kind == "linear" else ("batch", 6, "height", "width")
    return ComponentSpec(
        name="layer",
        inputs=(TensorSpec(name="sample", dtype="float32", shape=shape),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=out),),
    )


@pytest.mark.parametrize("bounds", [(-128, 127), (-3, 12)], ids=["a8", "a4"])
@pytest.mark.parametrize("bits", [4, 8], ids=["w4", "w8"])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_one_layer_gives_the_same_codes(kind: str, bits: int, bounds: tuple[int, int]) -> None:
    spec = layer_spec(kind)
    source = nn.Linear(8, 6) if kind == "linear" else nn.Conv2d(8, 6, 3, padding=1)
    module = Layer(source, bounds, bits).eval()
    graph = component_graph(module, spec, granularity=1, opset=21, target="onnxruntime")
    model = mark_codes(onnx.load_from_string(serialize(graph)))
    x = torch.randn(3, 5, 8) * 2 if kind == "linear" else torch.randn(3, 8, 10, 12) * 2
    got = run_onnx(model, {"sample": x})
    np.testing.assert_array_equal(got[code_names(model)[0]], grid.quantize(x, module.scale, *bounds).numpy())
    assert snr_db(module(x)[0].numpy(), got["y"]) >= 120


def test_a_tensorrt_graph_keeps_int8_weights() -> None:
    module = Layer(nn.Conv2d(8, 6, 3, padding=1), (-3, 12), 4).eval()
    model = component_graph(module, layer_spec("conv"), granularity=1, opset=21, target="tensorrt-rtx")
    types = {value.const_value.dtype.name for value in model.graph.initializers.values()}
    assert "INT8" in types and "INT4" not in types


class Patches(nn.Module):
    """Attention, and patches that are put together: as transformers have them."""

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        heads = sample.unflatten(2, (2, 4)).transpose(1, 2)
        attended = nn.functional.scaled_dot_product_attention(heads, heads, heads)
        apart = attended.transpose(1, 2).flatten(2).unflatten(2, (2, 2, 2))
        return (torch.einsum("ntpqc->nctpq", apart),)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_axes_are_moved_by_plain_transposes(dtype: str) -> None:
    spec = ComponentSpec(
        name="layer",
        inputs=(TensorSpec(name="sample", dtype="float32", shape=("batch", "sequence", 8)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", 2, "sequence", 2, 2)),),
    )
    graph = component_graph(Patches(), spec, granularity=1, opset=22, target="tensorrt-rtx", dtype=dtype)
    model = onnx.load_from_string(serialize(graph))
    onnx.checker.check_model(model, full_check=True)
    moved = [list(node.attribute[0].ints) for node in model.graph.node if node.op_type == "Transpose"]
    assert [0, 1, 3, 2] in moved and [0, 4, 1, 2, 3] in moved
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Einsum", "Slice"})
    if dtype == "fp32":
        x = torch.randn(3, 7, 8)
        assert snr_db(Patches()(x)[0].numpy(), run_onnx(model, {"sample": x})["y"]) >= 120


def serialize(graph: object) -> bytes:
    import onnx_ir as ir

    return ir.to_proto(graph).SerializeToString()  # type: ignore[arg-type]

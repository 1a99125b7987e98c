"""On JSON made by hand after the documented format, and a simulated inspector: a real one needs a GPU."""

from __future__ import annotations

import json
from typing import Any

import pytest

from quest_deploy.engines.inspector import inspect_plan, parse_layers, type_in
from quest_deploy.engines.trt_plan import LoadedPlan, Refusal
from quest_deploy.errors import ArtifactError
from tests.engines.simulated_trt import (
    SPEC,
    SimulatedEngine,
    SimulatedInspector,
    simulate_cuda,
    simulated_library,
)


def layer(
    name: str = "conv",
    datatype: str = "Thirty-two wide channel vectorized row major Int8 format",
    **more: Any,
):
    return {
        "Name": name,
        "LayerType": "CaskConvolution",
        "Inputs": [{"Name": "x", "Dimensions": [2, 64, 16, 16], "Format/Datatype": datatype}],
        "Outputs": [
            {"Name": "y", "Dimensions": [2, 64, 16, 16], "Format/Datatype": "Row major linear FP16 format"}
        ],
        "Weights": {"Type": "Int8", "Count": 36864},
        "TacticName": "sm80_xmma_fprop_implicit_gemm_i8i8",
        "TacticValue": "0x412c44dfeaf9161d",
        "Metadata": "[ONNX Layer: /down/conv]\x1e[ONNX Layer: /down/Add]\x1e[ONNX Layer: /down/conv]",
        **more,
    }


def parse(*layers: Any) -> Any:
    return parse_layers(json.dumps({"Layers": list(layers), "Bindings": ["x", "y"]}))


def test_layer_names_precision_tactic_and_onnx_nodes() -> None:
    (found,) = parse(layer())
    assert (found.kind, found.precision, found.weights) == ("CaskConvolution", "int8", "int8")
    assert found.tactic == "sm80_xmma_fprop_implicit_gemm_i8i8"
    assert found.sources == ("/down/conv", "/down/Add")


def test_tensorrt_11_says_type_and_format_apart() -> None:
    inputs = [{"Name": "x", "Dimensions": [1], "Datatype": "Half", "Format": "kLINEAR"}]
    assert parse(layer(Inputs=inputs))[0].precision == "fp16"


def test_fused_summand_does_not_count() -> None:
    inputs = [{"Format/Datatype": "Int8 format"}, {"Format/Datatype": "Row major linear FP32"}]
    assert parse(layer(Inputs=inputs))[0].precision == "int8"


@pytest.mark.parametrize(
    ("kind", "name"), [("Myelin", "fused"), ("kgen", "{ForeignNode[/a.../b]}")], ids=["kind", "name"]
)
def test_region_of_many_operators_has_no_precision(kind: str, name: str) -> None:
    assert parse(layer(name, LayerType=kind))[0].precision == "unknown"


def test_layer_without_metadata_has_the_nodes_of_its_name() -> None:
    assert parse(layer("/a/Conv + /a/Relu", Metadata=""))[0].sources == ("/a/Conv", "/a/Relu")


def test_layers_of_further_profiles_have_the_nodes_of_the_first() -> None:
    assert parse(layer("/a/Conv + /a/Relu [profile 1]", Metadata=""))[0].sources == ("/a/Conv", "/a/Relu")


def test_engine_built_without_details_has_names_alone() -> None:
    (found,) = parse("/a/Conv + /a/Relu")
    assert (found.sources, found.precision, found.tactic) == (("/a/Conv", "/a/Relu"), "unknown", "")


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Row major linear INT8 format", "int8"),
        ("Int4", "int4"),
        ("Row major linear FP8 format", "fp8"),
        ("Row major linear BF16 format", "bf16"),
        ("Half", "fp16"),
        ("Row major linear FP32", "fp32"),
        ("Float", "fp32"),
        ("Int64", "other"),
        ("N/A due to dynamic shapes", "unknown"),
        ("", "unknown"),
    ],
)
def test_types_are_read_from_their_descriptions(text: str, kind: str) -> None:
    assert type_in(text) == kind


@pytest.mark.parametrize(
    "text", ["", "[]", '{"layers": []}', '{"Layers": [{"LayerType": "conv"}]}', '{"Layers": [3]}']
)
def test_other_formats_are_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match=r"engine inspector gave .* documents for TensorRT 10 and 11"):
        parse_layers(text)


def test_types_are_told_for_the_optimal_shapes_of_engines_with_ranges(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    simulate_cuda(monkeypatch)
    cuda = SimulatedEngine()
    told = SimulatedInspector().get_engine_information("json")
    assert [one.precision for one in parse_layers(told)] == ["unknown", "unknown"]
    found = inspect_plan(LoadedPlan("doubler", simulated_library(lambda log, plan: None), cuda), SPEC)
    assert [(one.name, one.precision) for one in found] == [("conv", "int8"), ("add", "int8")]
    assert [context.shape for context in cuda.contexts] == [(2, 4)]


def test_shapes_that_tensorrt_refuses_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_cuda(monkeypatch)
    cuda = SimulatedEngine()
    monkeypatch.setattr(cuda, "get_tensor_profile_shape", lambda name, index: [(9, 4)] * 3)
    with pytest.raises(Refusal, match=r"TensorRT refused x \[9, 4\]"):
        inspect_plan(LoadedPlan("doubler", simulated_library(lambda log, plan: None), cuda), SPEC)


def test_the_library_has_the_format() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    assert "JSON" in library.LayerInformationFormat.__members__

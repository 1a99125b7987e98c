"""Engines whose inputs and outputs are not those of the graph. On a simulated runtime; the parser is the real one."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto, helper

from quest_deploy.artifacts import write_artifact
from quest_deploy.engines import trt_runtime
from quest_deploy.engines.foreign import Fitted, to_json
from quest_deploy.engines.trt_plan import LoadedPlan
from quest_deploy.engines.trt_runtime import TensorRTEngine, as_built, load_tensorrt_engines
from quest_deploy.model.spec import ComponentSpec, TensorSpec
from tests.engines.simulated_trt import SPEC, SimulatedEngine, make_memory, simulate_cuda, simulated_library


def doubles() -> ComponentSpec:
    """The doubler as a graph in float64 declares it."""

    def wide(*tensors: TensorSpec) -> tuple[TensorSpec, ...]:
        return tuple(dataclasses.replace(tensor, dtype="float64") for tensor in tensors)

    return dataclasses.replace(SPEC, inputs=wide(*SPEC.inputs), outputs=wide(*SPEC.outputs))


def test_the_parser_makes_float32_of_float64() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])],
        "doubler",
        [helper.make_tensor_value_info("x", TensorProto.DOUBLE, ["batch", 4])],
        [helper.make_tensor_value_info("y", TensorProto.DOUBLE, ["batch", 4])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    log = library.Logger(library.Logger.ERROR)
    network = library.Builder(log).create_network(
        1 << int(library.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    )
    assert library.OnnxParser(network, log).parse(model.SerializeToString())
    assert {network.get_input(0).dtype, network.get_output(0).dtype} == {library.DataType.FLOAT}


def test_graph_in_float64_is_given_what_its_engine_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate_cuda(monkeypatch)
    with write_artifact(tmp_path / "engines", stage="engines", config={"backend": "tensorrt"}) as writer:
        writer.details["interfaces"] = to_json({SPEC.name: Fitted(spec=SPEC, graph=doubles())})
    library = simulated_library(lambda log, plan: None)
    plans = {SPEC.name: LoadedPlan(SPEC.name, library, SimulatedEngine())}
    monkeypatch.setattr(trt_runtime, "check_gpu", lambda path: None)
    monkeypatch.setattr(trt_runtime, "import_tensorrt", lambda backend: library)
    monkeypatch.setattr(trt_runtime, "load_plans", lambda source, library, backend: plans)
    monkeypatch.setattr(trt_runtime, "component_specs", lambda path: {SPEC.name: SPEC})
    monkeypatch.setattr(trt_runtime, "ActivationMemory", lambda size, device: make_memory(size))
    engine = load_tensorrt_engines(tmp_path / "engines", backend="tensorrt")[SPEC.name]
    x = torch.randn(2, 4)
    torch.testing.assert_close(engine(x=x)["y"], 2 * x, rtol=0, atol=0)


def test_outputs_that_nobody_asks_for_have_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_cuda(monkeypatch)
    cuda = SimulatedEngine()
    monkeypatch.setattr(cuda, "types", {**cuda.types, "hidden_states.0": "HALF"})
    plan = LoadedPlan(SPEC.name, simulated_library(lambda log, plan: None), cuda)
    engine = TensorRTEngine(SPEC, plan, make_memory())
    x = torch.randn(2, 4)
    for _ in range(3):
        outputs = engine(x=x)
        torch.testing.assert_close(outputs["y"], 2 * x, rtol=0, atol=0)
        assert outputs["hidden_states.0"].dtype == torch.float16


def test_the_library_has_the_types_that_engines_can_take() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    assert "OUTPUT" in library.TensorIOMode.__members__
    cuda = SimulatedEngine()
    names = {"FLOAT", "HALF", "BF16", "INT8", "UINT8", "INT32", "INT64", "BOOL"}
    assert names <= library.DataType.__members__.keys()
    for name in names:
        cuda.types = {"x": name, "y": "FLOAT"}  # type: ignore[misc]
        (tensor,) = as_built(SPEC, simulated_library(lambda log, plan: None), cuda).inputs
        assert isinstance(getattr(torch, tensor.dtype), torch.dtype)

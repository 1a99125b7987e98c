"""Time-embedding tables leave torch as two lookups and a blend, and nothing of the time path leaves it at all."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

from quest_deploy.config import FinetuneConfig, PhaseConfig, Recipe
from quest_deploy.export.graph import component_graph
from quest_deploy.export.passes.pack_int4 import PackInt4
from quest_deploy.export.to_onnx import quantized_layer_names
from quest_deploy.model.load import LoadedModel, wrap_components
from quest_deploy.model.spec import latent_granularity
from quest_deploy.quantize import train
from quest_deploy.quantize.checkpoint import load_checkpoint
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.tables import time_tables
from tests.codes import assert_codes_agree
from tests.export.conftest import run_onnx, unet_inputs
from tests.export.tensorrt import build

PHASE = PhaseConfig(layers="all", steps=1, batch_size=1)
RECIPE = Recipe(
    name="table",
    weight_bits=4,
    activation_bits=8,
    calibration_prompts=2,
    validation_prompts=1,
    calibration_steps=3,
    initializer="nearest",
    temporal_path="table",
    temporal=PHASE,
    sensitive=PHASE,
)

pytestmark = pytest.mark.thorough


@dataclass(frozen=True)
class Deployed:
    """A model with tables, the products of its denoiser that have codes, and its graphs for both targets."""

    model: LoadedModel
    quantized: list[str]
    tensorrt: onnx.ModelProto
    onnxruntime: onnx.ModelProto

    @property
    def module(self) -> torch.nn.Module:
        return wrap_components(self.model)["unet"]


@pytest.fixture(scope="module")
def deployed(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Deployed:
    path, losses = tmp_path_factory.mktemp("table") / "checkpoint", itertools.count(0, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Task, "validation_loss", lambda task: float(next(losses)))
        finetune(tiny_pipeline, path, FinetuneConfig(recipe=RECIPE, prompts=("a", "b")))
    model = load_checkpoint(path)
    module = wrap_components(model)["unet"]
    # Packing codes is all that the two targets differ in, so it is traced once.
    granularity = latent_granularity(model.denoiser.config)
    graph = component_graph(
        module, model.specs["unet"], granularity=granularity, opset=21, target="tensorrt-rtx"
    )
    tensorrt = ir.to_proto(graph)
    PackInt4()(graph)
    return Deployed(model, quantized_layer_names(module), tensorrt, ir.to_proto(graph))


def knots(model: LoadedModel) -> torch.Tensor:
    found = next(iter(time_tables(model.denoiser).values())).context.knots
    assert found is not None
    return found.timesteps


def test_codes_agree_at_knots_between_and_outside(deployed: Deployed, tmp_path: Path) -> None:
    onnx.save(deployed.onnxruntime, tmp_path / "model.onnx")
    torch.manual_seed(0)
    low, middle, high = knots(deployed.model).tolist()
    places = ([middle], [low, high], [low / 2, (low + middle) / 2], [999.0])
    probes = [{**unet_inputs(2, len(place), 8, 12, 5), "timestep": torch.tensor(place)} for place in places]
    assert_codes_agree(deployed.module, tmp_path / "model.onnx", probes)


def test_lookups_and_blend_are_those_of_torch_to_the_bit(deployed: Deployed) -> None:
    graph = onnx.ModelProto()
    graph.CopyFrom(deployed.onnxruntime)
    tables = time_tables(deployed.model.denoiser)
    rows = [blend for blend in (blend_of(graph, table.table) for table in tables.values()) if blend]
    assert len(rows) == len(tables)
    graph.graph.output.extend(onnx.ValueInfoProto(name=name) for name in rows)
    timestep = torch.tensor([37.5, 801.0])
    got = run_onnx(graph, {**unet_inputs(2, 2, 8, 8, 5), "timestep": timestep}, optimize=False)
    for (name, table), row in zip(tables.items(), rows, strict=True):
        table.context.set_timestep(timestep)
        assert torch.equal(torch.from_numpy(got[row]), table(torch.empty(0)).detach()), name


def blend_of(model: onnx.ModelProto, table: torch.Tensor) -> str | None:
    """The value that is looked up in `table` and blended."""
    names = {
        one.name
        for one in model.graph.initializer
        if list(one.dims) == list(table.shape)
        and (onnx.numpy_helper.to_array(one) == table.detach().numpy()).all()
    }
    readers = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    for gather in model.graph.node:
        if gather.op_type == "Gather" and gather.input[0] in names:
            (share,) = readers[gather.output[0]]
            (add,) = readers[share.output[0]]
            assert (share.op_type, add.op_type) == ("Mul", "Add")
            return str(add.output[0])
    return None


def all_names(model: onnx.ModelProto) -> set[str]:
    return {name for node in model.graph.node for name in (*node.input, *node.output)}


def test_nothing_of_the_time_path_is_exported(deployed: Deployed) -> None:
    graph = deployed.onnxruntime.graph
    assert not {"Sin", "Cos"} & {node.op_type for node in graph.node}
    names = all_names(deployed.onnxruntime) | {one.name for one in graph.initializer}
    names |= {node.name for node in graph.node}
    assert not [name for name in names if "time_embedding" in name or "time_proj" in name]
    # What the timestep leads to are comparisons, lookups and shares: no product, no code.
    after, operators = {"timestep"}, set()
    outlets = {blend_of(deployed.onnxruntime, t.table) for t in time_tables(deployed.model.denoiser).values()}
    for node in graph.node:
        if after & set(node.input):
            operators.add(node.op_type)
            if node.op_type not in PLAIN:
                continue
            after |= set(node.output) - outlets
    assert not operators & {"MatMul", "Gemm", "Conv", "QuantizeLinear", "DequantizeLinear", "Sigmoid"}


PLAIN = {
    "Expand",
    "Cast",
    "Unsqueeze",
    "Reshape",
    "GreaterOrEqual",
    "ReduceSum",
    "Gather",
    "Clip",
    "Sub",
    "Div",
}


def test_a_tensorrt_for_rtx_engine_is_built(deployed: Deployed) -> None:
    assert build(deployed.tensorrt) > 0


def test_products_of_the_time_path_are_not_counted(deployed: Deployed) -> None:
    assert deployed.quantized and not [name for name in deployed.quantized if "time_emb" in name]

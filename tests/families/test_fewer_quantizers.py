"""Shared inputs and collapsed timestep groups leave torch as the codes that ONNX Runtime chooses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import FinetuneConfig
from quest_deploy.export.graph import component_graph
from quest_deploy.model.load import wrap_components
from quest_deploy.model.spec import latent_granularity
from quest_deploy.quantize.checkpoint import load_checkpoint
from quest_deploy.quantize.finetune import finetune
from tests.codes import assert_codes_agree
from tests.families.conftest import RECIPE

BLOCK = "transformer.transformer_blocks.0"
QKV = [f"{BLOCK}.attn1.to_{part}.quantizer" for part in "qkv"]


@pytest.fixture(scope="module")
def checkpoint(model_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT at W4A8 with both options; what the limit leaves has a scale for each of three timestep groups."""
    path = tmp_path_factory.mktemp("fewer") / "checkpoint"
    recipe = dataclasses.replace(RECIPE, shared_inputs=True, collapse_loss_db=0.05, calibration_steps=3)
    finetune(model_of("dit"), path, FinetuneConfig(recipe=recipe))
    return path


def test_some_groups_are_collapsed_and_inputs_are_shared(checkpoint: Path) -> None:
    found = read_artifact(checkpoint).manifest.details["collapse"]
    assert 0 < found["collapsed"] < found["quantizers"]
    denoiser = wrap_components(load_checkpoint(checkpoint))["transformer"]
    query, key, value = (denoiser.get_submodule(name) for name in QKV)
    assert query.equals(key) and query.equals(value)


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("target", "quantized"),
    # ONNX Runtime fuses a product only with a QuantizeLinear of its own; an engine quantizes the tensor once.
    [("onnxruntime", 3), ("tensorrt-rtx", 1)],
)
def test_codes_agree(target: str, quantized: int, checkpoint: Path, tmp_path: Path) -> None:
    model = load_checkpoint(checkpoint)
    module, spec = wrap_components(model)["transformer"], model.specs["transformer"]
    granularity = latent_granularity(model.denoiser.config)
    graph = component_graph(module, spec, granularity=granularity, opset=21, target=target)
    proto = ir.to_proto(graph)
    onnx.save(proto, tmp_path / "model.onnx")
    torch.manual_seed(0)
    probes = [
        {
            "hidden_states": torch.randn(2, 4, 8, 8),
            "timestep": torch.tensor(timestep),
            "class_labels": torch.tensor([0, 2]),
        }
        for timestep in ([3.0, 990.0], [500.0])
    ]
    assert_codes_agree(module, tmp_path / "model.onnx", probes)
    names = [node.name for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert (
        sum(name.startswith(f"{BLOCK}.attn1.to_") and ".to_out." not in name for name in names) == quantized
    )

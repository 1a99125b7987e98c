"""What is exchanged before a component is traced: the same values, without what a runtime does not have."""

from __future__ import annotations

import logging

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn

from quest_deploy.export.graph import component_graph
from quest_deploy.export.wrap import (
    MAX_POSITIONS,
    RotaryTable,
    keep_tiny_addends,
    remove_idle_squeezes,
    traceable,
)
from quest_deploy.model.tensors import ComponentSpec, float_tensor


class Positioned(nn.Module):
    def __init__(self, theta: int = 10000) -> None:
        super().__init__()
        self.embed = FluxPosEmbed(theta, [4, 6, 6])

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.embed(ids)


def test_a_table_gives_the_bits_of_every_position() -> None:
    every = torch.arange(MAX_POSITIONS, dtype=torch.float32)
    ids = torch.stack([every, every.flip(0), (every * 7) % MAX_POSITIONS], dim=1)
    embedding = FluxPosEmbed(10000, [16, 56, 56])
    for table, computed in zip(RotaryTable(embedding)(ids), embedding(ids), strict=True):
        assert torch.equal(table, computed)


def test_rotary_positions_are_traced_without_float64_and_put_back() -> None:
    module = Positioned()
    with traceable(module):
        program = torch.export.export(module, (torch.zeros(5, 3),))
    assert isinstance(module.embed, FluxPosEmbed)
    kinds = {
        node.meta["val"].dtype for node in program.graph.nodes if isinstance(node.meta.get("val"), Tensor)
    }
    assert torch.float64 not in kinds


def test_an_embedding_that_differs_from_its_table_stays(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    module = Positioned()
    monkeypatch.setattr(RotaryTable, "forward", lambda self, ids: (torch.zeros(len(ids), 16),) * 2)
    with caplog.at_level(logging.WARNING), traceable(module):
        assert isinstance(module.embed, FluxPosEmbed)
    assert "FluxPosEmbed" in caplog.text


class Squeezing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.squeeze(1) * 2


@pytest.mark.parametrize(("size", "left"), [(3, 0), (1, 1)])
def test_only_a_squeeze_that_changes_nothing_is_removed(size: int, left: int) -> None:
    x = torch.randn(2, size, 4)
    program = torch.export.export(Squeezing(), (x,))
    remove_idle_squeezes(program.graph_module)
    found = [node for node in program.graph.nodes if node.target is torch.ops.aten.squeeze.dim]
    assert len(found) == left
    assert torch.equal(program.module()(x), x.squeeze(1) * 2)


class Dividing(nn.Module):
    def __init__(self, epsilon: float) -> None:
        super().__init__()
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x / (x + self.epsilon)


@pytest.mark.parametrize(("epsilon", "tensors"), [(1e-15, 1), (1e-5, 0)])
def test_only_what_the_optimizer_takes_for_zero_becomes_a_tensor(epsilon: float, tensors: int) -> None:
    x = torch.zeros(2, 3, 4)
    program = torch.export.export(Dividing(epsilon), (x,))
    keep_tiny_addends(program.graph_module)
    found = [node for node in program.graph.nodes if node.target is torch.ops.aten.full.default]
    assert len(found) == tensors
    assert torch.equal(program.module()(x), x)


def test_zero_over_nearly_zero_is_zero_in_onnx() -> None:
    spec = ComponentSpec(
        name="part",
        inputs=(float_tensor("x", "batch", 3, 4),),
        outputs=(float_tensor("y", "batch", 3, 4),),
    )
    graph = component_graph(Dividing(1e-15), spec, granularity=1, opset=21, target="onnxruntime")
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString())
    (got,) = session.run(None, {"x": np.zeros((2, 3, 4), np.float32)})
    assert (got == 0).all()

"""Initializers that are read when they are written: the same file, with one weight in memory at a time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from quest_deploy.export.graph import component_graph
from quest_deploy.export.lazy import mapped, transposed
from quest_deploy.export.to_onnx import save
from quest_deploy.model import deferred
from quest_deploy.model.deferred import defer
from quest_deploy.model.spec import ComponentSpec, TensorSpec
from quest_deploy.quantize.grid import dequantize_weight

SIDE = 64
FLOAT = ir.DataType.FLOAT


def lazy_tensor(values: np.ndarray, reads: list[str] | None = None) -> ir.LazyTensor:
    def read() -> ir.Tensor:
        if reads is not None:
            reads.append("read")
        return ir.Tensor(values, name="w")

    return ir.LazyTensor(read, dtype=FLOAT, shape=ir.Shape(values.shape), name="w")


def test_mapping_a_lazy_tensor_reads_nothing() -> None:
    reads: list[str] = []
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    result = transposed(lazy_tensor(values, reads), [1, 0])
    assert reads == []
    assert (list(result.shape), result.dtype, result.name) == ([3, 2], FLOAT, "w")
    np.testing.assert_array_equal(result.numpy(), values.T)
    assert result.tobytes() == values.T.tobytes()


def test_mapping_a_tensor_in_memory_computes_at_once() -> None:
    result = mapped(
        ir.tensor(np.ones(2, dtype=np.float32)), lambda values: 2 * values, shape=(2,), name="twice"
    )
    assert isinstance(result, ir.Tensor)
    assert (result.name, result.numpy().tolist()) == ("twice", [2.0, 2.0])


class Layers(nn.Module):
    """A linear layer without and with bias, a convolution, and a dequantized weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.plain = nn.Linear(SIDE, SIDE, bias=False)
        self.biased = nn.Linear(SIDE, SIDE)
        self.conv = nn.Conv1d(SIDE, SIDE, 3, padding=1)
        self.register_buffer("codes", torch.randint(-7, 8, (SIDE, SIDE), dtype=torch.int8))
        self.register_buffer("scale", torch.rand(SIDE))

    def forward(self, x: Tensor) -> Tensor:
        assert isinstance(self.codes, Tensor) and isinstance(self.scale, Tensor)
        x = self.conv(self.biased(self.plain(x)))
        return nn.functional.linear(x, dequantize_weight(self.codes, self.scale, 0, 4))


def left_out(module: nn.Module) -> nn.Module:
    """`module` with every weight of two or more axes deferred."""
    for owner in list(module.modules()):
        for name, tensor in (*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)):
            if tensor.ndim > 1:
                value = tensor.detach().clone()
                defer(owner, name, tuple(value.shape), value.dtype, lambda value=value: value.clone())
    return module


def graph_of(module: nn.Module, target: str, dtype: str = "fp32") -> ir.Model:
    x = TensorSpec(name="x", dtype="float32", shape=("batch", SIDE, SIDE))
    y = TensorSpec(name="y", dtype="float32", shape=("batch", SIDE, SIDE))
    spec = ComponentSpec(name="layers", inputs=(x,), outputs=(y,))
    return component_graph(module, spec, granularity=1, opset=21, target=target, dtype=dtype)


@pytest.mark.parametrize(("target", "dtype"), [("onnxruntime", "fp32"), ("tensorrt-rtx", "fp16")])
def test_the_file_is_the_same(tmp_path: Path, target: str, dtype: str) -> None:
    files = {}
    for name, change in {"whole": lambda module: module, "deferred": left_out}.items():
        model = graph_of(change(Layers().eval()), target, dtype)
        lazy = [
            value.name
            for value in model.graph.initializers.values()
            if isinstance(value.const_value, ir.LazyTensor)
        ]
        assert name == "whole" or len(lazy) >= 4
        save(model, tmp_path / f"{name}.onnx")
        files[name] = (tmp_path / f"{name}.onnx").read_bytes()
    assert files["whole"] == files["deferred"]


def test_transposed_weights_keep_their_names(tmp_path: Path) -> None:
    model = graph_of(Layers().eval(), "onnxruntime")
    assert "plain.weight" in model.graph.initializers
    assert not [
        node for node in model.graph if node.op_type == "Transpose" and node.inputs[0].const_value is not None
    ]


def test_weights_are_written_one_after_the_other(tmp_path: Path) -> None:
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0

    def reader(value: float) -> Callable[[], ir.Tensor]:
        def read() -> ir.Tensor:
            nonlocal most
            gc.collect()
            array = np.full(4096, value, dtype=np.float32)
            alive.append(weakref.ref(array))
            most = max(most, sum(ref() is not None for ref in alive))
            return ir.Tensor(array)

        return read

    x = ir.Value(name="x", shape=ir.Shape([4096]), type=ir.TensorType(FLOAT))
    values, nodes, last = [], [], x
    for index in range(6):
        tensor = ir.LazyTensor(reader(index), dtype=FLOAT, shape=ir.Shape([4096]), name=f"w{index}")
        values.append(
            ir.Value(name=f"w{index}", shape=tensor.shape, type=ir.TensorType(FLOAT), const_value=tensor)
        )
        nodes.append(ir.node("Mul", [last, values[-1]]))
        last = nodes[-1].outputs[0]
    graph = ir.Graph([x], [last], nodes=nodes, initializers=values, opset_imports={"": 21}, name="g")
    seen: list[tuple[int, int]] = []
    save(
        ir.Model(graph, ir_version=10),
        tmp_path / "model.onnx",
        inline_limit_bytes=1000,
        report=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(index, 6) for index in range(1, 7)]
    assert len(alive) >= 6
    # The one that is being written, and the one that is read next.
    assert most <= 2


def test_tracing_leaves_the_module_deferred() -> None:
    module = left_out(Layers().eval())
    graph_of(module, "onnxruntime")
    assert deferred.is_deferred(module)
    assert module.plain.weight.device.type == "meta"

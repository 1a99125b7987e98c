"""Several threads run one engine at the same time, and each gets what it would get alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quest_deploy.engines import load_engines
from quest_deploy.engines.base import Engine
from quest_deploy.engines.openvino_runtime import OpenVinoEngine, Shapes
from quest_deploy.model.spec import ComponentSpec, TensorSpec

RUNS = 20


@pytest.fixture(params=["onnxruntime", "openvino", "torch"])
def unet(request: pytest.FixtureRequest, tiny_onnx: Path) -> Iterator[Engine]:
    """A quantized denoiser in each runtime that runs on a CPU."""
    if request.param == "torch":
        path = request.getfixturevalue("tiny_checkpoint")
    else:
        path = tiny_onnx
        pytest.importorskip(request.param)
    engines = load_engines(path, backend=request.param, threads=1)
    yield engines["unet"]
    for engine in engines.values():
        engine.close()


def inputs_at(engine: Engine, timestep: float, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(int(timestep))
    sizes = {"batch": batch, "steps": 1, "height": 16, "width": 16, "sequence": 8}
    shapes = {
        tensor.name: [size if isinstance(size, int) else sizes[size] for size in tensor.shape]
        for tensor in engine.spec.inputs
    }
    inputs = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return inputs | {"timestep": torch.full((1,), timestep)}


@pytest.mark.parametrize("batches", [(2, 2), (1, 2)])
def test_threads_do_not_get_in_each_others_way(unet: Engine, batches: tuple[int, int]) -> None:
    asked = [inputs_at(unet, timestep, batch) for timestep, batch in zip((1.0, 900.0), batches, strict=True)]
    alone = [unet(**inputs)["out_sample"] for inputs in asked]
    together, right = threading.Barrier(2), []

    def work(index: int) -> None:
        together.wait()
        for _ in range(RUNS):
            right.append(torch.equal(unet(**asked[index])["out_sample"], alone[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * (2 * RUNS)


class SlowToCompile:
    """A graph whose compilation for two samples ends when it is told to; what it compiles does nothing."""

    def __init__(self) -> None:
        self.begun, self.may_end = threading.Event(), threading.Event()

    def compile(self, shapes: Shapes | None) -> Any:
        if shapes is not None and shapes[0][1][0] == 2:
            self.begun.set()
            assert self.may_end.wait(30)
        output = SimpleNamespace(data=torch.zeros(1).numpy())
        request = SimpleNamespace(infer=lambda inputs: None, get_tensor=lambda name: output)
        return SimpleNamespace(create_infer_request=lambda: request)


def test_a_thread_does_not_wait_while_another_compiles_for_other_shapes() -> None:
    tensor = TensorSpec(name="sample", dtype="float32", shape=("batch",))
    graph: Any = SlowToCompile()
    engine = OpenVinoEngine(ComponentSpec(name="unet", inputs=(tensor,), outputs=(tensor,)), graph)
    engine(sample=torch.zeros(1))
    compiling = threading.Thread(target=lambda: engine(sample=torch.zeros(2)))
    running = threading.Thread(target=lambda: engine(sample=torch.zeros(1)))
    compiling.start()
    assert graph.begun.wait(30)
    running.start()
    running.join(timeout=1)
    waited = running.is_alive()
    graph.may_end.set()
    compiling.join()
    running.join()
    assert not waited
    assert [shapes[0][1] for shapes in engine.compiled if shapes is not None] == [(1,), (2,)]

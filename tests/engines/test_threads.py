"""Several threads run one engine at the same time, and each gets what it would get alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quest_deploy.engines import load_engines
from quest_deploy.engines.base import Engine

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

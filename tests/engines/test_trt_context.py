from __future__ import annotations

import logging
import threading
import weakref

import pytest
import torch

from quest_deploy.engines import trt_context, trt_runtime
from quest_deploy.engines.trt_context import MAX_GRAPHS
from quest_deploy.engines.trt_memory import ActivationMemory, Block
from quest_deploy.engines.trt_runtime import TensorRTEngine
from tests.engines.simulated_trt import (
    ACTIVATION_BYTES,
    SimulatedEngine,
    SimulatedStream,
    make_engine,
    make_memory,
    simulate_cuda,
)


@pytest.fixture(autouse=True)
def stream(monkeypatch: pytest.MonkeyPatch) -> SimulatedStream:
    return simulate_cuda(monkeypatch)


@pytest.fixture
def cuda() -> SimulatedEngine:
    return SimulatedEngine()


def run(engine: TensorRTEngine, *batches: int) -> None:
    """Run with new values each time, and check them."""
    for batch in batches:
        x = torch.randn(batch, 4)
        torch.testing.assert_close(engine(x=x)["y"], 2 * x, rtol=0, atol=0)


def captured(engine: TensorRTEngine) -> list[int]:
    """The batches that this thread has graphs for, the one used longest ago first."""
    lane = engine.lanes[threading.get_ident()]
    return [shapes[0][2][0] for shapes in lane.captured]


def test_first_run_of_a_shape_reads_and_writes_the_tensors_themselves(cuda: SimulatedEngine) -> None:
    x = torch.randn(2, 4)
    y = make_engine(cuda)(x=x)["y"]
    assert cuda.contexts[0].addresses == {"x": x.data_ptr(), "y": y.data_ptr()}


def test_shape_that_comes_again_is_captured_and_replayed(cuda: SimulatedEngine) -> None:
    engine = make_engine(cuda)
    run(engine, 2, 2, 2, 2)
    # The plain run, the run before the capture, and two replays that enqueue nothing by themselves.
    assert [context.enqueued for context in cuda.contexts] == [1, 1]
    (graph,) = (entry.graph for entry in engine.lanes[threading.get_ident()].captured.values())
    assert graph.replays == 2


def test_other_shape_gets_its_own_graph_and_leaves_the_first_valid(cuda: SimulatedEngine) -> None:
    engine = make_engine(cuda)
    run(engine, 1, 1, 1, 2, 2, 2, 1, 5, 5, 5, 2, 1)
    assert captured(engine) == [5, 2, 1]


def test_oldest_graph_is_freed_beyond_the_bound_and_captured_anew(
    cuda: SimulatedEngine, stream: SimulatedStream
) -> None:
    engine = make_engine(cuda)
    for batch in range(1, MAX_GRAPHS + 1):
        run(engine, batch, batch)
    second = weakref.ref(cuda.contexts[2])  # behind the plain one and that of batch 1
    cuda.contexts.clear()
    run(engine, 1, MAX_GRAPHS + 1, MAX_GRAPHS + 1)
    assert captured(engine) == [3, 4, 1, 5]
    assert stream.synchronized == 1 and second() is None
    run(engine, 2)
    assert captured(engine) == [3, 4, 1, 5]
    run(engine, 2)
    assert captured(engine) == [4, 1, 5, 2]


def test_results_of_a_graph_are_not_overwritten_by_the_next_replay(cuda: SimulatedEngine) -> None:
    engine = make_engine(cuda)
    run(engine, 2, 2)
    x = torch.randn(2, 4)
    kept = engine(x=x)["y"]
    run(engine, 2)
    torch.testing.assert_close(kept, 2 * x, rtol=0, atol=0)


def test_graphs_can_be_switched_off(cuda: SimulatedEngine) -> None:
    engine = make_engine(cuda, graphs=False)
    run(engine, 2, 2, 2)
    assert len(cuda.contexts) == 1 and captured(engine) == []


def test_shapes_are_set_and_checked_once(cuda: SimulatedEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[str] = []
    checked = trt_runtime.check_inputs
    monkeypatch.setattr(
        trt_runtime, "check_inputs", lambda spec, *rest: (checks.append(spec.name), checked(spec, *rest))
    )
    engine = make_engine(cuda, graphs=False)
    run(engine, 2, 2, 2)
    assert cuda.contexts[0].shapes_set == len(checks) == 1
    run(engine, 1, 2)
    assert cuda.contexts[0].shapes_set == 3 and len(checks) == 2


def test_engine_that_cannot_be_captured_runs_without_graphs(
    cuda: SimulatedEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(run: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(trt_context, "capture", refuse)
    engine = make_engine(cuda)
    with caplog.at_level(logging.WARNING):
        run(engine, 2, 2, 2, 2)
    assert [record.getMessage() for record in caplog.records] == [
        "doubler runs without CUDA graphs: operation not permitted when stream is capturing"
    ]
    assert captured(engine) == []


def test_engine_that_tensorrt_calls_not_capturable_is_not_captured(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(SimulatedEngine(capturable=False))
    run(engine, 2, 2, 2)
    assert "cannot be captured" in caplog.text and captured(engine) == []


def test_components_of_a_pipeline_share_one_block(stream: SimulatedStream) -> None:
    memory, cudas = make_memory(), [SimulatedEngine(), SimulatedEngine()]
    for cuda in cudas:
        run(make_engine(cuda, memory), 2, 2, 2)
    blocks = {context.memory for cuda in cudas for context in cuda.contexts}
    assert blocks == {(memory.block().memory.data_ptr(), ACTIVATION_BYTES)}


def test_threads_run_in_contexts_and_memory_of_their_own(cuda: SimulatedEngine) -> None:
    engine, both, failed = make_engine(cuda), threading.Barrier(2), []

    def work(batch: int) -> None:
        both.wait()
        try:
            run(engine, *[batch] * 20)
        except BaseException as error:
            failed.append(error)
        both.wait()  # an identifier of a thread that ended may be given to another

    threads = [threading.Thread(target=work, args=(batch,)) for batch in (1, 4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed and len(engine.lanes) == 2
    assert len({context.memory for context in cuda.contexts}) == 2
    assert {context.shape for context in cuda.contexts} == {(1, 4), (4, 4)}


def test_block_waits_for_the_stream_that_it_was_used_on_before() -> None:
    block, first, second = Block(1, torch.device("cpu")), SimulatedStream(1), SimulatedStream(2)
    for stream in (first, first, second, second, first):
        block.take(stream)
    assert (first.waited_for, second.waited_for) == ([second], [first])


def test_block_of_an_engine_without_activations_has_an_address() -> None:
    assert ActivationMemory(0, torch.device("cpu")).block().memory.data_ptr()

"""Which memory and which contexts runs get: of several components, threads, streams and GPUs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from quest_deploy.engines.trt_memory import ActivationMemory, Block
from quest_deploy.engines.trt_runtime import TensorRTEngine
from quest_deploy.errors import EngineBuildError, EngineRunError
from tests.engines.simulated_trt import (
    ACTIVATION_BYTES,
    SimulatedContext,
    SimulatedDevice,
    SimulatedEngine,
    SimulatedStream,
    captured,
    make_engine,
    make_memory,
    run,
)

pytestmark = pytest.mark.usefixtures("stream")


def test_components_of_a_pipeline_share_one_block(stream: SimulatedStream) -> None:
    memory, cudas = make_memory(), [SimulatedEngine(), SimulatedEngine()]
    for cuda in cudas:
        run(make_engine(cuda, memory), 2, 2, 2)
    blocks = {context.memory for cuda in cudas for context in cuda.contexts}
    with memory.borrow(stream) as block:  # type: ignore[arg-type]
        assert blocks == {(block.memory.data_ptr(), ACTIVATION_BYTES)}


def run_in_threads(engine: TensorRTEngine, *batches: int) -> None:
    """A thread for each batch, which runs it again and again."""

    def work(batch: int) -> None:
        all_there.wait()
        run(engine, *[batch] * 20)

    all_there = threading.Barrier(len(batches), timeout=30)
    with ThreadPoolExecutor(len(batches)) as pool:
        list(pool.map(work, batches))


def test_threads_that_run_at_the_same_time_have_contexts_and_memory_of_their_own(
    cuda: SimulatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, enqueue = threading.Barrier(2, timeout=30), SimulatedContext.execute_async_v3

    def together(context: SimulatedContext, stream: int) -> bool:
        both.wait()
        return enqueue(context, stream)

    monkeypatch.setattr(SimulatedContext, "execute_async_v3", together)
    engine = make_engine(cuda, graphs=False)
    run_in_threads(engine, 1, 4)
    assert len(engine.lanes) == 2
    assert len({context.memory for context in cuda.contexts}) == 2


def test_graphs_of_several_threads_do_not_get_in_each_others_way(cuda: SimulatedEngine) -> None:
    engine = make_engine(cuda)
    run_in_threads(engine, 1, 4, 2)
    assert 1 <= len(engine.lanes) <= 3


def test_threads_that_take_turns_share_contexts_and_memory(cuda: SimulatedEngine) -> None:
    """As many as a server has, of which a lock lets one draw at a time."""
    engine, turn, all_there = make_engine(cuda), threading.Lock(), threading.Barrier(8)

    def work(batch: int) -> None:
        all_there.wait()
        with turn:
            run(engine, batch)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [2] * 8))
    assert len(engine.lanes) == 1 and captured(engine) == [2]


@pytest.mark.parametrize("busy", [True, False])
def test_streams_have_memory_of_their_own_while_they_are_busy(
    cuda: SimulatedEngine, stream: SimulatedStream, monkeypatch: pytest.MonkeyPatch, busy: bool
) -> None:
    engine, other = make_engine(cuda), SimulatedStream()
    stream.is_busy = other.is_busy = busy
    for current in (stream, other, stream, other):
        monkeypatch.setattr(torch.cuda, "current_stream", lambda current=current: current)
        run(engine, 2)
    assert len(engine.lanes) == (2 if busy else 1)
    assert busy == (stream.waited_for == other.waited_for == [])


def test_a_run_that_fails_gives_its_memory_back(cuda: SimulatedEngine) -> None:
    engine = make_engine(cuda)
    run(engine, 2)
    cuda.contexts[0].runs = False
    with pytest.raises(EngineRunError):
        engine(x=torch.ones(1, 4))
    cuda.contexts[0].runs = True
    run(engine, 1)
    assert len(engine.lanes) == 1


def test_engine_runs_on_the_gpu_that_it_was_loaded_onto_whatever_the_thread_has_chosen() -> None:
    second = torch.device("cpu", 1)
    with SimulatedDevice(second):
        cuda = SimulatedEngine()
    run(make_engine(cuda, ActivationMemory(ACTIVATION_BYTES, second)), 2, 2, 2)
    assert SimulatedDevice.current() == 0


def test_threads_run_while_another_one_waits_for_its_first_context(
    cuda: SimulatedEngine, stream: SimulatedStream, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, asked, go_on = make_engine(cuda, graphs=False), threading.Event(), threading.Event()
    streams = {threading.get_ident(): stream}
    stream.is_busy = True
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda: streams.setdefault(threading.get_ident(), SimulatedStream())
    )
    run(engine, 2)
    make = cuda.create_execution_context

    def slowly(how: object) -> object:  # as where TensorRT for RTX compiles kernels
        asked.set()
        assert go_on.wait(10)
        return make(how)

    monkeypatch.setattr(cuda, "create_execution_context", slowly)
    other = threading.Thread(target=run, args=(engine, 2))
    other.start()
    assert asked.wait(10)
    timer = threading.Timer(2, go_on.set)  # so that a run that waits for the other ends, too late
    timer.start()
    run(engine, 2)
    assert not go_on.is_set()
    timer.cancel()
    go_on.set()
    other.join()
    assert len(engine.lanes) == 2


def test_block_waits_for_the_stream_that_it_was_used_on_before() -> None:
    block, first, second = Block(1, torch.device("cpu")), SimulatedStream(1), SimulatedStream(2)
    for stream in (first, first, second, second, first):
        block.take(stream)
    assert (first.waited_for, second.waited_for) == ([second], [first])


def test_block_of_an_engine_without_activations_has_an_address() -> None:
    with ActivationMemory(0, torch.device("cpu")).borrow(SimulatedStream()) as block:  # type: ignore[arg-type]
        assert block.memory.data_ptr()


def test_context_that_does_not_fit_says_so() -> None:
    with pytest.raises(EngineBuildError, match="doubler: no execution context"):
        make_engine(SimulatedEngine(out_of_memory=True))(x=torch.randn(1, 4))

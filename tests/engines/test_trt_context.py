from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch

from quest_deploy.engines import trt_context, trt_runtime
from quest_deploy.engines.trt_context import MAX_GRAPHS
from quest_deploy.engines.trt_context import capture as real_capture
from quest_deploy.engines.trt_log import make_log
from quest_deploy.engines.trt_memory import DEFAULT_STREAM, ActivationMemory, Block
from quest_deploy.engines.trt_runtime import TensorRTEngine
from quest_deploy.errors import EngineBuildError, EngineRunError
from tests.engines.simulated_trt import (
    ACTIVATION_BYTES,
    SimulatedContext,
    SimulatedDevice,
    SimulatedEngine,
    SimulatedLogger,
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
    """The batches that there are graphs for, the one used longest ago first."""
    (lane,) = engine.lanes.values()
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
    (lane,) = engine.lanes.values()
    (graph,) = (entry.graph for entry in lane.captured.values())
    assert graph.replays == 2


def test_runs_are_enqueued_with_the_markers_that_tensorrt_has_by_default(cuda: SimulatedEngine) -> None:
    run(make_engine(cuda), 2, 2)
    assert [context.nvtx_verbosity for context in cuda.contexts] == ["names", "names"]


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
    def refuse(run: object, stream: SimulatedStream) -> None:
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


def test_on_the_default_stream_tensorrt_gets_another_one_between_what_comes_before_and_after(
    cuda: SimulatedEngine, stream: SimulatedStream
) -> None:
    stream.cuda_stream = DEFAULT_STREAM
    engine = make_engine(cuda)
    run(engine, 2, 5, 2, 2)  # two profiles, and a graph
    (block,) = engine.lanes
    own = block.own
    assert isinstance(own, SimulatedStream)
    plain, of_the_graph = cuda.contexts
    assert set(plain.streams) == {own.cuda_stream}
    # The run before the capture, then the capture on a third stream.
    assert of_the_graph.streams[0] == own.cuda_stream != of_the_graph.streams[1] != DEFAULT_STREAM
    assert own.waited_for and set(own.waited_for) == {stream}
    assert len(stream.waited_for) == len(own.waited_for) and set(stream.waited_for) == {own}


def test_captures_never_use_a_stream_that_threads_run_on(
    cuda: SimulatedEngine, stream: SimulatedStream
) -> None:
    stream.cuda_stream = DEFAULT_STREAM
    engine = make_engine(cuda)
    for _ in range(8):  # graphs come and go: more captures than torch has streams
        for batch in range(1, MAX_GRAPHS + 2):
            run(engine, batch, batch)
    used = {handle for context in cuda.contexts for handle in context.captured_on}
    (lane,) = engine.lanes.values()
    own = lane.block.own
    assert len(used) == 32 and own is not None and own.cuda_stream not in used


def test_other_streams_of_the_caller_are_used_as_they_are(
    cuda: SimulatedEngine, stream: SimulatedStream
) -> None:
    engine = make_engine(cuda)
    run(engine, 2, 5)
    assert cuda.contexts[0].streams == [stream.cuda_stream] * 2 and stream.waited_for == []


def test_views_that_tensorrt_cannot_address_are_copied(cuda: SimulatedEngine) -> None:
    rows = torch.randn(8, 4)
    engine = make_engine(cuda, graphs=False)
    for first in range(4):
        view = rows[first : first + 2]
        torch.testing.assert_close(engine(x=view)["y"], 2 * view, rtol=0, atol=0)


def test_graphs_serve_inside_and_outside_of_inference_mode(cuda: SimulatedEngine) -> None:
    engine = make_engine(cuda)
    with torch.inference_mode():
        run(engine, 2, 2, 2)
    run(engine, 2)
    assert captured(engine) == [2]


def test_capture_that_cannot_be_ended_leaves_the_callers_stream_the_current_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caller, capturing = SimulatedStream(), SimulatedStream()
    current = [caller]

    @contextmanager
    def graph(made: object, *, stream: SimulatedStream, capture_error_mode: str) -> Iterator[None]:
        current[0] = stream
        yield
        raise RuntimeError("operation failed due to a previous error during capture")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: current.__setitem__(0, stream))
    with pytest.raises(RuntimeError, match="previous error during capture"):
        real_capture(lambda handle: None, capturing)
    assert current == [caller]


def test_refusal_quotes_what_tensorrt_said_last(
    cuda: SimulatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(cuda)
    run(engine, 2)
    assert engine.plan is not None
    log = make_log(engine.plan.library)

    def refuse(stream: int) -> bool:
        for message in ("first", "Error Code 1:\n  Cask", "b", "c"):
            log.log(SimulatedLogger.Severity.ERROR, message)
        return False

    monkeypatch.setattr(cuda.contexts[0], "execute_async_v3", refuse)
    with pytest.raises(
        EngineRunError, match=r"^doubler: TensorRT refused to run \(Error Code 1: Cask; b; c\); run"
    ):
        engine(x=torch.ones(1, 4))


def test_refusal_does_not_quote_errors_of_earlier_calls(cuda: SimulatedEngine) -> None:
    engine = make_engine(cuda)
    run(engine, 2)
    assert engine.plan is not None
    make_log(engine.plan.library).log(SimulatedLogger.Severity.ERROR, "of an earlier call")
    cuda.contexts[0].runs = False
    with pytest.raises(EngineRunError, match="doubler: TensorRT refused to run; run the same command again"):
        engine(x=torch.ones(1, 4))


def test_profile_that_tensorrt_refuses_is_an_error_with_a_next_step(
    cuda: SimulatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(cuda)
    run(engine, 2)
    monkeypatch.setattr(engine, "profiles", [engine.profiles[0]] * 2 + [engine.profiles[1]])
    with pytest.raises(
        EngineRunError, match="doubler: TensorRT refused profile 2; run the same command again"
    ):
        engine(x=torch.ones(5, 4))


def test_what_cuda_says_of_a_run_is_an_error_with_a_next_step(
    cuda: SimulatedEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(cuda)
    run(engine, 2)

    def fail(stream: int) -> bool:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nmore")

    monkeypatch.setattr(cuda.contexts[0], "execute_async_v3", fail)
    with pytest.raises(EngineRunError, match="^doubler: CUDA error: an illegal .* encountered; run the same"):
        engine(x=torch.ones(1, 4))


def test_too_little_memory_for_activations_says_what_to_do(cuda: SimulatedEngine) -> None:
    memory = make_memory()

    def refuse(stream: object) -> Block:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")

    memory.borrow = refuse  # type: ignore[method-assign,assignment]
    with pytest.raises(EngineBuildError, match="doubler: CUDA out of memory.*GiB.; .*fewer images at a time"):
        make_engine(cuda, memory)(x=torch.ones(1, 4))


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

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from quest_deploy.engines import trt_context, trt_runtime
from quest_deploy.engines.trt_context import MAX_GRAPHS
from quest_deploy.engines.trt_context import capture as real_capture
from quest_deploy.engines.trt_log import make_log
from quest_deploy.engines.trt_memory import DEFAULT_STREAM, Block
from quest_deploy.errors import EngineBuildError, EngineRunError
from tests.engines.simulated_trt import (
    SimulatedEngine,
    SimulatedLogger,
    SimulatedStream,
    captured,
    make_engine,
    make_memory,
    run,
)

pytestmark = pytest.mark.usefixtures("stream")


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

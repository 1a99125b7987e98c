"""On a simulated runtime: how runs are timed, not what a GPU takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quest_deploy.config import BuildConfig
from quest_deploy.engines import layer_times
from quest_deploy.engines.layer_times import (
    LayerTimes,
    made_up_inputs,
    make_profiler,
    medians,
    profile,
    time_layers,
)
from quest_deploy.engines.trt_plan import Refusal
from quest_deploy.errors import EngineBuildError, EngineRunError
from tests.engines.simulated_trt import SPEC, SimulatedEngine, make_engine, simulate_cuda, simulated_library


class ProfiledEngine(SimulatedEngine):
    """Its third run after the first ones is slow, as when another program uses the GPU."""

    def create_execution_context(self, how: object):
        context = super().create_execution_context(how)
        assert context is not None
        slow = layer_times.WARM_UP_RUNS + 3
        context.layer_ms = lambda run: {"conv": 90.0 if run == slow else 0.5, "add": 0.25}
        return context


def test_inputs_have_the_optimal_shapes_of_the_first_profile() -> None:
    (name, value), *more = made_up_inputs(make_engine(SimulatedEngine())).items()
    assert (name, tuple(value.shape), value.dtype, more) == ("x", (2, 4), torch.float32, [])


def test_one_slow_run_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_cuda(monkeypatch)
    engine = make_engine(ProfiledEngine())
    found = profile(simulated_library(lambda log, plan: None), engine, made_up_inputs(engine))
    assert found == {"conv": 0.5, "add": 0.25}


def test_first_runs_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_cuda(monkeypatch)
    cuda = ProfiledEngine()
    engine = make_engine(cuda)
    profile(simulated_library(lambda log, plan: None), engine, made_up_inputs(engine))
    (context,) = cuda.contexts
    assert context.enqueued == layer_times.WARM_UP_RUNS + layer_times.RUNS


def test_times_come_with_what_the_layers_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    simulate_cuda(monkeypatch)
    cuda, library = ProfiledEngine(), simulated_library(lambda log, plan: None)
    monkeypatch.setattr(layer_times, "import_tensorrt", lambda backend: library)
    monkeypatch.setattr(layer_times, "load_plan", lambda plan, spec, config: make_engine(cuda))
    found = time_layers(tmp_path / "model.plan", SPEC, BuildConfig(backend="tensorrt"))
    assert [layer.name for layer in found.layers] == list(found.ms) == ["conv", "add"]
    assert {layer.precision for layer in found.layers} == {"int8"}


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        (Refusal("TensorRT refused to run"), EngineRunError),
        (torch.OutOfMemoryError("CUDA"), EngineBuildError),
    ],
)
def test_an_engine_that_does_not_run_is_an_error_that_a_build_survives(
    refusal: Exception, expected: type[Exception], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(plan: object, spec: object) -> None:
        raise refusal

    monkeypatch.setattr(layer_times, "import_tensorrt", lambda backend: None)
    monkeypatch.setattr(layer_times, "load_plan", lambda plan, spec, config: make_engine(SimulatedEngine()))
    monkeypatch.setattr(layer_times, "inspect_plan", refuse)
    with pytest.raises(expected, match=f"doubler: {refusal}; .*build"):
        time_layers(tmp_path / "model.plan", SPEC, BuildConfig(backend="tensorrt"))


def test_layer_that_reports_twice_in_a_run_adds_up() -> None:
    profiler = make_profiler(simulated_library(lambda log, plan: None))
    for ms in (0.25, 0.5):
        profiler.report_layer_time("conv", ms)
    assert profiler.ms == {"conv": 0.75}


def test_layer_that_a_run_leaves_out_took_nothing_in_it() -> None:
    assert medians([{"a": 1.0}, {"a": 3.0, "b": 1.0}, {"a": 2.0}]) == {"a": 2.0, "b": 0.0}


def test_total_is_the_sum_over_layers() -> None:
    assert LayerTimes(layers=(), ms={"a": 1.0, "b": 0.5}).total_ms == 1.5


def test_the_library_has_a_profiler_of_this_form() -> None:
    library = pytest.importorskip("tensorrt_rtx")
    profiler = make_profiler(library)
    profiler.report_layer_time("conv", 0.5)
    assert profiler.ms == {"conv": 0.5}
    assert hasattr(library.IExecutionContext, "profiler")

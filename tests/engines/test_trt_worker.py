from __future__ import annotations

import io
import json
import logging
import sys
import threading
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from quest_deploy.engines import trt_worker
from quest_deploy.engines.trt_worker import EventLog, PhaseTree, build_component, progress_monitor


def record(message: str, level: int = logging.ERROR) -> logging.LogRecord:
    return logging.LogRecord("Polygraphy", level, "", 0, message, None, None)


def log_of(*messages: str) -> EventLog:
    log = EventLog(io.StringIO())
    for message in messages:
        log.emit(record(message))
    return log


def test_cause_is_the_first_error_not_its_consequence() -> None:
    log = log_of("[!] Invalid Engine. Please ensure", "[E] int4 on Conv", "[E] another")
    assert log.cause("nothing") == "int4 on Conv"


def test_cause_skips_the_parser_s_dump_of_the_node() -> None:
    log = log_of("[E] ModelImporter.cpp:140: While parsing node number 0:", "[E] In node 0: no zero point")
    assert log.cause("nothing") == "In node 0: no zero point"


def test_cause_falls_back_to_the_exception() -> None:
    assert log_of("[!] Invalid Engine.").cause("out of memory") == "out of memory"


def test_cause_is_one_line_without_places_in_tensorrt_s_source() -> None:
    log = log_of("[E] Error Code 4: no Int4\n here. In check at /_src/optimizer/network.cpp:271")
    assert log.cause("") == "Error Code 4: no Int4 here."


def test_warnings_are_events_but_not_causes() -> None:
    stream = io.StringIO()
    log = EventLog(stream)
    log.emit(record("[W] slow", logging.WARNING))
    event = json.loads(stream.getvalue())
    assert (event["event"], event["message"], log.errors) == ("log", "slow", [])


def test_finished_steps_are_a_fraction() -> None:
    tree = PhaseTree()
    tree.start("build", None, 4)
    tree.step("build", 0)
    assert tree.fraction() == 0.25


def test_nested_phase_fills_one_step_of_its_parent() -> None:
    tree = PhaseTree()
    tree.start("build", None, 4)
    tree.step("build", 0)
    tree.start("optimize", "build", 2)
    tree.step("optimize", 0)
    assert tree.fraction() == 0.375


def test_finished_phase_no_longer_counts() -> None:
    tree = PhaseTree()
    tree.start("build", None, 4)
    tree.start("optimize", "build", 2)
    tree.step("optimize", 1)
    tree.finish("optimize")
    assert tree.fraction() == 0.0


def test_more_steps_than_announced_stay_within_one() -> None:
    tree = PhaseTree()
    tree.start("build", None, 0)
    tree.step("build", 7)
    assert tree.fraction() == 1.0


def test_progress_from_several_threads_ends_no_build() -> None:
    trt = SimpleNamespace(IProgressMonitor=type("Base", (), {"__init__": lambda self: None}))
    monitor = progress_monitor(trt, "unet", EventLog(io.StringIO()))
    monitor.phase_start("build", None, 4)
    failed: list[BaseException] = []

    def work(thread: int) -> None:
        try:
            for phase in range(1000):
                name = f"{thread}: {phase}"
                monitor.phase_start(name, "build", 2)
                assert monitor.step_complete(name, 0)
                monitor.phase_finish(name)
        except BaseException as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed


def test_timings_that_cannot_be_saved_cost_no_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    polygraphy = ModuleType("polygraphy.backend.trt")
    polygraphy.network_from_onnx_path = lambda path, strongly_typed: (  # type: ignore[attr-defined]
        None,
        SimpleNamespace(num_layers=1),
        None,
    )
    polygraphy.engine_bytes_from_network = lambda network, config: b"plan"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "polygraphy.backend.trt", polygraphy)
    monkeypatch.setattr(trt_worker, "check_inputs_of", lambda *args: None)
    monkeypatch.setattr(trt_worker, "builder_config", lambda *args: None)
    monkeypatch.setattr(trt_worker, "can_deserialize", lambda *args: False)

    def full(config: object, path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trt_worker, "save_timing_cache", full)
    trt = SimpleNamespace(
        NetworkDefinitionCreationFlag=None, BuilderFlag=SimpleNamespace(__members__={}), __version__="1"
    )
    stream = io.StringIO()
    component = {"name": "unet", "onnx": "x", "plan": str(tmp_path / "plan")}
    build_component(trt, {"timing_cache": "/full/cache"}, component, EventLog(stream))
    assert json.loads(stream.getvalue())["event"] == "built"
    assert (tmp_path / "plan").read_bytes() == b"plan"
    assert "timing cache /full/cache cannot be written (No space left on device)" in caplog.text

from __future__ import annotations

import io
import json
import logging

from quest_deploy.engines.trt_worker import EventLog, PhaseTree


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

"""What is tried where memory does not suffice, and several components at a time. The workers are simulated."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import pytest

from quest_deploy.config import ProgressEvent
from quest_deploy.engines import ladder
from quest_deploy.engines.trt_process import BuildMemoryError
from quest_deploy.errors import EngineBuildError

OPTIONS = {"optimization_level": None, "workspace_mb": None}
PROFILE = {"x": {"min": [1], "opt": [2], "max": [4]}}


def job(*names: str) -> dict:
    return {
        "backend": "tensorrt-rtx",
        "timing_cache": None,
        "components": [
            {"name": name, "onnx": f"/x/{name}", "plan": "p", "profiles": [PROFILE], "options": OPTIONS}
            for name in names
        ],
    }


def simulated(*lines: str) -> list[str]:
    """A worker that does `lines` for each component `c`, and then has built it."""
    program = [
        "import sys, json, os, time",
        "job = json.loads(sys.stdin.readline())",
        "send = lambda **event: print(json.dumps(event), flush=True)",
        "fail = lambda kind, words: (send(event='failed', kind=kind, component=c['name'], message=words,",
        "    tensorrt_version='1'), sys.exit(1))",
        "for c in job['components']:",
        *(f"    {line}" for line in lines),
        "    send(event='built', component=c['name'], options=c['options'])",
    ]
    return [sys.executable, "-c", "\n".join(program)]


def test_less_is_tried_until_it_suffices(caplog: pytest.LogCaptureFixture) -> None:
    command = simulated(
        "o = c['options']",
        "if c['name'] == 'b' and o['workspace_mb'] != 256: fail('build', 'CUDA: out of memory')",
    )
    events: list[ProgressEvent] = []
    built = ladder.build(job("a", "b", "c"), events.append, command=command)
    assert built["b"]["fallback"] == [
        "optimization level 0",
        "a workspace of 1024 MiB",
        "a workspace of 256 MiB",
    ]
    assert built["b"]["options"] == {"optimization_level": 0, "workspace_mb": 256}
    assert built["b"]["profiles"] == [PROFILE]
    assert built["a"] == built["c"] == {"options": OPTIONS}
    assert [event.completed for event in events] == [100, 200, 300]
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(said) == 3 and said[0].endswith("trying again with optimization level 0")


def test_the_last_thing_tried_is_one_shape() -> None:
    command = simulated("if c['profiles'][0]['x']['max'] != [2]: os.kill(os.getpid(), 9)")
    built = ladder.build(job("a"), None, command=command)
    assert built["a"]["fallback"][-1] == "the optimal shapes alone"
    assert built["a"]["profiles"] == [{"x": {"min": [2], "opt": [2], "max": [2]}}]


def test_texts_of_all_lengths_fit_the_optimal_shapes() -> None:
    tokens = {"min": [1, 1], "opt": [2, 512], "max": [8, 1024]}
    latents = {"min": [1, 4, 8], "opt": [2, 4, 16], "max": [8, 4, 32]}
    profile = {"input_ids": tokens, "attention_mask": tokens, "sample": latents}
    smallest = {"optimization_level": 0, "workspace_mb": 256}
    less, _ = ladder.with_less({"name": "a", "options": smallest, "profiles": [profile]})
    any_length = {"min": [2, 1], "opt": [2, 512], "max": [2, 1024]}
    fixed = dict.fromkeys(("min", "opt", "max"), [2, 4, 16])
    assert less["profiles"] == [{"input_ids": any_length, "attention_mask": any_length, "sample": fixed}]
    assert ladder.with_less(less) is None


def test_what_never_suffices_is_an_error() -> None:
    with pytest.raises(
        BuildMemoryError, match="a: TensorRT for RTX 1 ran out of memory: bad_alloc; build with smaller"
    ):
        ladder.build(job("a"), None, command=simulated("fail('build', 'bad_alloc')"))


def test_another_error_is_not_tried_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    command = simulated(f"open({str(log)!r}, 'a').write('x')", "fail('build', 'no Int4')")
    with pytest.raises(EngineBuildError, match="no Int4"):
        ladder.build(job("a", "b"), None, command=command)
    assert log.read_text() == "x"


def test_components_are_built_at_the_same_time(tmp_path: Path) -> None:
    # Each waits for the other.
    command = simulated(
        f"open({str(tmp_path)!r} + '/' + c['name'], 'w').close()",
        f"[time.sleep(0.02) for _ in range(1000) if len(os.listdir({str(tmp_path)!r})) < 2]",
        f"assert len(os.listdir({str(tmp_path)!r})) == 2",
    )
    events: list[ProgressEvent] = []
    built = ladder.build(job("a", "b"), events.append, jobs=2, command=command)
    assert built.keys() == {"a", "b"}
    assert events[-1].completed == events[-1].total == 200


def test_the_first_error_ends_the_others() -> None:
    command = simulated("time.sleep(60) if c['name'] == 'b' else fail('build', 'no Int4')")
    started = time.monotonic()
    with pytest.raises(EngineBuildError, match="a: .*no Int4"):
        ladder.build(job("a", "b"), None, jobs=2, command=command)
    assert time.monotonic() - started < 30


def test_what_takes_more_than_its_share_is_built_with_all_of_it_before_less_is_tried(
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = simulated("if job['memory_limit_bytes'] < 8e9 and c['name'] != 'c': fail('build', 'bad_alloc')")
    events: list[ProgressEvent] = []
    limited = {**job("a", "b", "c"), "memory_limit_bytes": 8_000_000_000}
    built = ladder.build(limited, events.append, jobs=2, command=command)
    assert built == dict.fromkeys("abc", {"options": OPTIONS})
    assert events[-1].completed == 300
    said = sorted(record.getMessage() for record in caplog.records)
    assert said == [
        f"{name}: TensorRT for RTX 1 ran out of memory: bad_alloc; building it alone after the others"
        for name in "ab"
    ]


def test_the_error_after_the_last_thing_tried_names_the_whole_limit() -> None:
    command = simulated("if c['name'] == 'b': held = bytearray(200_000_000); time.sleep(60)")
    limited = {**job("a", "b"), "memory_limit_bytes": 80_000_000}
    with pytest.raises(
        BuildMemoryError, match=r"^b: building took more than the 0\.08 GB it may take; raise"
    ):
        ladder.build(limited, None, jobs=2, command=command)

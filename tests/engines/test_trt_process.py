from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from quest_deploy.config import ProgressEvent
from quest_deploy.engines.trt_process import OLDEST, BuildMemoryError, Progress, Tally, run_worker
from quest_deploy.errors import EngineBuildError

JOB = {
    "backend": "tensorrt-rtx",
    "timing_cache": None,
    "components": [
        {"name": name, "onnx": f"/x/{name}", "plan": "p", "profiles": [{}]} for name in ("a", "b")
    ],
}

# What TensorRT for RTX 1.7 says of types that a GPU lacks.
HARDWARE = "Cannot compile for target(s), because the model contains HW-specific datatypes"


def worker(*lines: str) -> list[str]:
    """A worker that reads the job, then runs these lines."""
    setup = ["import sys, json, os, time", "job = json.loads(sys.stdin.readline())"]
    send = "send = lambda **event: print(json.dumps(event), flush=True)"
    return [sys.executable, "-c", "\n".join([*setup, send, *lines])]


def run(command: list[str], progress: Progress | None = None, **more: int) -> dict[str, dict]:
    return run_worker({**JOB, **more}, Tally(progress, {"a": 1, "b": 1}), command)


def test_results_are_by_component() -> None:
    command = worker("for c in job['components']: send(event='built', component=c['name'], seconds=1.5)")
    assert run(command) == {"a": {"seconds": 1.5}, "b": {"seconds": 1.5}}


def test_progress_counts_a_hundred_units_a_component() -> None:
    events: list[ProgressEvent] = []
    command = worker(
        "send(event='progress', component='a', percent=40, phase='tuning')",
        "send(event='built', component='a')",
        "send(event='progress', component='b', percent=5, phase='tuning')",
        "send(event='built', component='b')",
    )
    run(command, events.append)
    assert [event.completed for event in events] == [40, 100, 105, 200]
    assert {event.total for event in events} == {200}
    assert events[0].message == "a: tuning"


def completed(tally_of: Callable[[Progress], Tally]) -> list[int]:
    events: list[ProgressEvent] = []
    tally = tally_of(events.append)
    tally.report("a", 40, "tuning")
    tally.finish("a")
    tally.report("b", 50, "tuning")
    tally.finish("b")
    assert {event.total for event in events} == {200}
    return [event.completed for event in events]


def test_large_components_count_for_more() -> None:
    assert completed(lambda told: Tally(told, {"a": 1, "b": 9})) == [8, 20, 110, 200]


def test_phases_count_for_their_share_of_the_time() -> None:
    assert completed(lambda told: Tally(told, {"a": 1, "b": 1}, phases_share=0.1)) == [4, 100, 105, 200]


def test_refused_graph_is_an_error_that_says_what_and_what_next() -> None:
    command = worker(
        "send(event='failed', kind='build', component='b', message='no Int4', tensorrt_version='1.7')",
        "sys.exit(1)",
    )
    expected = r"b: TensorRT for RTX 1\.7 cannot build '/x/b': no Int4; export the model again .*--target tensorrt-rtx"
    with pytest.raises(EngineBuildError, match=expected):
        run(command)


@pytest.mark.parametrize(
    ("backend", "version", "old"),
    [
        ("tensorrt", "10.11.0.33", True),
        ("tensorrt", "10.12.0.36", False),
        ("tensorrt", "11.0.0.1", False),
        ("tensorrt-rtx", "1.6.1.120", True),
        ("tensorrt-rtx", "1.7.1.116", False),
    ],
)
def test_a_library_that_is_older_than_what_exports_need_is_to_be_replaced(
    backend: str, version: str, old: bool
) -> None:
    command = worker(
        f"send(event='failed', kind='build', component='a', message='output_dtype', tensorrt_version='{version}')"
    )
    with pytest.raises(
        EngineBuildError, match=r"a: TensorRT .* cannot build '/x/a': output_dtype; "
    ) as caught:
        run_worker({**JOB, "backend": backend}, Tally(None, {"a": 1}), command)
    upgrade = f"and later: run `pip install --upgrade 'quest-deploy[{backend}]'`"
    assert (upgrade in str(caught.value)) == old


def test_the_oldest_libraries_are_those_that_are_installed_with_quest_deploy(repository: Path) -> None:
    pyproject = (repository / "pyproject.toml").read_text(encoding="utf-8")
    for package, backend in (("tensorrt", "tensorrt"), ("tensorrt-rtx-cu13", "tensorrt-rtx")):
        assert f'"{package}>={".".join(map(str, OLDEST[backend]))}"' in pyproject


@pytest.mark.parametrize(
    ("reason", "remedy"),
    [
        ("no INT4", "pass"),
        ("FP32 GEMM is not supported", "export with `.* --target tensorrt-rtx --dtype fp16`, or pass"),
        (f"{HARDWARE}: b16.", "export with `.* --target tensorrt-rtx --dtype fp16`, or pass"),
        (f"{HARDWARE}: int4.", "export with `.* --target tensorrt-rtx --mode int8 --dtype fp16`, or pass"),
    ],
)
@pytest.mark.parametrize("name", ["SM75", "sm75"])
def test_graph_that_one_gpu_does_not_take_is_to_be_built_for_others(
    name: str, reason: str, remedy: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    message = f"Turing ({name}): {reason}"
    command = worker(
        f"send(event='failed', kind='build', component='a', message='{message}', tensorrt_version='1.7')",
        "sys.exit(1)",
    )
    options = {"compute_capabilities": ["7.5", "8.6"]}
    job = {**JOB, "components": [{"name": "a", "onnx": "/x/a", "options": options}]}
    expected = (
        rf"a: .*{re.escape(reason)}; {remedy} --compute-capability with one of 8\.0, 8\.6, .* instead of 7\.5"
    )
    with pytest.raises(EngineBuildError, match=expected):
        run_worker(job, Tally(None, {"a": 1}), command)


@pytest.mark.parametrize(
    "message",
    [
        "Tactic Selection: no tactics to implement the operation within workspace limit.",
        "Could not find any implementation for node x due to insufficient workspace.",
    ],
)
def test_a_workspace_that_is_too_small_is_to_be_larger(message: str) -> None:
    command = worker(
        f"send(event='failed', kind='build', component='a', message='{message}', tensorrt_version='1.7')",
        "sys.exit(1)",
    )
    components = [{"name": "a", "onnx": "/x/a", "options": {"workspace_mb": 1}}]
    with pytest.raises(EngineBuildError, match="raise --workspace, which was 1 MiB, or leave it out"):
        run_worker({**JOB, "components": components}, Tally(None, {"a": 1}), command)


@pytest.mark.parametrize(
    "message",
    [
        "Error Code 4: (IMatrixMultiplyLayer MatMul: v60: tensor volume exceeds 1099511627776, dimensions are [2,9])",
        "Internal Error (kOPT values for profile 0 violate shape constraints: Condition '<' violated: 9 >= 8.)",
        "IOptimizationProfile::setDimensions: Error Code 3: API Usage Error (Parameter check failed)",
    ],
)
def test_graph_that_is_too_large_is_to_be_built_for_smaller_shapes(message: str) -> None:
    command = worker(
        f"send(event='failed', kind='build', component='a', message={message!r}, tensorrt_version='1.7')"
    )
    with pytest.raises(EngineBuildError, match="smaller ones .*--max-batch.*--opt-height") as caught:
        run(command)
    assert message in str(caught.value) and "export the model again" not in str(caught.value)


def test_plan_that_cannot_be_written_is_an_os_error() -> None:
    command = worker(
        "send(event='failed', kind='storage', component='a', errno=28, filename='/full/p', tensorrt_version='')",
        "sys.exit(1)",
    )
    with pytest.raises(OSError, match="No space left on device: '/full/p'"):
        run(command)


def test_crash_is_an_error_with_the_signal() -> None:
    with pytest.raises(EngineBuildError, match="died .SIGSEGV"):
        run(worker("os.kill(os.getpid(), 11)"))


def test_kill_points_at_memory() -> None:
    with pytest.raises(EngineBuildError, match="a: .*SIGKILL.*out of memory"):
        run(worker("os.kill(os.getpid(), 9)"))


def test_a_process_that_takes_more_memory_than_it_may_is_ended() -> None:
    command = worker(
        "send(event='built', component='a', seconds=1)", "held = bytearray(400_000_000)", "time.sleep(60)"
    )
    message = r"b: building took more than the 0\.2 GB it may take; raise --memory-limit, or .*--max-batch"
    with pytest.raises(BuildMemoryError, match=message) as caught:
        run(command, memory_limit_bytes=200_000_000)
    assert caught.value.component == "b" and caught.value.built == {"a": {"seconds": 1}}


BUILT = "for c in job['components']: send(event='built', component=c['name'])"


@pytest.mark.parametrize(
    "death",
    [
        "held = bytearray(400_000_000); time.sleep(60)",
        "os.kill(os.getpid(), 11)",
        "print('{', end='', flush=True)",
    ],
    ids=["memory", "crash", "line"],
)
def test_engines_that_are_all_built_survive_their_process(death: str) -> None:
    assert run(worker(BUILT, death), memory_limit_bytes=200_000_000).keys() == {"a", "b"}


def test_a_process_that_dies_in_the_middle_of_a_line_is_an_error_with_the_signal() -> None:
    command = worker("print('{\"event\": \"bu', end='', flush=True)", "os.kill(os.getpid(), 11)")
    with pytest.raises(EngineBuildError, match="died .SIGSEGV"):
        run(command)


def test_exit_tells_the_last_line_of_its_errors() -> None:
    with pytest.raises(EngineBuildError, match="exit status 3.*last words: bad_alloc"):
        run(worker("print('x\\nbad_alloc', file=sys.stderr)", "sys.exit(3)"))


def test_worker_that_dies_before_it_reads_is_an_error() -> None:
    with pytest.raises(EngineBuildError, match="exit status 2"):
        run([sys.executable, "-c", "import os; os.close(0); os._exit(2)"])

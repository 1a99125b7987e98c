"""The GPU check, as far as a machine without a GPU goes: it says so, and loses no step that another one spoils."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from quest_deploy.bench.subject import WAYS
from quest_deploy.commands import main
from quest_deploy.engines.libraries import Gpu, gpus
from quest_deploy.errors import MissingDependencyError
from scripts import gpu_check, gpu_measure
from scripts.gpu_check import NAME, Report, choose_backend, run_all, run_step
from scripts.gpu_steps import Step, steps, without_engines


def plan(folder: Path, backend: str, capability: str) -> tuple[Step, ...]:
    return steps(folder, folder / "recipe.yaml", backend, capability)


@pytest.fixture(params=[("tensorrt", "9.0"), ("tensorrt-rtx", "8.9"), ("tensorrt-rtx", "7.5")], ids=" ".join)
def planned(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Step, ...]:
    return plan(tmp_path, *request.param)


def code(text: str, **changes: object) -> Step:
    return Step(**{"name": text, "command": ("-c", text), **changes})


def soon() -> float:
    return time.monotonic() + 60


def test_shell_script_parses(repository: Path) -> None:
    subprocess.run(["bash", "-n", str(repository / "scripts" / "gpu_check.sh")], check=True)


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_without_a_gpu_one_message_and_a_json_that_says_so(repository: Path, tmp_path: Path) -> None:
    # As some packages install one.
    (tmp_path / "site" / "scripts").mkdir(parents=True)
    (tmp_path / "site" / "scripts" / "__init__.py").touch()
    places = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [str(repository / "scripts" / "gpu_check.sh"), "--output", str(tmp_path)],
        capture_output=True,
        text=True,
        env={"PYTHON": sys.executable, **places},
    )
    assert_says_so(done, tmp_path)


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_a_machine_without_git_is_no_hindrance(repository: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.gpu_check", "--output", str(tmp_path)],
        cwd=repository,
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert assert_says_so(done, tmp_path)["commit"] is None


def assert_says_so(done: subprocess.CompletedProcess[str], tmp_path: Path) -> dict[str, Any]:
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("Error: this machine offers no NVIDIA GPU") and done.stderr.count("\n") == 1
    (written,) = tmp_path.glob(f"*/{NAME}")
    found = json.loads(written.read_text())
    assert "no NVIDIA GPU" in found["error"] and found["steps"] == [] and found["gpus"] == []
    assert {"date", "versions", "commit", "uncommitted_changes", "machine"} <= found.keys()
    return dict(found)


def test_calls_of_the_command_line_are_valid(planned: tuple[Step, ...]) -> None:
    calls = [step.command[2:] for step in planned if step.command[1] == "quest_deploy.commands"]
    assert len(calls) > 10
    for name, *arguments in calls:
        command = main.get_command(click.Context(main), name)
        assert command is not None
        command.make_context(name, arguments)


def test_ways_that_bench_is_given_exist(planned: tuple[Step, ...]) -> None:
    words = [word for step in planned if "bench" in step.command for word in step.command]
    ways = {word.rpartition(":")[2] for word in words if ":" in word and "torch" not in word}
    assert ways and ways <= WAYS.keys()


def test_turing_is_asked_for_where_tensorrt_rtx_wants_it(tmp_path: Path) -> None:
    """Its engines for no GPU in particular do not run there, and products in float32 do not build."""
    given = {
        (backend, capability): [
            "--compute-capability" in step.command
            for step in plan(tmp_path, backend, capability)
            if "build-engine" in step.command
        ]
        for backend, capability in (("tensorrt", "7.5"), ("tensorrt-rtx", "8.9"), ("tensorrt-rtx", "7.5"))
    }
    assert all(given.pop(("tensorrt-rtx", "7.5"))) and not any(map(any, given.values()))
    exports = [step.command for step in plan(tmp_path, "tensorrt-rtx", "7.5") if "export" in step.command]
    assert exports and all("fp16" in command for command in exports)


def test_a_gpu_that_no_installed_tensorrt_takes_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def check(backend: str) -> None:
        if backend == "tensorrt":
            raise MissingDependencyError("TensorRT is not installed")

    monkeypatch.setattr(gpu_check, "check_tensorrt", check)
    with pytest.raises(MissingDependencyError, match=r"compute capability 9\.0; run .* --backend none"):
        choose_backend(None, "9.0")
    assert choose_backend(None, "7.5") == choose_backend("tensorrt-rtx", "9.0") == "tensorrt-rtx"


def test_torch_for_a_newer_cuda_than_the_drivers_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "gpus", lambda: [Gpu(name="NVIDIA X", compute_capability="8.9")])
    monkeypatch.setattr("quest_deploy.engines.libraries.driver_version", lambda: "535.54")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "that driver 535.54 runs, or a newer driver" in gpu_check.problem_of_the_gpu()


INTERRUPTED = """
import sys
from quest_deploy.engines.libraries import Gpu
from scripts import gpu_check
from scripts.gpu_steps import Step

gpu_check.gpus = lambda: [Gpu(name="NVIDIA X", compute_capability="8.9")]
gpu_check.problem_of_the_gpu = lambda: ""
gpu_check.choose_backend = lambda wanted, capability: "tensorrt-rtx"
sleep = "import os, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
command = ("-c", "import sys; " + sleep, sys.argv[1])
gpu_check.steps = lambda *words: (Step(name="sleep", command=command),)
sys.argv[1:] = ["--output", sys.argv[2]]
sys.exit(gpu_check.main())
"""


def test_an_interrupted_check_ends_its_step(repository: Path, tmp_path: Path) -> None:
    """SIGTERM, which a batch system sends: the step kept the GPU."""
    noted = tmp_path / "step"
    check = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, str(noted), str(tmp_path / "out")],
        cwd=repository,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    while not (noted.is_file() and noted.read_text()):
        assert check.poll() is None
        time.sleep(0.02)
    check.terminate()
    _, said = check.communicate(timeout=30)
    assert check.returncode == 130 and said.startswith("interrupted; the steps before are in ")
    assert not Path("/proc", noted.read_text()).exists()


def test_paths_are_those_of_where_the_script_is_called(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    (tmp_path / "bin" / "python").chmod(0o755)
    done = subprocess.run(
        [str(repository / "scripts" / "gpu_check.sh"), "--minutes", "1"],
        cwd=tmp_path,
        env={"PYTHON": "bin/python", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.stdout == f"{repository} -m scripts.gpu_check --called-from {tmp_path} --minutes 1\n"


def test_steps_read_what_earlier_ones_make(planned: tuple[Step, ...]) -> None:
    made: set[str] = set()
    for step in planned:
        assert set(step.needs) <= made, step.name
        made.add(step.makes)


def test_result_is_the_last_line(tmp_path: Path) -> None:
    row = run_step(code("print('noise'); print('{\"figure\": 1}')"), tmp_path, soon())
    assert row["ok"] and row["result"] == {"figure": 1} and "error" not in row


def test_message_of_a_step_that_fails_is_kept_word_for_word(tmp_path: Path) -> None:
    message = '{"error": {"type": "StaleArtifactError", "message": "TensorRT says: no"}}'
    row = run_step(code(f"print('{message}'); raise SystemExit(1)"), tmp_path, soon())
    assert (row["ok"], row["exit_code"], row["error"]) == (False, 1, "TensorRT says: no")


def test_figures_of_a_parity_over_its_budget_are_kept(tmp_path: Path) -> None:
    row = run_step(code('print(\'{"verdict": "failed"}\'); raise SystemExit(3)'), tmp_path, soon())
    assert not row["ok"] and row["result"] == {"verdict": "failed"} and row["error"]


def test_a_bench_with_a_row_that_failed_is_not_ok_and_keeps_its_figures(tmp_path: Path) -> None:
    result = {"bench": {"rows": {"model": {"loop": 1}, "engines": {"error": "killed"}}}}
    row = run_step(code(f"print({json.dumps(result)!r})"), tmp_path, soon())
    assert (row["ok"], row["exit_code"], row["error"]) == (False, 0, "engines: killed")
    assert row["result"] == result


def test_figures_beside_an_error_are_kept(tmp_path: Path) -> None:
    rows = {"model": {"error": "no"}, "engines": {"loop": 1}}
    result = {"error": {"type": "BenchError", "message": "model: no"}, "bench": {"rows": rows}}
    row = run_step(code(f"print({json.dumps(result)!r}); raise SystemExit(1)"), tmp_path, soon())
    assert (row["ok"], row["error"], row["result"]) == (False, "model: no", result)


def test_engines_that_run_without_their_graphs_are_a_failure_that_stops_no_other_step(tmp_path: Path) -> None:
    report = Report(path=tmp_path / NAME, header={})
    result = json.dumps({"ok": True, "problems": ["no CUDA graph of the denoiser was captured"]})
    warned = f"import sys; print('runs without CUDA graphs', file=sys.stderr); print({result!r})"
    run_all(report, (code(warned), code("print('{}')", after=warned)), soon())
    first, second = report.steps
    assert (first["ok"], first["error"]) == (False, "no CUDA graph of the denoiser was captured")
    assert first["said"] == "runs without CUDA graphs" and second["ok"]


@pytest.mark.parametrize(
    ("count", "changed", "problems"),
    [
        (1, 0.0, []),
        (0, 0.0, ["no CUDA graph of the denoiser was captured"]),
        (1, 0.25, ["with CUDA graphs latents differ by up to 0.25"]),
        (1, float("nan"), ["with CUDA graphs latents differ by up to nan"]),
    ],
)
def test_graphs_that_draw_something_else_or_are_none_are_told(
    monkeypatch: pytest.MonkeyPatch, count: int, changed: float, problems: list[str]
) -> None:
    def measure(path: Path, *, graphs: bool) -> tuple[list[float], torch.Tensor, int]:
        return [1.0], torch.ones(1, 4, 2, 2) + (changed if graphs else 0), count if graphs else 0

    monkeypatch.setattr(gpu_measure, "measure", measure)
    found = gpu_measure.compare_graphs(Path("engines"))
    assert found["problems"] == problems and json.dumps(found, allow_nan=False)


def test_a_bench_whose_rows_all_went_well_is_ok(tmp_path: Path) -> None:
    assert run_step(code('print(\'{"bench": {"rows": {"a": {"loop": 1}}}}\')'), tmp_path, soon())["ok"]


def test_step_that_takes_too_long_is_stopped(tmp_path: Path) -> None:
    started = time.monotonic()
    row = run_step(code("import time; time.sleep(60)"), tmp_path, time.monotonic() + 1)
    assert row["error"] == "stopped: the time was up" and time.monotonic() - started < 30


def test_one_failure_loses_no_other_step(tmp_path: Path) -> None:
    report = Report(path=tmp_path / NAME, header={"date": "today"})
    planned = (
        code("print('{}')"),
        code("raise SystemExit('broken')", makes="engines"),
        code("print('{}')", needs=("engines",)),
        code("print('[2]')"),
    )
    run_all(report, planned, soon())
    found = json.loads(report.path.read_text())
    assert [row["ok"] for row in found["steps"]] == [True, False, False, True]
    assert [row.get("error", "") for row in found["steps"]][1:3] == [
        "broken",
        "not run: an earlier step did not make engines",
    ]


def test_nothing_is_started_when_no_time_is_left(tmp_path: Path) -> None:
    row = run_step(code("open('started', 'w')"), tmp_path, time.monotonic())
    assert row["error"] == "not run: no time was left" and "seconds" not in row


def test_a_step_that_would_show_nothing_is_left_out(tmp_path: Path) -> None:
    step = Step(name="build more", command=("-c", "print('{}')"), after="run its engines")
    row = run_step(step, tmp_path, time.monotonic() + 60)
    assert (row["ok"], row["error"]) == (False, "not run: 'run its engines' failed")
    assert run_step(step, tmp_path, time.monotonic() + 60, {"run its engines"})["ok"]


def test_torch_alone_makes_no_engines(planned: tuple[Step, ...]) -> None:
    left = [step.name for step in without_engines(planned)]
    assert "parity of torch on the GPU" in left and "bench: torch alone" in left
    assert not [name for name in left if "engine" in name or "export" in name]

"""Run all that only a GPU can show, and write what came of it as one JSON: see ``scripts/gpu_check.sh``.

The bundled model goes the whole way to an engine, which is compared with the rungs above it. Speed is measured on a
model of Stable Diffusion's size with random weights, beside which the loop around the engines is small. Each step is a
process of its own: one that fails or takes too long loses none of the others, and those that need what it makes say so.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.environment import git, machine, now, uncommitted_changes
from benchmarks.settings import ROOT, one_update, write_recipe
from quest_deploy.engines.arithmetic import parse_capability, rtx_runs
from quest_deploy.engines.libraries import check_tensorrt, gpus, title_of, without_cuda
from quest_deploy.errors import ConfigError, MissingDependencyError
from quest_deploy.manifest import tool_versions
from scripts.gpu_steps import Step, steps, without_engines

NAME = "gpu-check.json"
LAST_CHARACTERS = 2000
TORCH_ALONE = "none"
NO_GPU = "this machine offers no NVIDIA GPU (no NVIDIA driver): run it on one that does"


@dataclass(kw_only=True)
class Report:
    """What is written, again after each step."""

    path: Path
    header: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    def write(self) -> None:
        """Replace the file at once, so that a reader never finds half of it."""
        content = {**self.header, "error": self.error, "steps": self.steps}
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)


def run_step(step: Step, output: Path, deadline: float, succeeded: Collection[str] = ()) -> dict[str, Any]:
    """Run one step, and kill it with its children when the time is up.

    Args:
        step: What to run.
        output: Where the steps' results lie.
        deadline: On :func:`time.monotonic`'s clock.
        succeeded: The steps whose process ended well so far, whatever is wrong with what it found.
    """
    row: dict[str, Any] = {"name": step.name, "ok": False, "command": " ".join(("python", *step.command))}
    missing = [name for name in step.needs if not (output / name).exists()]
    left = deadline - time.monotonic()
    if missing:
        return {**row, "error": f"not run: an earlier step did not make {', '.join(missing)}"}
    if step.after and step.after not in succeeded:
        return {**row, "error": f"not run: '{step.after}' failed"}
    if left <= 0:
        return {**row, "error": "not run: no time was left"}
    started = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *step.command],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    try:
        printed, said = process.communicate(timeout=left)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        _, said = process.communicate()
        seconds = round(time.monotonic() - started, 1)
        return {
            **row,
            "seconds": seconds,
            "error": "stopped: the time was up",
            "said": said[-LAST_CHARACTERS:],
        }
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # a Ctrl-C does not reach it by itself
        process.wait()
        raise
    row |= {"seconds": round(time.monotonic() - started, 1), "exit_code": process.returncode}
    result = last_json(printed)
    error = reported_error(result)
    row["ok"] = process.returncode == 0 and not error
    if not row["ok"]:
        row["error"] = error or said[-LAST_CHARACTERS:].strip() or f"ended with code {process.returncode}"
    # A parity over its budget, or a bench with a row that failed, has figures all the same; a good step may warn.
    return {**row, "result": result, "said": said[-LAST_CHARACTERS:].strip()}


def reported_error(result: Any) -> str:
    """What a step's result says went wrong, in the whole of it or in parts; empty where nothing did."""
    if not isinstance(result, dict):
        return ""
    if result.get("error"):
        return str(result["error"]["message"])
    if result.get("problems"):
        return "; ".join(result["problems"])
    rows = result.get("bench", {}).get("rows", {})
    return "; ".join(f"{label}: {row['error']}" for label, row in rows.items() if "error" in row)


def last_json(printed: str) -> Any:
    """What the last line holds; None where that is not JSON."""
    lines = printed.strip().splitlines()
    try:
        return json.loads(lines[-1]) if lines else None
    except json.JSONDecodeError:
        return None


def problem_of_the_gpu() -> str:
    """Why nothing can be checked here; empty where it can."""
    if not gpus():
        return NO_GPU
    import torch

    if not torch.cuda.is_available():
        return f"this machine has a GPU, but {without_cuda(torch.__version__)}"
    return ""


def choose_backend(wanted: str | None, capability: str) -> str:
    """The flavour asked for, or TensorRT where it is installed, else TensorRT for RTX.

    Args:
        wanted: None where nothing was asked for.
        capability: Of the GPU.

    Raises:
        MissingDependencyError: it is not installed, or, where nothing was asked for, does not support the GPU.
    """
    if wanted is None:
        try:
            check_tensorrt("tensorrt")
            return "tensorrt"
        except MissingDependencyError:
            wanted = "tensorrt-rtx"
        if not rtx_runs(parse_capability(capability)):
            raise MissingDependencyError(
                f"{title_of('tensorrt')} is not installed, and {title_of(wanted)} does not support a GPU of compute "
                f"capability {capability}; run `{sys.executable} -m pip install 'tensorrt>=10.12'`, or measure torch "
                f"without engines: --backend {TORCH_ALONE}"
            )
    if wanted != TORCH_ALONE:
        check_tensorrt(wanted)
    return wanted


def main() -> int:
    """Check, report, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--backend",
        choices=("tensorrt", "tensorrt-rtx", TORCH_ALONE),
        help=f"default: what is installed; {TORCH_ALONE} is for a GPU that TensorRT refuses",
    )
    parser.add_argument("--output", type=Path, help="default: artifacts/gpu-check in the checkout")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all steps together")
    parser.add_argument("--called-from", type=Path, default=Path(), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    wanted = ROOT / "artifacts" / "gpu-check"
    if arguments.output is not None:
        wanted = arguments.called_from / arguments.output
    # Of its own, because no step replaces what another run made.
    output = Path(os.path.relpath(wanted, ROOT)) / time.strftime("%Y%m%d-%H%M%S")
    os.chdir(ROOT)
    output.mkdir(parents=True)
    header = {
        "date": now(),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": uncommitted_changes(),
        "machine": machine(),
        "gpus": [asdict(gpu) for gpu in gpus()],
        "versions": tool_versions(),
    }
    report = Report(path=output / NAME, header=header)
    report.error = problem_of_the_gpu()
    if not report.error:
        try:
            capability = gpus()[0].compute_capability
            report.header["backend"] = choose_backend(arguments.backend, capability)
        except (ConfigError, MissingDependencyError) as error:
            report.error = str(error)
    if report.error:
        report.write()
        print(f"Error: {report.error}; written to {report.path.resolve()}", file=sys.stderr)
        return 1
    recipe = write_recipe(one_update(weight_bits=4, batch_size=1), output)
    backend = report.header["backend"]
    planned = steps(output, recipe, "tensorrt" if backend == TORCH_ALONE else backend, capability)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_all(report, without_engines(planned) if backend == TORCH_ALONE else planned, deadline)
    except KeyboardInterrupt:
        print(f"interrupted; the steps before are in {report.path.resolve()}", file=sys.stderr)
        return 130
    failed = [row["name"] for row in report.steps if not row["ok"]]
    print(
        f"{len(report.steps) - len(failed)} of {len(report.steps)} steps went well: {report.path.resolve()}"
    )
    return 1 if failed else 0


def run_all(report: Report, planned: tuple[Step, ...], deadline: float) -> None:
    """Run every step, and write the report after each."""
    for number, step in enumerate(planned, start=1):
        print(f"[{number}/{len(planned)}] {step.name}", flush=True)
        succeeded = {row["name"] for row in report.steps if row.get("exit_code") == 0}
        row = run_step(step, report.path.parent, deadline, succeeded)
        report.steps.append(row)
        report.write()
        print(f"    {'ok' if row['ok'] else row['error'].strip()[-300:]}", flush=True)


if __name__ == "__main__":
    sys.exit(main())

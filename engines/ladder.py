"""Builds the components of a job, some at a time, and tries again with less where memory did not suffice."""

from __future__ import annotations

import logging
import subprocess
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from quest_deploy.engines.trt_process import WORKER, BuildMemoryError, Progress, Tally, run_worker

logger = logging.getLogger(__name__)

Component = Mapping[str, Any]

# TensorRT's own optimization level is 3, and its workspace all memory of the GPU.
LOWEST_LEVEL = 0
WORKSPACES_MB = (1024, 256)

# Of text encoders.
TEXT_INPUTS = ("input_ids", "attention_mask")

# TensorRT tells of every kernel that it times. TensorRT for RTX is through its phases at once, and then compiles in
# silence: 95 % of the time of the bundled model's U-Net.
PHASES_SHARE = {"tensorrt": 1.0, "tensorrt-rtx": 0.05}


def build(
    job: Mapping[str, Any], progress: Progress | None, *, jobs: int = 1, command: Sequence[str] = WORKER
) -> dict[str, dict[str, Any]]:
    """Build all components of a job.

    Args:
        job: As :func:`run_worker` takes it; ``memory_limit_bytes`` is that of all processes together.
        progress: Called with 100 units for each component, divided among them by their sizes.
        jobs: Components at a time, each in a process of its own; one that memory does not suffice for beside others is
            built once more after them, alone, before anything is given up.
        command: How to start a process.

    Returns:
        The fields of the ``built`` event, by component; with ``fallback``, what was given up for want of memory, and
        with ``profiles`` where that changed them.

    Raises:
        BuildMemoryError: memory does not suffice for the least that can be built.
        EngineBuildError: TensorRT refused a graph, or a process died.
        OSError: a plan could not be written.
    """
    tally = Tally(
        progress,
        {component["name"]: graph_bytes(Path(component["onnx"])) for component in job["components"]},
        phases_share=PHASES_SHARE[job["backend"]],
    )
    jobs = max(1, min(jobs, len(job["components"])))
    if jobs == 1:
        return _in_turn(job, tally, command, _Processes())
    parts = [{**job, "components": [component]} for component in job["components"]]
    built = _at_a_time(parts, tally, command, jobs)
    for part in parts:
        if part["components"][0]["name"] not in built:
            built |= _in_turn(part, tally, command, _Processes())
    return built


def _at_a_time(
    parts: Sequence[Mapping[str, Any]], tally: Tally, command: Sequence[str], jobs: int
) -> dict[str, dict[str, Any]]:
    """Build jobs of one component each, `jobs` of them at a time; without those that memory did not suffice for."""
    limit = parts[0].get("memory_limit_bytes")
    share = None if limit is None else limit // jobs
    processes = _Processes()

    def once(part: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
        try:
            return run_worker({**part, "memory_limit_bytes": share}, tally, command, processes.add)
        except BuildMemoryError as error:
            if processes.ended:
                raise
            logger.warning("%s; building it alone after the others", str(error).partition(";")[0])
            return {}

    with ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(once, part) for part in parts]
            wait(futures, return_when=FIRST_EXCEPTION)
            failed = [future for future in futures if future.done() and future.exception() is not None]
            if failed:
                failed[0].result()
        finally:
            # Whatever ended this early must not leave the others running.
            processes.end()
            pool.shutdown(wait=False, cancel_futures=True)
    return {name: fields for future in futures for name, fields in future.result().items()}


def graph_bytes(path: Path) -> int:
    """Size of an ONNX file with its weights, which may lie beside it; 1 at least."""
    return max(1, sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*")))


class _Processes:
    """The processes of a build, which end together."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: list[subprocess.Popen[str]] = []
        self.ended = False

    def add(self, process: subprocess.Popen[str]) -> None:
        with self.lock:
            self.running.append(process)
            if self.ended:
                process.kill()

    def end(self) -> None:
        with self.lock:
            self.ended = True
            for process in self.running:
                if process.poll() is None:
                    process.kill()


def _in_turn(
    job: Mapping[str, Any], tally: Tally, command: Sequence[str], processes: _Processes
) -> dict[str, dict[str, Any]]:
    built: dict[str, dict[str, Any]] = {}
    given_up: dict[str, list[str]] = {}
    todo: dict[str, Component] = {component["name"]: component for component in job["components"]}
    while len(built) < len(todo):
        left = [component for name, component in todo.items() if name not in built]
        try:
            built |= run_worker({**job, "components": left}, tally, command, processes.add)
        except BuildMemoryError as error:
            built |= error.built
            name = error.component
            less = None if processes.ended else with_less(todo[name])
            if less is None:
                raise
            todo[name], words = less
            given_up.setdefault(name, []).append(words)
            logger.warning("%s; trying again with %s", str(error).partition(";")[0], words)
    for name, all_words in given_up.items():
        built[name] |= {"fallback": all_words, "profiles": todo[name]["profiles"]}
    return built


def with_less(component: Component) -> tuple[dict[str, Any], str] | None:
    """The next thing to try for a component that memory did not suffice for, and its name; None after the last."""
    options = component["options"]
    if options.get("optimization_level") != LOWEST_LEVEL:
        changed = {**options, "optimization_level": LOWEST_LEVEL}
        return {**component, "options": changed}, f"optimization level {LOWEST_LEVEL}"
    workspace = options.get("workspace_mb")
    for smaller in WORKSPACES_MB:
        if workspace is None or smaller < workspace:
            changed = {**options, "workspace_mb": smaller}
            return {**component, "options": changed}, f"a workspace of {smaller} MiB"
    fixed = [
        {name: _optimal(name, shapes) for name, shapes in profile.items()}
        for profile in component["profiles"]
    ]
    if fixed != component["profiles"]:
        return {**component, "profiles": fixed}, "the optimal shapes alone"
    return None


def _optimal(name: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """The optimal shape of an input alone; texts keep their range of tokens, since a pipeline needs all of it."""
    batch, *sizes = shapes["opt"]
    return {edge: [batch, *(shape[1:] if name in TEXT_INPUTS else sizes)] for edge, shape in shapes.items()}

"""Runs the building process, turns its events into progress and its end into errors, and never leaves it behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from typing import Any

from quest_deploy.config import ProgressEvent
from quest_deploy.engines.libraries import title_of
from quest_deploy.errors import EngineBuildError

logger = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "quest_deploy.engines.trt_worker")
_TAIL_BYTES = 2000

Progress = Callable[[ProgressEvent], None]


def run_worker(
    job: Mapping[str, Any], progress: Progress | None = None, command: Sequence[str] = WORKER
) -> dict[str, dict[str, Any]]:
    """Build the engines of a job in a process of their own.

    Args:
        job: ``backend``, ``timing_cache`` and ``components`` (each with ``name``, ``onnx``, ``plan``, ``profile``).
        progress: Called with 100 units for each component.
        command: How to start the worker.

    Returns:
        The fields of the ``built`` event, by component.

    Raises:
        EngineBuildError: TensorRT refused a graph, or the worker died.
        OSError: a plan could not be written.
    """
    built: dict[str, dict[str, Any]] = {}
    names = [component["name"] for component in job["components"]]
    # Closed at once: an interruption must end the worker before what it writes to is removed.
    with contextlib.closing(_events(job, command)) as events:
        for event in events:
            kind = event.pop("event")
            if kind == "log":
                _log(event)
            elif kind == "progress":
                _report(progress, names, event["component"], event["percent"], event["phase"])
            elif kind == "built":
                built[event.pop("component")] = event
                _report(progress, names, names[len(built) - 1], 100, "done")
            else:
                raise _failure(job, event)
    return built


def _events(job: Mapping[str, Any], command: Sequence[str]) -> Generator[dict[str, Any], None, None]:
    """Start the worker, give it the job, and yield its events until it ends well."""
    with tempfile.TemporaryFile() as stderr:
        # A session of its own: Ctrl-C reaches this process alone, which then decides what becomes of the worker.
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            encoding="utf-8",
            env=_environment(job["backend"]),
            start_new_session=True,
        )
        try:
            yield from _read(process, job)
            if (status := process.wait()) != 0:
                stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _TAIL_BYTES))
                raise _death(job, status, stderr.read().decode(errors="replace"))
        finally:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


def _read(process: subprocess.Popen[str], job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the worker was started without pipes")
    try:
        # Not closed afterwards: the worker exits when it is.
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return
    for line in process.stdout:
        yield json.loads(line)


def _environment(backend: str) -> dict[str, str]:
    """This process's environment, with the TensorRT flavour that Polygraphy binds to when it is imported."""
    flavour = "1" if backend == "tensorrt-rtx" else "0"
    # Safe path: no module of the user's working directory may shadow a library's.
    return {**os.environ, "POLYGRAPHY_USE_TENSORRT_RTX": flavour, "PYTHONSAFEPATH": "1"}


def _log(event: Mapping[str, Any]) -> None:
    """Pass a log record on. TensorRT's own warnings are for its developers; its errors end up in the exception."""
    ours = str(event["name"]).startswith("quest_deploy")
    level = event["level"] if ours else logging.DEBUG
    logger.log(level, "%s", event["message"])


def _report(
    progress: Progress | None, names: Sequence[str], component: str, percent: int, phase: str
) -> None:
    if progress is None:
        return
    completed = 100 * names.index(component) + percent
    message = f"{component}: {phase}"
    progress(
        ProgressEvent(stage="build-engine", completed=completed, total=100 * len(names), message=message)
    )


def _failure(job: Mapping[str, Any], event: Mapping[str, Any]) -> Exception:
    if event["kind"] == "storage":
        return OSError(event["errno"], os.strerror(event["errno"] or 0), event["filename"])
    component = event["component"]
    path = next(entry["onnx"] for entry in job["components"] if entry["name"] == component)
    return EngineBuildError(
        f"{component}: {title_of(job['backend'])} {event['tensorrt_version']} cannot build '{path}': "
        f"{event['message']}; export the model again with `quest-deploy export --target {job['backend']}`"
    )


def _death(job: Mapping[str, Any], status: int, stderr: str) -> EngineBuildError:
    how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
    memory = "; the machine may be out of memory" if -status == signal.SIGKILL else ""
    lines = stderr.strip().splitlines()
    last = f" Its last words: {lines[-1].strip()}" if lines else ""
    return EngineBuildError(
        f"the process that builds {title_of(job['backend'])} engines died ({how}){memory}.{last} "
        "Run it again with smaller --max-batch or image sizes, or with -v for its log"
    )

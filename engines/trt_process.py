"""Runs the building process, turns its events into progress and its end into errors, and never leaves it behind."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quest_deploy.config import ProgressEvent
from quest_deploy.engines.libraries import capability_of, supported_capabilities, title_of
from quest_deploy.errors import EngineBuildError

logger = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "quest_deploy.engines.trt_worker")
_TAIL_BYTES = 2000
WATCH_SECONDS = 0.1
_MEMORY = re.compile(
    r"out of memory|OutOfMemory|insufficient memory|bad_alloc|cannot allocate memory", re.IGNORECASE
)

_SHAPES = re.compile(r"volume exceeds|setDimensions|shape constraints")
_WORKSPACE = re.compile(r"workspace", re.IGNORECASE)
_CAPABILITY = re.compile(r"\bSM\d\d+\b", re.IGNORECASE)
# What a GPU lacks, and the options of `export` that do without it.
_LACKING = (
    (re.compile(r"\bFP32\b.* not supported|datatypes:.*\bb16\b"), "--dtype fp16"),
    (re.compile(r"datatypes:.*\bint4\b"), "--mode int8 --dtype fp16"),
)

OLDEST = {"tensorrt": (10, 12), "tensorrt-rtx": (1, 7)}
"""By backend: the first that gives the values of a DequantizeLinear in another type than its scales', as in fp16 and
bf16; and, tried, the first that builds convolutions in INT8."""

Progress = Callable[[ProgressEvent], None]


class BuildMemoryError(EngineBuildError):
    """A build that ran out of memory.

    Attributes:
        built: What was built before, by component.
        component: The one that was not.
    """

    def __init__(
        self, message: str, component: str = "", built: Mapping[str, dict[str, Any]] = MappingProxyType({})
    ) -> None:
        super().__init__(message)
        self.component = component
        self.built = dict(built)


class Tally:
    """How far all components are, in time as far as that can be told; several threads may report.

    Args:
        progress: Told, of 100 units for each component.
        sizes: Of the components in bytes, by name: what takes long to build is large.
        phases_share: The part of a component's time that its builder's phases stand for; the rest comes with its end.
    """

    def __init__(
        self, progress: Progress | None, sizes: Mapping[str, int], *, phases_share: float = 1.0
    ) -> None:
        self.progress = progress
        self.sizes = sizes
        self.phases_share = phases_share
        self.done = dict.fromkeys(sizes, 0.0)
        self.lock = threading.Lock()

    def report(self, component: str, percent: int, phase: str) -> None:
        """Note that the phases of `component` are `percent` done."""
        self._note(component, self.phases_share * percent / 100, phase)

    def finish(self, component: str) -> None:
        """Note that `component` is built."""
        self._note(component, 1.0, "done")

    def _note(self, component: str, fraction: float, phase: str) -> None:
        with self.lock:
            self.done[component] = max(fraction, self.done[component])
            total, whole = 100 * len(self.sizes), sum(self.sizes.values())
            part = sum(size * self.done[name] for name, size in self.sizes.items())
            if self.progress is not None:
                self.progress(
                    ProgressEvent(
                        stage="build-engine",
                        completed=round(total * part / whole),
                        total=total,
                        message=f"{component}: {phase}",
                    )
                )


def run_worker(
    job: Mapping[str, Any],
    tally: Tally,
    command: Sequence[str] = WORKER,
    on_start: Callable[[subprocess.Popen[str]], None] = lambda process: None,
) -> dict[str, dict[str, Any]]:
    """Build the engines of a job in a process of their own.

    Args:
        job: ``backend``, ``timing_cache``, ``memory_limit_bytes`` (of the process, or None) and ``components`` (each
            with ``name``, ``onnx``, ``plan``, ``profiles``, ``options``).
        tally: Told how far they are.
        command: How to start the worker.
        on_start: Called with the process.

    Returns:
        The fields of the ``built`` event, by component.

    Raises:
        BuildMemoryError: the machine's memory, or what the job may take of it, did not suffice.
        EngineBuildError: TensorRT refused a graph, or the worker died.
        OSError: a plan could not be written.
    """
    built: dict[str, dict[str, Any]] = {}
    try:
        # Closed at once: an interruption must end the worker before what it writes to is removed.
        with contextlib.closing(_events(job, command, on_start)) as events:
            for event in events:
                kind = event.pop("event")
                if kind == "log":
                    _log(event)
                elif kind == "progress":
                    tally.report(event["component"], event["percent"], event["phase"])
                elif kind == "built":
                    component = event.pop("component")
                    built[component] = event
                    tally.finish(component)
                    if len(built) == len(job["components"]):
                        # How the worker ends makes no plan worse.
                        return built
                else:
                    raise _failure(job, event)
    except BuildMemoryError as error:
        name = next(one["name"] for one in job["components"] if one["name"] not in built)
        raise BuildMemoryError(f"{name}: {error}", name, built) from error
    return built


def _events(
    job: Mapping[str, Any], command: Sequence[str], on_start: Callable[[subprocess.Popen[str]], None]
) -> Generator[dict[str, Any], None, None]:
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
        watch = MemoryWatch(process, job.get("memory_limit_bytes"))
        try:
            on_start(process)
            watch.start()
            yield from _read(process, job)
            if (status := process.wait()) != 0:
                if watch.exceeded:
                    raise BuildMemoryError(
                        f"building took more than the {job['memory_limit_bytes'] / 1e9:g} GB it may take; raise "
                        "--memory-limit, or build for fewer images or smaller ones (--max-batch, --max-height, "
                        "--max-width)"
                    )
                stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - _TAIL_BYTES))
                raise _death(job, status, stderr.read().decode(errors="replace"))
        finally:
            process.kill()
            process.wait()
            watch.stop()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()


class MemoryWatch:
    """Kills a process that takes more memory than it may.

    A limit of the system on addresses would not do: CUDA and TensorRT reserve many more than they use.
    """

    def __init__(self, process: subprocess.Popen[str], limit_bytes: int | None) -> None:
        self.process, self.limit_bytes = process, limit_bytes
        self.exceeded = False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin, if there is a limit."""
        if self.limit_bytes is not None:
            self.thread.start()

    def stop(self) -> None:
        """End; the process has."""
        self.ended.set()
        if self.thread.is_alive():
            self.thread.join()

    def _run(self) -> None:
        assert self.limit_bytes is not None
        statm, page = Path(f"/proc/{self.process.pid}/statm"), os.sysconf("SC_PAGE_SIZE")
        while not self.ended.wait(WATCH_SECONDS):
            try:
                resident = int(statm.read_text().split()[1]) * page
            except (OSError, IndexError):
                return
            if resident > self.limit_bytes:
                self.exceeded = True
                self.process.kill()
                return


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
        if not line.endswith("\n"):
            return  # the worker died while it wrote
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


def _failure(job: Mapping[str, Any], event: Mapping[str, Any]) -> Exception:
    if event["kind"] == "storage":
        return OSError(event["errno"], os.strerror(event["errno"] or 0), event["filename"])
    component = event["component"]
    entry = next(entry for entry in job["components"] if entry["name"] == component)
    path = entry["onnx"]
    if _MEMORY.search(event["message"]):
        return BuildMemoryError(
            f"{title_of(job['backend'])} {event['tensorrt_version']} ran out of memory: "
            f"{event['message']}; build with smaller --max-batch or image sizes, or on a machine with more memory"
        )
    return EngineBuildError(
        f"{component}: {title_of(job['backend'])} {event['tensorrt_version']} cannot build '{path}': "
        f"{event['message']}; "
        f"{_newer(job['backend'], event['tensorrt_version']) or _remedy(job['backend'], entry, event['message'])}"
    )


def _newer(backend: str, version: str) -> str:
    """What to do about a TensorRT that is older than what exports are made for; empty where it is not."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None or (int(found[1]), int(found[2])) >= OLDEST[backend]:
        return ""
    oldest = f"{title_of(backend)} {'.'.join(map(str, OLDEST[backend]))}"
    return f"exports are made for {oldest} and later: run `pip install --upgrade 'quest-deploy[{backend}]'`"


def _remedy(backend: str, component: Mapping[str, Any], message: str) -> str:
    """What to do about a graph that TensorRT refuses with this message."""
    if _SHAPES.search(message):
        return (
            "build for fewer images or smaller ones (--opt-batch, --max-batch, --opt-height, --max-height, "
            "--opt-width, --max-width, --profile)"
        )
    options = component.get("options", {})
    if options.get("workspace_mb") is not None and _WORKSPACE.search(message):
        return (
            f"raise --workspace, which was {options['workspace_mb']} MiB, or leave it out; where it was lowered for "
            "want of memory, build for fewer images or smaller ones (--max-batch, --max-height, --max-width)"
        )
    refused = {capability_of(name.upper()) for name in _CAPABILITY.findall(message)}
    if found := refused.intersection(options.get("compute_capabilities", ())):
        others = [one for one in supported_capabilities(backend) if one not in found]
        without = next((how for lacking, how in _LACKING if lacking.search(message)), "")
        again = f"export with `quest-deploy export --target {backend} {without}`, or " if without else ""
        return (
            f"{again}pass --compute-capability with one of {', '.join(others)} "
            f"instead of {', '.join(sorted(found))}"
        )
    return f"export the model again with `quest-deploy export --target {backend}`"


def _death(job: Mapping[str, Any], status: int, stderr: str) -> EngineBuildError:
    how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
    memory = "; the machine may be out of memory" if -status == signal.SIGKILL else ""
    lines = stderr.strip().splitlines()
    last = f" Its last words: {lines[-1].strip()}" if lines else ""
    kind = BuildMemoryError if memory else EngineBuildError
    return kind(
        f"the process that builds {title_of(job['backend'])} engines died ({how}){memory}.{last} "
        "Run it again with smaller --max-batch or image sizes, or with -v for its log"
    )

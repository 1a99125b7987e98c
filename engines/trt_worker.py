"""The process that builds TensorRT engines: ``python -m quest_deploy.engines.trt_worker``.

A process of its own, because Polygraphy binds to one TensorRT flavour when it is imported, because TensorRT cannot be
interrupted, and because it may die. Standard input carries one line, the job, and then stays open for as long as
anybody waits for the result: when it closes, the worker exits. Standard output carries one JSON event a line:
``progress``, ``log``, ``built`` (one for each component) and ``failed`` (the last one).
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from quest_deploy.engines.libraries import gpus, import_tensorrt
from quest_deploy.engines.timing_cache import load_timing_cache, save_timing_cache
from quest_deploy.errors import EngineBuildError

# By name: this module runs as __main__.
logger = logging.getLogger("quest_deploy.engines.trt_worker")

_LOGGER_PREFIX = re.compile(r"^\s*\[[A-Z!]\]\s*")
_SOURCE_PLACE = re.compile(r"\s*\bIn \S+ at /_src/\S+?:\d+")
# Errors that say nothing by themselves: what Polygraphy adds after the one that matters, and the parser's dump of a
# node before it.
_EMPTY = (
    "Invalid Engine",
    "Invalid network",
    "Could not parse ONNX correctly",
    "Failed to parse ONNX",
    "ModelImporter.cpp",
)


class EventLog(logging.Handler):
    """Sends what is logged as events, and keeps the errors."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(logging.INFO)
        self.stream = stream
        self.errors: list[str] = []

    def send(self, event: str, **fields: Any) -> None:
        """Write one event; TensorRT may call from threads of its own."""
        with self.lock or threading.Lock():
            self.stream.write(json.dumps({"event": event, **fields}) + "\n")
            self.stream.flush()

    def emit(self, record: logging.LogRecord) -> None:
        message = _LOGGER_PREFIX.sub("", record.getMessage())
        if record.levelno >= logging.ERROR:
            self.errors.append(message)
        self.send("log", level=record.levelno, name=record.name, message=message)

    def cause(self, default: str) -> str:
        """The first error that says what is wrong, as one line."""
        causes = [error for error in self.errors if not error.startswith(_EMPTY)]
        first = causes[0] if causes else default
        return " ".join(_SOURCE_PLACE.sub("", first).split())


class PhaseTree:
    """TensorRT's nested phases as one fraction. A phase counts for one step of its parent."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, Any]] = {}

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """Begin a phase of `steps` steps inside `parent`."""
        self.phases[name] = {"parent": parent, "steps": max(steps, 1), "done": 0}

    def step(self, name: str, step: int) -> None:
        """Note that the phase has finished its step number `step`, counted from 0."""
        if name in self.phases:
            self.phases[name]["done"] = step + 1

    def finish(self, name: str) -> None:
        """End a phase."""
        self.phases.pop(name, None)

    def fraction(self, name: str | None = None) -> float:
        """Part of the phase `name` (None for the whole build) that is done, in [0, 1]."""
        children = [key for key, phase in self.phases.items() if phase["parent"] == name]
        inner = max((self.fraction(key) for key in children), default=0.0)
        if name is None:
            return inner
        phase = self.phases[name]
        return float(min(1.0, (phase["done"] + inner) / phase["steps"]))


def progress_monitor(trt: Any, component: str, log: EventLog) -> Any:
    """A TensorRT progress monitor that sends an event for each new phase and each new percent.

    TensorRT may call it from several threads, and ends the build where `step_complete` raises.
    """
    tree = PhaseTree()
    last = [-1]
    lock = threading.Lock()

    def send(phase: str, *, always: bool) -> None:
        percent = max(int(100 * tree.fraction()), last[0])
        if always or percent > last[0]:
            last[0] = percent
            log.send("progress", component=component, phase=phase, percent=percent)

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with lock:
                new = phase_name not in tree.phases
                tree.start(phase_name, parent_phase, num_steps)
                send(phase_name, always=new)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with lock:
                tree.step(phase_name, step)
                send(phase_name, always=False)
            return True

        def phase_finish(self, phase_name: str) -> None:
            with lock:
                tree.finish(phase_name)

    return Monitor()


def build_component(trt: Any, job: Mapping[str, Any], component: Mapping[str, Any], log: EventLog) -> None:
    """Build one engine from its ONNX file, write its plan and send the ``built`` event."""
    from polygraphy.backend.trt import engine_bytes_from_network, network_from_onnx_path

    start = time.monotonic()
    typed = hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
    builder, network, _parser = network_from_onnx_path(component["onnx"], strongly_typed=typed)
    check_inputs_of(network, component)
    config = builder_config(trt, job, component, builder, network, log)
    plan = engine_bytes_from_network((builder, network), config)
    with open(component["plan"], "wb") as stream:
        stream.write(plan)
    if job["timing_cache"]:
        try:
            save_timing_cache(config, Path(job["timing_cache"]))
        except OSError as error:
            logger.warning(
                "timing cache %s cannot be written (%s): the next build times its kernels again",
                job["timing_cache"],
                error.strerror or error,
            )
    log.send(
        "built",
        component=component["name"],
        seconds=round(time.monotonic() - start, 3),
        size_bytes=Path(component["plan"]).stat().st_size,
        layers=network.num_layers,
        builder_flags=[name for name, flag in trt.BuilderFlag.__members__.items() if config.get_flag(flag)],
        tensorrt_version=trt.__version__,
        verified=can_deserialize(trt, plan),
    )


def check_inputs_of(network: Any, component: Mapping[str, Any]) -> None:
    """Check that the parsed graph takes the inputs that the profile is for.

    Raises:
        EngineBuildError: names the inputs got and expected.
    """
    got = sorted(network.get_input(index).name for index in range(network.num_inputs))
    expected = sorted(component["profiles"][0])
    if got != expected:
        raise EngineBuildError(f"the graph takes {got}, expected {expected}")


def builder_config(
    trt: Any, job: Mapping[str, Any], component: Mapping[str, Any], builder: Any, network: Any, log: EventLog
) -> Any:
    """The IBuilderConfig: profiles, the user's options, strict fp32 arithmetic, progress, timings of earlier builds."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import CreateConfig, Profile

    profiles = []
    for ranges in component["profiles"]:
        profiles.append(Profile())
        for name, shapes in ranges.items():
            profiles[-1].add(name, min=shapes["min"], opt=shapes["opt"], max=shapes["max"])
    create = CreateConfigRTX if job["backend"] == "tensorrt-rtx" else CreateConfig
    monitor = progress_monitor(trt, component["name"], log)
    told = builder_arguments(trt, component["options"])
    config = create(profiles=profiles, progress_monitor=monitor, **told)(builder, network)
    # TF32 keeps 10 bits of what stays in float: enough to flip int8 codes and miss the parity gate.
    config.clear_flag(trt.BuilderFlag.TF32)
    # What the inspector tells of a layer.
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if job["backend"] == "tensorrt-rtx" and not component["options"]["weight_streaming"]:
        # Streams can be captured only where no kernel allocates memory by itself (release notes of version 1.2);
        # weight streaming does.
        config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
    if job["timing_cache"]:
        load_timing_cache(config, Path(job["timing_cache"]))
    return config


def builder_arguments(trt: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """What the user asked for, as arguments of Polygraphy's CreateConfig or CreateConfigRTX."""
    given: dict[str, Any] = {}
    if options.get("optimization_level") is not None:
        given["builder_optimization_level"] = options["optimization_level"]
    if options.get("workspace_mb") is not None:
        given["memory_pool_limits"] = {trt.MemoryPoolType.WORKSPACE: options["workspace_mb"] << 20}
    if options.get("version_compatible"):
        given["version_compatible"] = True
    if options.get("hardware_compatible", "none") != "none":
        level = options["hardware_compatible"].replace("-", "_").upper()
        given["hardware_compatibility_level"] = getattr(trt.HardwareCompatibilityLevel, level)
    if options.get("compute_capabilities"):
        given["compute_capabilities"] = [
            tuple(int(part) for part in text.split(".")) for text in options["compute_capabilities"]
        ]
    if options.get("weight_streaming"):
        given["weight_streaming"] = True
    if options.get("strip_weights"):
        # Without a mode of refitting it is the one for the same weights, which costs no speed.
        given["strip_plan"] = True
    return given


def can_deserialize(trt: Any, plan: Any) -> bool:
    """Whether this machine's own GPU loads the plan; False where there is none."""
    from polygraphy.backend.trt import get_trt_logger

    if not gpus():
        return False
    runtime = trt.Runtime(get_trt_logger())
    # A plan for later versions brings a runtime, and this one was built here.
    runtime.engine_host_code_allowed = True
    return runtime.deserialize_cuda_engine(plan) is not None


def run_job(job: Mapping[str, Any], log: EventLog) -> int:
    """Build every component of `job`; the exit status."""
    from polygraphy.exception import PolygraphyException

    trt = import_tensorrt(job["backend"])
    for component in job["components"]:
        log.errors.clear()
        failed: dict[str, Any] = {"component": component["name"], "tensorrt_version": trt.__version__}
        try:
            build_component(trt, job, component, log)
        except OSError as error:
            where = error.filename or component["plan"]
            log.send("failed", kind="storage", errno=error.errno, filename=str(where), **failed)
            return 1
        except (PolygraphyException, EngineBuildError, RuntimeError, TypeError, ValueError) as error:
            log.send("failed", kind="build", message=log.cause(str(error)), **failed)
            return 1
    return 0


def exit_with_parent() -> None:
    """Exit as soon as standard input closes: nobody is left who wants the engines."""
    sys.stdin.read()
    os._exit(1)


def main() -> int:
    """Read the job, build, report."""
    # Whatever libraries print must not end up among the events.
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())
    threading.Thread(target=exit_with_parent, daemon=True).start()

    log = EventLog(events)
    logging.getLogger().addHandler(log)
    logging.getLogger().setLevel(logging.INFO)
    from polygraphy.logger import G_LOGGER

    G_LOGGER.use_python_logging_system = True
    return run_job(job, log)


if __name__ == "__main__":
    sys.exit(main())

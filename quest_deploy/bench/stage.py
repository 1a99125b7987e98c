"""Runs the workers in turn, and writes what they found."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from quest_deploy.artifacts import (
    Artifact,
    check_output,
    hash_directory,
    read_artifact,
    stage_of,
    write_artifact,
)
from quest_deploy.bench.figures import summarize
from quest_deploy.bench.subject import ERROR, Subject, parse_subject
from quest_deploy.config import BenchConfig, ProgressEvent, to_dict
from quest_deploy.engines.libraries import TENSOR_FLOAT
from quest_deploy.errors import BenchError, ConfigError
from quest_deploy.files import write_json
from quest_deploy.manifest import core_count, cpu_model, tool_versions

STAGE = "bench"
RESULT, PLOT = "bench.json", "bench.svg"
WORKER = "quest_deploy.bench.worker"
LAST_LINES = 3


def run(
    subjects: Sequence[str],
    output: Path,
    config: BenchConfig,
    *,
    progress: Callable[[ProgressEvent], None] | None,
    overwrite: bool,
) -> Artifact:
    """See :func:`quest_deploy.bench.bench`."""
    parsed = [parse_subject(text) for text in subjects]
    twice = {one.label for one in parsed if sum(other.label == one.label for other in parsed) > 1}
    if not parsed or twice:
        raise ConfigError(
            f"subjects: got {', '.join(sorted(twice)) or 'none'}{' twice' if twice else ''}, expected each once"
        )
    check_output(output, stage=STAGE, overwrite=overwrite)
    digests = {one.label: _digest(one.path) for one in parsed}
    with write_artifact(
        output, stage=STAGE, config=to_dict(config), inputs=digests, overwrite=overwrite
    ) as writer:
        turns, failed = _measured(parsed, config, progress)
        order = [one.label for one in parsed]
        rows = {one.label: _row(one, turns[one.label], failed) for one in parsed}
        result = {
            "machine": machine(),
            "versions": tool_versions(),
            "request": config.request(),
            "rounds": config.rounds,
            "threads": config.threads,
            "baseline": order[0],
            "order": order,
            "rows": rows,
        }
        write_json(writer.path / RESULT, result)
        from quest_deploy.bench.plot import plot

        (writer.path / PLOT).write_text(plot(rows, order), encoding="utf-8")
    return read_artifact(output, stage=STAGE)


def _measured(
    subjects: Sequence[Subject], config: BenchConfig, progress: Callable[[ProgressEvent], None] | None
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """What each round found of each subject, and why those that failed did.

    Raises:
        BenchError: all did, in the first round.
    """
    turns: dict[str, list[dict[str, Any]]] = {one.label: [] for one in subjects}
    failed: dict[str, str] = {}
    total, done = config.rounds * len(subjects), 0
    for _ in range(config.rounds):
        for one in subjects:
            if one.label not in failed:
                found = measure(one, config)
                if ERROR in found:
                    failed[one.label] = found[ERROR]
                else:
                    turns[one.label].append(found)
            done += 1
            if progress is not None:
                progress(ProgressEvent(stage=STAGE, completed=done, total=total, message=one.label))
    if not any(turns.values()):
        raise BenchError(
            "; ".join(f"{label}: cannot be measured: {error}" for label, error in failed.items())
        )
    return turns, failed


def _row(subject: Subject, turns: Sequence[Mapping[str, Any]], failed: Mapping[str, str]) -> dict[str, Any]:
    """One row: the figures of all rounds, or an error and the figures of the rounds before it, if any."""
    described = {
        "path": str(subject.path),
        "backend": subject.backend,
        "compiled": subject.compiled,
        "half": subject.half,
        "run": dataclasses.asdict(subject.run),
    }
    figures = summarize(turns) if turns else {}
    error = {ERROR: failed[subject.label]} if subject.label in failed else {}
    return {**described, **figures, **error}


def measure(subject: Subject, config: BenchConfig) -> dict[str, Any]:
    """One process's figures, or ``{"error": message}``: its own message, or what its death means."""
    job = {
        "path": str(subject.path),
        "backend": subject.backend,
        "compiled": subject.compiled,
        "half": subject.half,
        "run": dataclasses.asdict(subject.run),
        "threads": config.threads,
        "warmup": config.warmup,
        "runs": config.runs,
        "request": config.request(),
    }
    # Safe path: no module of the user's working directory may shadow a library's.
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    if config.threads is not None:
        environment["OMP_NUM_THREADS"] = str(config.threads)
    if subject.run.provider == "tensorrt":
        environment[TENSOR_FLOAT] = "0"  # all else multiplies float32 as it is
    done = subprocess.run(
        [sys.executable, "-m", WORKER],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode == 0:
        with contextlib.suppress(IndexError, json.JSONDecodeError):
            found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
            return found
    return {ERROR: _death(done.returncode, done.stderr)}


def _death(code: int, stderr: str) -> str:
    """What is told of a process that ended without figures."""
    if -code == signal.SIGKILL:
        return (
            "its process was killed (SIGKILL), probably for want of memory; free some, or draw smaller images or "
            "fewer at a time (--height, --width, --batch-size)"
        )
    how = (
        f"crashed with signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with code {code}"
    )
    words = " / ".join(stderr.strip().splitlines()[-LAST_LINES:]) or "it said nothing"
    return f"its process {how}: {words[:400]}; see that `quest-deploy generate` draws with it"


def machine() -> dict[str, Any]:
    """What it was measured on."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": core_count(),
    }


def _digest(path: Path) -> str:
    stage = stage_of(path)
    return hash_directory(path) if stage == "model" else read_artifact(path, stage=stage).digest

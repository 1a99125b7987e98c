"""Runs the workers in turn, and writes what they found."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
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
from quest_deploy.errors import BenchError, ConfigError
from quest_deploy.files import write_json
from quest_deploy.manifest import tool_versions

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
    turns: dict[str, list[dict[str, Any]]] = {one.label: [] for one in parsed}
    failed: dict[str, str] = {}
    total, done = config.rounds * len(parsed), 0
    for _ in range(config.rounds):
        for one in parsed:
            if one.label not in failed:
                found = measure(one, config)
                if ERROR in found:
                    failed[one.label] = found[ERROR]
                else:
                    turns[one.label].append(found)
            done += 1
            if progress is not None:
                progress(ProgressEvent(stage=STAGE, completed=done, total=total, message=one.label))
    if parsed[0].label in failed:
        raise BenchError(f"{parsed[0].label}: cannot be measured: {failed[parsed[0].label]}")
    rows = {one.label: _row(one, turns[one.label], failed) for one in parsed}
    result = {
        "machine": machine(),
        "versions": tool_versions(),
        "request": config.request(),
        "rounds": config.rounds,
        "threads": config.threads,
        "baseline": parsed[0].label,
        "order": [one.label for one in parsed],
        "rows": rows,
    }
    with write_artifact(
        output, stage=STAGE, config=to_dict(config), inputs=digests, overwrite=overwrite
    ) as writer:
        write_json(writer.path / RESULT, result)
        from quest_deploy.bench.plot import plot

        (writer.path / PLOT).write_text(plot(rows, result["order"]), encoding="utf-8")
    return read_artifact(output, stage=STAGE)


def _row(subject: Subject, turns: Sequence[Mapping[str, Any]], failed: Mapping[str, str]) -> dict[str, Any]:
    described = {
        "path": str(subject.path),
        "backend": subject.backend,
        "compiled": subject.compiled,
        "half": subject.half,
        "run": dataclasses.asdict(subject.run),
    }
    if subject.label in failed:
        return {**described, ERROR: failed[subject.label]}
    return {**described, **summarize(turns)}


def measure(subject: Subject, config: BenchConfig) -> dict[str, Any]:
    """One process's figures, or ``{"error": message}``.

    Raises:
        BenchError: the process died.
    """
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
    environment = dict(os.environ)
    if config.threads is not None:
        environment["OMP_NUM_THREADS"] = str(config.threads)
    done = subprocess.run(
        [sys.executable, "-m", WORKER],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode != 0 or not done.stdout.strip():
        words = " / ".join(done.stderr.strip().splitlines()[-LAST_LINES:]) or "it said nothing"
        raise BenchError(
            f"{subject.label}: the measuring process ended with code {done.returncode} ({words[:400]}); "
            "see that `quest-deploy generate` draws with it, and that memory suffices"
        )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def machine() -> dict[str, Any]:
    """What it was measured on."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"system": f"{platform.system()} {platform.machine()}", "cores": cores}


def _digest(path: Path) -> str:
    stage = stage_of(path)
    return hash_directory(path) if stage == "model" else read_artifact(path, stage=stage).digest

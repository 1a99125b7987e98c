"""Where and when something was measured, with which code."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from typing import Any

from benchmarks.settings import RESULTS, ROOT, Settings
from quest_deploy.manifest import cpu_model, tool_versions

SOURCES = ("quest_deploy", "export", "engines", "benchmarks", "scripts")


def header(settings: Settings) -> dict[str, Any]:
    """What every result file begins with."""
    return {
        "date": now(),
        "machine": machine(),
        "versions": tool_versions(),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": uncommitted_changes(),
        "settings": settings.describe(),
    }


def now() -> str:
    """The time, in UTC."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, and memory."""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def uncommitted_changes() -> bool | None:
    """Whether code is not as its commit has it; None outside of a repository."""
    # Results that were just written are no change of the code that wrote them.
    changed = git("status", "--porcelain", "--", *SOURCES, f":!{RESULTS}")
    return None if changed is None else bool(changed)


def git(*arguments: str) -> str | None:
    """What git says; None outside of a repository, and where there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None

"""Where an engine was run: kept beside it, since a manifest is written before the engine has run anywhere.

Like the runtime cache it is no part of the artifact. A record of another plan says nothing about this one.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from quest_deploy.artifacts import RUNS_NAME, RUNTIME_CACHE_NAME, read_json, write_json
from quest_deploy.errors import QuestDeployError

logger = logging.getLogger(__name__)

_PLACE = ("gpu", "compute_capability", "driver", "library_version")


def read_runs(folder: Path, plan_sha256: str) -> list[dict[str, str]]:
    """Each place where the plan ran to its end, with the last date; empty where that is not known.

    Args:
        folder: The component's, where the engine lies.
        plan_sha256: Of the engine's plan.
    """
    try:
        content = read_json(folder / RUNS_NAME)
        if content["plan_sha256"] == plan_sha256:
            return [{key: str(run[key]) for key in (*_PLACE, "date")} for run in content["runs"]]
    except (QuestDeployError, KeyError, TypeError):
        pass  # missing, damaged or not ours: nothing is known
    return []


def record_run(folder: Path, plan_sha256: str, place: Mapping[str, Any]) -> None:
    """Add that the plan ran here and now; a directory that cannot be written is left alone.

    Args:
        folder: The component's.
        plan_sha256: Of the engine's plan.
        place: `gpu`, `compute_capability`, `driver` and `library_version`.
    """
    here = {key: str(place[key]) for key in _PLACE}
    others = [run for run in read_runs(folder, plan_sha256) if any(run[key] != here[key] for key in _PLACE)]
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    try:
        write_json(
            folder / RUNS_NAME, {"plan_sha256": plan_sha256, "runs": [*others, {**here, "date": date}]}
        )
    except QuestDeployError as error:
        logger.debug("that the engine ran is not kept in %s (%s)", folder, error)


def copy_records(folder: Path, output: Path) -> None:
    """Copy what the runs of an engine left beside it, to another place of the same plan; what cannot be read stays.

    Args:
        folder: The component's, where the engine lies.
        output: That of the copy.
    """
    for name in (RUNS_NAME, RUNTIME_CACHE_NAME):
        with contextlib.suppress(OSError):
            shutil.copyfile(folder / name, output / name)

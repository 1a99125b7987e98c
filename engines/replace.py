"""An engines directory written again with other plans in the place of some."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from quest_deploy.artifacts import Artifact, read_artifact, write_artifact
from quest_deploy.engines.run_record import copy_records
from quest_deploy.engines.trt_build import PLAN_NAME, lock_of
from quest_deploy.errors import StaleArtifactError
from quest_deploy.lock import locked


def with_plans(
    source: Artifact,
    output: Path,
    plans: Mapping[str, Path],
    components: Mapping[str, Mapping[str, Any]],
    *,
    config: Mapping[str, Any] = MappingProxyType({}),
    overwrite: bool = False,
    **details: Any,
) -> Artifact:
    """Write an `engines` artifact that is another one but for some plans.

    Args:
        source: The other one; may lie at `output`.
        output: Where to write.
        plans: Files to copy in, by component.
        components: What the manifest says anew about components, beside what it says already.
        config: What its configuration says anew.
        overwrite: Replace what lies at `output`.
        **details: What it says anew about all of them.

    Raises:
        ArtifactError: `output` cannot be written.
        StaleArtifactError: `source` is another one by now, so that `plans` no longer belong to it.
        ConfigError: another process is writing it.
    """
    old = source.manifest
    with (
        locked(lock_of(output), output, "build-engine"),
        write_artifact(
            output, stage="engines", config={**old.config, **config}, inputs=old.inputs, overwrite=overwrite
        ) as writer,
    ):
        replaced = {f"{name}/{PLAN_NAME}": plan for name, plan in plans.items()}
        for name in old.files:
            (writer.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(replaced.get(name, source.path / name), writer.path / name)
        for name in old.details["components"].keys() - plans.keys():
            copy_records(source.path / name, writer.path / name)
        # After the copies: a build ends by renaming its directory, so these files are of one and the same.
        if read_artifact(source.path, stage="engines").digest != source.digest:
            raise StaleArtifactError(
                f"the engines in '{source.path}' were built again by another process meanwhile; run the same command "
                "once more"
            )
        reports = {
            name: {**report, **components.get(name, {})} for name, report in old.details["components"].items()
        }
        for name, plan in plans.items():
            reports[name]["size_bytes"] = plan.stat().st_size
        size_bytes = sum(report["size_bytes"] for report in reports.values())
        writer.details.update({**old.details, "components": reports, "size_bytes": size_bytes, **details})
    return read_artifact(output, stage="engines")

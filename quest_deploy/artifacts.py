"""Artifacts: directories that a stage wrote completely, with a manifest of what is in them and from what.

A stage writes into a temporary sibling and renames it into place, manifest last, so that a directory with a
valid manifest is always whole. A reader trusts no file whose hash differs from the manifest's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from quest_deploy.errors import ArtifactError, StaleArtifactError
from quest_deploy.files import (
    check_place,
    check_writable,
    hash_directory,
    hash_file,
    is_hidden,
    list_files,
    read_json,
    refuse_pickle,
    remembered_digests,
    storage_error,
    storage_errors,
    sync,
    write_json,
)
from quest_deploy.foreign import (
    GRAPH_PATTERN,
    MODEL_INDEX_NAME,
    OWN_PATTERNS,
    foreign_manifest,
    has_weights,
    is_foreign_onnx,
)
from quest_deploy.lock import locked
from quest_deploy.manifest import (
    MANIFEST_NAME,
    SCHEMA_VERSION,
    STAGES,
    FileEntry,
    Manifest,
    digest_of,
    made_by,
    read_manifest,
    tool_versions,
)
from quest_deploy.siblings import replace, sweep, temporary_sibling

__all__ = [
    "MANIFEST_NAME",
    "RUNS_NAME",
    "RUNTIME_CACHE_NAME",
    "SCHEMA_VERSION",
    "STAGES",
    "Artifact",
    "ArtifactWriter",
    "Source",
    "artifact_digest",
    "FileEntry",
    "Manifest",
    "check_output",
    "hash_directory",
    "hash_file",
    "read_artifact",
    "read_json",
    "read_manifest",
    "refuse_pickle",
    "stage_of",
    "write_artifact",
    "write_json",
]

logger = logging.getLogger(__name__)

Source = tuple[Path, Callable[[Path], str]]
"""Where an input lies, and what gives its digest as the stage took it."""

_MAX_PROBLEMS = 5

RUNTIME_CACHE_NAME = ".runtime-cache"
RUNS_NAME = ".runtime-runs"
_OF_RUNTIMES = re.compile(r"\.+runtime-(cache|runs)")
"""What a runtime keeps beside an engine, or began to: no part of the artifact, which does without."""


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A verified directory. `digest` is its identity: sha256 over stage, config and file hashes."""

    path: Path
    manifest: Manifest
    digest: str


@dataclass(kw_only=True)
class ArtifactWriter:
    """A directory being written: put files below `path` and facts for the manifest into `details`."""

    path: Path
    details: dict[str, Any] = field(default_factory=dict)


def read_artifact(
    path: Path, *, stage: str | tuple[str, ...] | None = None, verify: bool = False
) -> Artifact:
    """Open an artifact and verify the hash of each of its files.

    ONNX that another tool wrote has no manifest: its files are hashed as they are, and `details` say ``foreign``.

    Args:
        path: Directory of the artifact.
        stage: Stage, or stages, that the caller can use; None for any.
        verify: Hash again even the files that are remembered as unchanged.

    Raises:
        ArtifactError: not an artifact, of another stage, or changed since (says which file and how).
        StaleArtifactError: written by a newer quest-deploy.
    """
    path = Path(path)
    if stage is not None:
        got, allowed = stage_of(path), (stage,) if isinstance(stage, str) else stage
        if got not in allowed:
            kind = "a diffusers model" if got == "model" else f"an artifact of stage '{got}'"
            raise ArtifactError(
                f"'{path}' is {kind}, expected stage {' or '.join(map(repr, allowed))}; "
                f"make one with {made_by(stage)}"
            )
    if is_foreign_onnx(path):
        manifest = foreign_manifest(path)
        return Artifact(path=path, manifest=manifest, digest=digest_of(manifest))
    manifest = read_manifest(path)
    problems = _differences(path, manifest, verify)
    if problems:
        more = f"; and {len(problems) - _MAX_PROBLEMS} more" if len(problems) > _MAX_PROBLEMS else ""
        raise ArtifactError(
            f"'{path}' is not what its manifest says: {'; '.join(problems[:_MAX_PROBLEMS])}{more}. "
            f"Make it again with {made_by(manifest.stage)} (add --overwrite), or copy it anew"
        )
    return Artifact(path=path, manifest=manifest, digest=digest_of(manifest))


def _differences(path: Path, manifest: Manifest, verify: bool) -> list[str]:
    """What differs between the directory and its manifest, a phrase each."""
    problems = []
    present = list_files(path)
    with remembered_digests() as cache:
        for name, entry in manifest.files.items():
            file = path / name
            if name not in present:
                problems.append(f"{name} is missing")
            elif path.resolve() not in file.resolve().parents:
                problems.append(f"{name} is a link to a place outside the directory")
            elif (size := file.stat().st_size) != entry.size_bytes:
                how = "truncated" if size < entry.size_bytes else "too long"
                problems.append(f"{name} is {how} ({size} bytes, expected {entry.size_bytes})")
            elif (digest := cache.digest(file, verify=verify)) != entry.sha256:
                problems.append(f"{name} has changed (sha256 {digest[:12]}…, expected {entry.sha256[:12]}…)")
    # Loaders pick up files by their presence: one that nobody vouches for must not be among them.
    extra = [
        name
        for name in present
        if name not in manifest.files and name != MANIFEST_NAME and not is_hidden(name)
    ]
    return problems + [f"{name} is not in the manifest (move it away)" for name in extra]


def artifact_digest(path: Path) -> str:
    """The digest of an artifact, its files verified; errors as of :func:`read_artifact`."""
    return read_artifact(path).digest


def stage_of(path: Path) -> str:
    """Stage of what lies at `path`: "model" for a diffusers directory or a single file, "onnx" for any tool's ONNX."""
    path = Path(path)
    if path.is_file():
        refuse_pickle(path)
        if path.suffix == ".safetensors":
            return "model"
    elif path.is_dir() and not (path / MANIFEST_NAME).exists():
        if is_foreign_onnx(path):
            return "onnx"
        patterns = OWN_PATTERNS if has_weights(path) else (*OWN_PATTERNS, GRAPH_PATTERN)
        graphs = [file for pattern in patterns for file in path.glob(pattern)]
        if (path / MODEL_INDEX_NAME).is_file() and not graphs:
            return "model"
        what = (
            f"no {MANIFEST_NAME}, only files that look like an artifact's"
            if graphs
            else f"neither a {MANIFEST_NAME} (artifact of quest-deploy) nor a {MODEL_INDEX_NAME} (diffusers model)"
        )
        raise ArtifactError(
            f"'{path}' has {what}; check the path, or run the stage that should have made it again"
        )
    return read_manifest(path).stage


# Writing


def check_output(output: Path, *, stage: str, overwrite: bool = False) -> None:
    """Refuse an output directory that must not be replaced, before any work is done.

    Raises:
        ArtifactError: it is a file, holds files that are not of an artifact of this stage, exists without
            `overwrite`, lies in an artifact or model, or lies where no directory can be made.
    """
    check_place(Path(output))
    check_writable(Path(output))
    _check_outside(output)
    with storage_errors(output):
        if not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir())):
            return
    if not output.is_dir():
        raise ArtifactError(f"output '{output}' is a file, expected a directory that does not exist yet")
    if not (output / MANIFEST_NAME).exists():
        raise ArtifactError(
            f"output '{output}' is not empty and holds no artifact, so it is left alone; choose another"
        )
    try:
        manifest = read_manifest(output)
    except ArtifactError as error:
        # What is ours to replace only a manifest tells, so that --overwrite deletes nothing of the user's.
        raise type(error)(
            f"output '{output}' cannot be replaced: {str(error).partition(';')[0]}; if you need nothing in it, delete "
            "it and run the same command again, or choose another"
        ) from error
    if manifest.stage != stage:
        raise ArtifactError(
            f"output '{output}' holds an artifact of stage '{manifest.stage}', this would be '{stage}'; "
            "choose another directory"
        )
    if not overwrite:
        raise ArtifactError(
            f"output '{output}' exists already; add --overwrite to replace it, or choose another"
        )
    ours = {*manifest.files, MANIFEST_NAME}
    foreign = [
        name for name in list_files(output) if name not in ours and not _OF_RUNTIMES.match(Path(name).name)
    ]
    if foreign:
        raise ArtifactError(
            f"output '{output}' also holds '{foreign[0]}', which is not part of the artifact; move it away "
            "first, so that --overwrite deletes nothing of yours"
        )


def _check_outside(output: Path) -> None:
    """Refuse an output inside an artifact or a model, which would no longer be what its hash says."""
    for parent in Path(output).resolve().parents:
        found = [name for name in (MANIFEST_NAME, MODEL_INDEX_NAME) if (parent / name).is_file()]
        kind = None
        # Web pages and browsers' extensions have a manifest.json, too.
        with contextlib.suppress(ArtifactError):
            kind = stage_of(parent) if found else None
        if kind is not None:
            raise ArtifactError(
                f"output '{output}' lies in '{parent}', which has a {found[0]}; choose a directory outside of it"
            )


@contextlib.contextmanager
def write_artifact(
    output: Path,
    *,
    stage: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str] | None = None,
    sources: Mapping[str, Source] | None = None,
    overwrite: bool = False,
) -> Iterator[ArtifactWriter]:
    """Write an artifact all at once: the body fills a temporary sibling, renamed to `output` at the end.

    Whatever ends the body early (an interrupt included) removes the temporary directory and leaves an older
    artifact at `output` as it was. A process that is killed leaves a hidden sibling; the next write to
    `output` removes it.

    Args:
        output: Directory to make; checked as in :func:`check_output` before the body runs.
        stage: One of :data:`STAGES`.
        config: The stage's configuration as JSON types.
        inputs: Digest of each input, by role.
        sources: Inputs of such roles, which must still have those digests at the end.
        overwrite: Replace an existing artifact of the same stage.

    Raises:
        ArtifactError: `output` may not be replaced, or the disk is full, read-only or otherwise refuses.
        StaleArtifactError: an input was changed while it was read.
        ConfigError: another process is writing it.
    """
    if stage not in STAGES:
        raise ValueError(f"stage is {stage!r}, expected one of {STAGES}")
    check_output(Path(output), stage=stage, overwrite=overwrite)
    output = Path(output).resolve()
    with contextlib.ExitStack() as cleanup:
        with storage_errors(output):
            cleanup.enter_context(locked(output.with_name(f".{output.name}.lock"), output, "quest-deploy"))
            if sweep(output):
                check_output(output, stage=stage, overwrite=overwrite)
            temporary = cleanup.enter_context(temporary_sibling(output))
        writer = ArtifactWriter(path=temporary)
        try:
            yield writer
            _check_unchanged(sources or {}, inputs or {})
            manifest = Manifest(
                schema_version=SCHEMA_VERSION,
                stage=stage,
                config=dict(config),
                details=writer.details,
                inputs=dict(inputs or {}),
                tools=tool_versions(),
                files=_seal(temporary),
            )
            write_json(temporary / MANIFEST_NAME, asdict(manifest))
            sync(temporary)
            check_output(output, stage=stage, overwrite=overwrite)
            replace(temporary, output)
        except Exception as error:
            if (known := storage_error(error, output)) is not None:
                raise known from error
            raise
    logger.debug("wrote %s to %s", stage, output)


def _check_unchanged(sources: Mapping[str, Source], inputs: Mapping[str, str]) -> None:
    for role, (path, digest) in sources.items():
        if digest(path) != inputs[role]:
            raise StaleArtifactError(
                f"'{path}' was changed while it was read, so nothing is written; run the same command once nothing "
                "changes it any more"
            )


def _seal(path: Path) -> dict[str, FileEntry]:
    """Hash every file below `path` but those of runtimes, and make sure that it has reached the disk."""
    files = {}
    for name in list_files(path):
        if _OF_RUNTIMES.match(Path(name).name):
            continue
        file = path / name
        if file.is_symlink():
            raise ArtifactError(f"'{name}' is a symbolic link; an artifact holds plain files only")
        sync(file)
        files[name] = FileEntry(sha256=hash_file(file), size_bytes=file.stat().st_size)
    return files

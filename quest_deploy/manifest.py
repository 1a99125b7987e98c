"""The manifest of an artifact: what ``manifest.json`` holds and what makes one acceptable."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from quest_deploy.errors import ArtifactError, StaleArtifactError
from quest_deploy.files import hash_mapping, read_json

MANIFEST_NAME = "manifest.json"
# What a quantized artifact says of its quantizers.
QUANTIZATION_NAME = "quest.json"
SCHEMA_VERSION = 1

# What makes each stage's artifact; quoted in messages.
COMMANDS = {
    "checkpoint": "quest-deploy finetune MODEL -o DIR",
    "onnx": "quest-deploy export MODEL|CHECKPOINT -o DIR",
    "engines": "quest-deploy build-engine ONNX_DIR -o DIR",
    "images": "quest-deploy generate DIR PROMPT -o DIR",
    "parity": "quest-deploy parity REFERENCE CANDIDATE -o DIR",
    "bench": "quest-deploy bench DIR -o DIR",
    "analysis": "quest-deploy analyze MODEL -o DIR",
}
STAGES = tuple(COMMANDS)

_DISTRIBUTIONS = (
    "quest-deploy",
    "torch",
    "diffusers",
    "transformers",
    "safetensors",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "openvino",
    "polygraphy",
    "tensorrt",
    "tensorrt-rtx-cu13",
)


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """What a manifest knows about one file."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``manifest.json``; `inputs` maps a role to the digest of what the stage read."""

    schema_version: int
    stage: str
    config: dict[str, Any]
    details: dict[str, Any]
    inputs: dict[str, str]
    tools: dict[str, str]
    files: dict[str, FileEntry]


def tool_versions() -> dict[str, str]:
    """Versions of python and of the installed libraries that can change an artifact's content."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    return versions


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name; the architecture where the system does not tell it."""
    import platform

    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def core_count() -> int:
    """Of those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def digest_of(manifest: Manifest) -> str:
    """Identity of an artifact: sha256 over stage, config and file hashes."""
    files = {name: entry.sha256 for name, entry in manifest.files.items()}
    return hash_mapping({"stage": manifest.stage, "config": manifest.config, "files": files})


def made_by(stage: str | tuple[str, ...]) -> str:
    """The commands that make an artifact of `stage`, for the end of a message."""
    stages = (stage,) if isinstance(stage, str) else stage
    return " or ".join(f"`{COMMANDS[name]}`" for name in stages if name in COMMANDS)


def read_manifest(path: Path) -> Manifest:
    """Parse the manifest of the artifact at `path` without hashing its files.

    Raises:
        ArtifactError: no manifest, or one that is corrupt or truncated.
        StaleArtifactError: written by a newer quest-deploy.
    """
    source = path / MANIFEST_NAME
    if not path.exists():
        raise ArtifactError(
            f"'{path}' does not exist; expected a directory with a {MANIFEST_NAME} (artifact of quest-deploy) or a "
            "model_index.json (diffusers model); check the path"
        )
    if not path.is_dir():
        raise ArtifactError(
            f"'{path}' is a file, expected a directory with a {MANIFEST_NAME} (artifact of quest-deploy) or a "
            "model_index.json (diffusers model)"
        )
    if not source.is_file():
        raise ArtifactError(
            f"'{path}' has no {MANIFEST_NAME}, so it is no artifact of quest-deploy (an interrupted write "
            "leaves none); check the path, or run the stage that should have made it again"
        )
    content = read_json(source)
    version = content.get("schema_version") if isinstance(content, dict) else None
    if isinstance(version, int) and version > SCHEMA_VERSION:
        raise StaleArtifactError(
            f"'{source}' has schema version {version}, this quest-deploy reads {SCHEMA_VERSION}; "
            "upgrade quest-deploy or make the artifact again with this version"
        )
    if version != SCHEMA_VERSION:
        raise ArtifactError(
            f"'{source}' has schema version {version!r}, expected {SCHEMA_VERSION}; it is not a manifest of "
            "quest-deploy or it is damaged: make the artifact again"
        )
    return _parse_manifest(source, content)


def _parse_manifest(source: Path, content: dict[str, Any]) -> Manifest:
    """Check the types of every field: nothing below may rely on a damaged manifest."""
    expected = {
        "stage": str,
        "config": dict,
        "details": dict,
        "inputs": dict,
        "tools": dict,
        "files": dict,
    }
    for name, kind in expected.items():
        if not isinstance(content.get(name), kind):
            raise ArtifactError(
                f"'{source}': '{name}' is {content.get(name)!r}, expected a {kind.__name__}; "
                "the manifest is damaged, make the artifact again"
            )
    stage = content["stage"]
    if stage not in STAGES:
        raise ArtifactError(f"'{source}': stage is '{stage}', expected one of {', '.join(STAGES)}")
    files = {}
    for name, entry in content["files"].items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts or relative.as_posix() != name or "\\" in name:
            raise ArtifactError(
                f"'{source}' names the file '{name}', expected a plain path inside the directory; "
                "do not use an artifact from an untrusted source"
            )
        if not (
            isinstance(entry, dict)
            and isinstance(entry.get("sha256"), str)
            and isinstance(entry.get("size_bytes"), int)
        ):
            raise ArtifactError(
                f"'{source}': the entry of '{name}' is {entry!r}, expected sha256 and size_bytes; "
                f"make the artifact again with {made_by(stage)}"
            )
        files[name] = FileEntry(sha256=entry["sha256"], size_bytes=entry["size_bytes"])
    known = {name: content[name] for name in expected if name != "files"}
    return Manifest(schema_version=SCHEMA_VERSION, files=files, **known)

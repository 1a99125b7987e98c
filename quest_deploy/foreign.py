"""ONNX directories that other tools wrote."""

from __future__ import annotations

from pathlib import Path

from quest_deploy.files import is_hidden, list_files, remembered_digests
from quest_deploy.manifest import MANIFEST_NAME, QUANTIZATION_NAME, SCHEMA_VERSION, FileEntry, Manifest

MODEL_INDEX_NAME = "model_index.json"
# An artifact that lost its manifest must not pass for a model.
OWN_PATTERNS = ("*/model.plan", QUANTIZATION_NAME)
GRAPH_PATTERN = "*/model.onnx"


def is_foreign_onnx(path: Path) -> bool:
    """Whether `path` is a directory of ONNX files in optimum-onnx's layout that another tool wrote.

    A directory of quest-deploy that lost its manifest is none, as far as it can be told by its other files; nor is a
    model of diffusers that has ONNX beside its weights, as Stable Diffusion XL has on the hub.
    """
    return (
        not (path / MANIFEST_NAME).exists()
        and (path / MODEL_INDEX_NAME).is_file()
        and any(path.glob(GRAPH_PATTERN))
        and not any(file for pattern in OWN_PATTERNS for file in path.glob(pattern))
        and not has_weights(path)
    )


def has_weights(path: Path) -> bool:
    """Whether graphs at `path` have weights beside them that torch would load."""
    return any(any(graph.parent.glob("*.safetensors")) for graph in path.glob(GRAPH_PATTERN))


def foreign_manifest(path: Path) -> Manifest:
    """What a manifest would say of it: its files, and nothing of how it was made."""
    with remembered_digests() as cache:
        files = {
            name: FileEntry(sha256=cache.digest(path / name), size_bytes=(path / name).stat().st_size)
            for name in list_files(path, follow=True)
            if not is_hidden(name)
        }
    return Manifest(
        schema_version=SCHEMA_VERSION,
        stage="onnx",
        config={},
        details={"foreign": True},
        inputs={},
        tools={},
        files=files,
    )

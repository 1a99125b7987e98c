"""Which LoRAs were merged into the model that an artifact was made from, as manifests tell it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quest_deploy.artifacts import Manifest, hash_file
from quest_deploy.config import LoraConfig
from quest_deploy.errors import StaleArtifactError

MERGED = "merged"


@dataclass(frozen=True, kw_only=True)
class MergedLoras:
    """LoRAs, and what they were merged into.

    Attributes:
        source: Digest of the model without them.
        loras: In their order.
        digests: sha256 of each one's file at that time.
    """

    source: str
    loras: tuple[LoraConfig, ...]
    digests: tuple[str, ...]

    @property
    def identity(self) -> tuple[object, ...]:
        """Equal where the merged models are, wherever the files lie."""
        return (self.source, self.digests, tuple(lora.scale for lora in self.loras))


def merged_loras(manifest: Manifest) -> MergedLoras | None:
    """The LoRAs of a checkpoint, and of what was exported or built from one; None where there were none.

    Exports and engines of an older quest-deploy do not tell.
    """
    if manifest.stage == "checkpoint":
        inputs = manifest.inputs
        loras = [
            {**lora, "sha256": inputs[f"lora-{index}"]}
            for index, lora in enumerate(manifest.config.get("loras", ()))
        ]
        told: dict[str, Any] = {"source": inputs.get("source"), "loras": loras}
    else:
        told = manifest.details.get(MERGED, {"loras": ()})
    if not told["loras"]:
        return None
    return MergedLoras(
        source=told["source"],
        loras=tuple(LoraConfig(file=one["file"], scale=one["scale"]) for one in told["loras"]),
        digests=tuple(one["sha256"] for one in told["loras"]),
    )


def merged_details(manifest: Manifest) -> dict[str, Any]:
    """What the manifest of an export, or of engines, tells of the LoRAs of what it is made from."""
    merged = merged_loras(manifest)
    if merged is None:
        return {}
    loras = [
        {"file": lora.file, "scale": lora.scale, "sha256": digest}
        for lora, digest in zip(merged.loras, merged.digests, strict=True)
    ]
    return {MERGED: {"source": merged.source, "loras": loras}}


def find_files(merged: MergedLoras, artifact: Path) -> tuple[LoraConfig, ...]:
    """The LoRAs with files that can be merged once more, into what `artifact` is compared with.

    A relative path is looked up from the working directory, then from the folders that `artifact` lies in, in one of
    which it may have been made. What is found is the file that was merged, by its hash.

    Raises:
        StaleArtifactError: a file is missing, or is another one by now.
    """
    return tuple(
        dataclasses.replace(lora, file=str(_find(lora.path, expected, artifact)))
        for lora, expected in zip(merged.loras, merged.digests, strict=True)
    )


def _find(path: Path, expected: str, artifact: Path) -> Path:
    # Of an absolute path, that is the path itself.
    for place in dict.fromkeys(folder / path for folder in (Path(), *artifact.resolve().parents)):
        if place.is_file() and hash_file(place) == expected:
            return place
    problem = "which is not there any more"
    if path.is_file():
        problem = f"which is another file by now (sha256 {hash_file(path)[:12]}…, expected {expected[:12]}…)"
    raise StaleArtifactError(
        f"'{artifact}' was made with the LoRA '{path.absolute()}', {problem}; put the file that was merged back there: "
        "what it is compared with must have it too"
    )


def in_words(loras: Sequence[LoraConfig]) -> str:
    """Files and scales, for people."""
    return ", ".join(f"{lora.path.name} times {lora.scale:g}" for lora in loras)

"""Which LoRAs were merged into the model that an artifact was made from, as manifests tell it."""

from __future__ import annotations

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


def check_files(merged: MergedLoras, artifact: Path) -> None:
    """See that every LoRA can be merged once more, into what `artifact` is compared with.

    Raises:
        StaleArtifactError: a file is missing, or is another one by now.
    """
    for lora, expected in zip(merged.loras, merged.digests, strict=True):
        path = lora.path.absolute()
        if not path.is_file():
            problem = "which is not there any more"
        elif (got := hash_file(path)) != expected:
            problem = f"which is another file by now (sha256 {got[:12]}…, expected {expected[:12]}…)"
        else:
            continue
        raise StaleArtifactError(
            f"'{artifact}' was made with the LoRA '{path}', {problem}; put the file that was merged back there: what "
            "it is compared with must have it too"
        )


def in_words(loras: Sequence[LoraConfig]) -> str:
    """Files and scales, for people."""
    return ", ".join(f"{lora.path.name} times {lora.scale:g}" for lora in loras)

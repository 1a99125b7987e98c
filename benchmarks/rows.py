"""Rows of the quality tables: measured once under the same conditions, whichever benchmark asks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import stages
from benchmarks.settings import MODEL, Settings
from benchmarks.stages import identity, sources_digest
from quest_deploy.artifacts import read_json, write_json
from quest_deploy.files import hash_mapping

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.trajectories import Reference

FOLDER = "quality"
MEASURED_BY = (*stages.QUANTIZER, "quest_deploy/metrics.py", "benchmarks/trajectories.py")


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What rows are measured with.

    Attributes:
        settings: Of the benchmark.
        key: Hash of the conditions and of the code that measures.
        known: What full precision does.
    """

    settings: Settings
    key: str
    known: Reference

    @property
    def folder(self) -> Path:
        return self.settings.work / FOLDER


def bench(settings: Settings) -> Bench:
    """Full precision under the settings' conditions, drawn and recorded where that was not done yet."""
    from benchmarks.trajectories import reference

    conditions = {**settings.describe(), "recipes": None, "model": identity(MODEL)}
    key = hash_mapping({"conditions": conditions, "code": sources_digest(MEASURED_BY)})
    known = reference(settings, settings.work / FOLDER / f"reference-{key[:12]}")
    return Bench(settings=settings, key=key, known=known)


def measured(
    bench: Bench,
    name: str,
    label: str,
    subject: Any,
    measure: Callable[[], tuple[dict[str, Any], Tensor]],
) -> tuple[dict[str, Any], Tensor]:
    """Figures and images [P, 3, H, W] of one row, measured unless they are known.

    Args:
        bench: What it is measured with.
        name: Of the recipe and row, for the file.
        label: For people who wait.
        subject: Plain JSON types that say what is measured: other values make other rows.
        measure: Measures it.
    """
    from safetensors.torch import load_file

    from benchmarks.trajectories import save

    own = hash_mapping({"conditions": bench.key, "subject": subject})
    figures, drawn = (
        bench.folder / "rows" / f"{name}-{own[:12]}{suffix}" for suffix in (".json", ".safetensors")
    )
    if not figures.is_file():
        print(f"\nmeasuring {label}", flush=True)
        found, images = measure()
        save(drawn, {"images": images})
        write_json(figures, found)
    return read_json(figures), load_file(drawn)["images"]


def measured_checkpoint(
    bench: Bench, name: str, label: str, checkpoint: Path
) -> tuple[dict[str, Any], Tensor]:
    """The row of a checkpoint."""
    from benchmarks.trajectories import measure

    def run() -> tuple[dict[str, Any], Tensor]:
        return measure(checkpoint, bench.known, bench.settings)

    return measured(bench, name, label, identity(checkpoint), run)

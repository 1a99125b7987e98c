"""Rows of the quality tables: measured once under the same conditions, whichever benchmark asks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import stages
from benchmarks.settings import MODEL, Settings
from benchmarks.stages import identity, made_by
from quest_deploy.artifacts import read_json, write_json
from quest_deploy.files import hash_mapping

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.trajectories import Reference

FOLDER = "quality"
MEASURED_BY = (
    *stages.QUANTIZER,
    "quest_deploy/pipeline",
    "quest_deploy/prompts.py",
    "quest_deploy/metrics.py",
    "engines/base.py",
    "engines/torch_runtime.py",
    "benchmarks/trajectories.py",
)

Row = tuple[dict[str, Any], "Tensor"]
"""Figures and images [P, 3, H, W] of one row."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What rows are measured with.

    Attributes:
        settings: Of the benchmark.
        key: Hash of the conditions and of the code that measures.
        known: What full precision does, from each of the settings' noise seeds.
    """

    settings: Settings
    key: str
    known: tuple[Reference, ...]

    @property
    def folder(self) -> Path:
        return self.settings.work / FOLDER


def bench(settings: Settings) -> Bench:
    """Full precision under the settings' conditions, drawn and recorded where that was not done yet."""
    from benchmarks.trajectories import reference

    conditions = {**settings.describe(), "recipes": None, "noise_seeds": None, "model": identity(MODEL)}
    key = hash_mapping({"conditions": conditions, **made_by(MEASURED_BY)})
    folder = settings.work / FOLDER / f"reference-{key[:12]}"
    known = tuple(reference(MODEL, settings, folder, seed) for seed in settings.noise_seeds)
    return Bench(settings=settings, key=key, known=known)


def measured(
    bench: Bench,
    name: str,
    label: str,
    subject: Any,
    measure: Callable[[Sequence[Reference]], Iterable[Row]],
) -> Row:
    """Figures of one row over all noise seeds, and its images from the first of them; measured unless they are known.

    Args:
        bench: What it is measured with.
        name: Of the recipe and row, for the file.
        label: For people who wait.
        subject: Plain JSON types that say what is measured: other values make other rows.
        measure: Measures it beside some of the references, one after the other.
    """
    from safetensors.torch import load_file

    from benchmarks.trajectories import save

    own = hash_mapping({"conditions": bench.key, "subject": subject})[:12]
    folder = bench.folder / "rows"
    files = {known.seed: folder / f"{name}-{own}-{known.seed}.json" for known in bench.known}
    missing = [known for known in bench.known if not files[known.seed].is_file()]
    if missing:
        print(f"\nmeasuring {label}", flush=True)
    for known, (found, images) in zip(missing, measure(missing) if missing else (), strict=True):
        save(files[known.seed].with_suffix(".safetensors"), {"images": images})
        write_json(files[known.seed], found)
    first = load_file(files[bench.known[0].seed].with_suffix(".safetensors"))["images"]
    return combined([read_json(file) for file in files.values()]), first


def combined(figures: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same row from several noise seeds as one: the mean of every number, by prompt and by step as well.

    What does not depend on the noise is the first one's.
    """
    result: dict[str, Any] = {}
    for name, first in figures[0].items():
        if not isinstance(first, dict):
            result[name] = round(sum(one[name] for one in figures), 1) if name == "seconds" else first
            continue
        result[name] = {key: _mean([one[name][key] for one in figures]) for key in first} | {
            "per_seed": [one[name]["mean"] for one in figures]
        }
    return result


def _mean(values: Sequence[Any]) -> Any:
    if isinstance(values[0], list):
        return [_mean(column) for column in zip(*values, strict=True)]
    return round(sum(values) / len(values), 4)


def measured_checkpoint(bench: Bench, name: str, label: str, checkpoint: Path) -> Row:
    """The row of a checkpoint."""
    from benchmarks.trajectories import measure

    def run(known: Sequence[Reference]) -> Iterable[Row]:
        return measure(checkpoint, known, bench.settings)

    return measured(bench, name, label, identity(checkpoint), run)

"""Every baseline and QuEST at the bits of each recipe: made, drawn and measured under the same conditions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import quality, rows, stages
from benchmarks.baselines.rows import FINETUNED, MADE_BY_FINETUNE, ROWS, budget, rows_of, variant
from benchmarks.environment import header
from benchmarks.rows import Bench
from benchmarks.settings import MODEL, Settings
from benchmarks.stages import identity, sources_digest
from quest_deploy.artifacts import read_json
from quest_deploy.config import Recipe
from quest_deploy.manifest import QUANTIZATION_NAME

if TYPE_CHECKING:
    from benchmarks.trajectories import Reference
    from quest_deploy.quantize.calibrate import CalibrationSet

NAME = "baselines"
MODELOPT = "modelopt-"
MODELOPT_MADE_BY = "benchmarks/baselines/modelopt.py"


def run(settings: Settings) -> dict[str, Any]:
    """Measure all rows of all recipes; go on where an interrupted run stopped."""
    import importlib.util

    if importlib.util.find_spec("modelopt") is None:
        raise SystemExit("benchmarks: nvidia-modelopt is missing; pip install -e '.[baselines]'")
    folder = settings.work / rows.FOLDER
    made: dict[str, dict[str, Path]] = {}
    seconds: dict[str, dict[str, float | None]] = {}
    # Processes of their own come first, before torch is loaded here.
    for name in settings.recipes:
        made[name], seconds[name] = _made(settings, name, folder)
    for name in settings.recipes:
        made[name]["minmax"] = quality.minmax(settings, name, folder)
    bench = rows.bench(settings)
    recipes = {name: _recipe(bench, name, made[name], seconds[name]) for name in settings.recipes}
    return {
        **header(settings),
        "modelopt": _version(),
        "torch_threads": quality.threads(),
        "recipes": recipes,
    }


def _version() -> str:
    from importlib import metadata

    return metadata.version("nvidia-modelopt")


def _made(settings: Settings, name: str, folder: Path) -> tuple[dict[str, Path], dict[str, float | None]]:
    """Checkpoints of the rows that `quest-deploy finetune` makes, and the seconds that took."""
    paths: dict[str, Path] = {}
    seconds: dict[str, float | None] = {}
    paths["quest"], outcome = stages.finetuned(settings, name)
    seconds["quest"] = _whole(outcome)
    for row in MADE_BY_FINETUNE:
        paths[row] = folder / "checkpoints" / f"{name}-{row}"
        recipe = variant(settings.recipe(name), row, quick=settings.quick)
        seconds[row] = _whole(stages.finetune(settings, recipe, paths[row]))
    return paths, seconds


def _whole(outcome: dict[str, Any]) -> float | None:
    """Seconds of a run that was not interrupted."""
    return None if outcome["resumed"] else outcome["seconds"]


def _recipe(
    bench: Bench, name: str, made: dict[str, Path], seconds: dict[str, float | None]
) -> dict[str, Any]:
    """All rows of one recipe, and what QuEST has over each."""
    settings = bench.settings
    recipe = settings.recipe(name)
    held = _held(settings, recipe)
    found: dict[str, dict[str, Any]] = {}
    for row in rows_of(recipe):
        label = f"{name}, {ROWS[row]}"
        if row.startswith(MODELOPT):
            figures = _modelopt(bench, name, row, label, held)
            took, own = figures["made_in_seconds"], None
            used = recipe
        else:
            figures, _ = rows.measured_checkpoint(bench, f"{name}-{row}", label, made[row])
            figures["validation_loss"] = _loss(bench, name, row, made[row], held)
            took, own = seconds.get(row), own_loss(made[row], row)
            used = recipe if row in ("quest", "minmax") else variant(recipe, row, quick=settings.quick)
        found[row] = {**figures, "own_loss": own, "budget": {**budget(used, row), "seconds": took}}
    return {"rows": found, "differences": differences(found)}


def differences(found: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Mean and 95 % interval, paired by prompt, of what QuEST has over each baseline."""
    return {row: quality.difference(found["quest"], found[row]) for row in found if row != "quest"}


def own_loss(checkpoint: Path, row: str) -> dict[str, float] | None:
    """What a method itself minimizes, where it begins and ends, relative to the beginning; None without training."""
    history = read_json(checkpoint / QUANTIZATION_NAME)["history"]
    if row == "adaround":
        errors = [after / before for before, after in history["adaround"].values() if before > 0]
        return {"before": 1.0, "after": round(sum(errors) / len(errors), 4)}
    phases = [history[phase] for phase in ("temporal", "sensitive") if phase in history]
    if row not in FINETUNED or not phases:
        return None
    return {"before": round(phases[0]["validation_loss"][0][1], 4), "after": round(phases[-1]["best"], 4)}


def _held(settings: Settings, recipe: Recipe) -> Callable[[], CalibrationSet]:
    """Trajectories of the calibration prompts that choose the result of finetuning."""

    def load() -> CalibrationSet:
        from benchmarks.baselines.held import held_trajectories

        return held_trajectories(settings, recipe)

    return load


def _loss(bench: Bench, name: str, row: str, checkpoint: Path, held: Callable[[], CalibrationSet]) -> float:
    """The error of a checkpoint's predictions on those trajectories."""
    from benchmarks.baselines.held import measured_loss

    return measured_loss(bench, f"{name}-{row}", checkpoint, held)


def _modelopt(
    bench: Bench, name: str, row: str, label: str, held: Callable[[], CalibrationSet]
) -> dict[str, Any]:
    """A row of Model-Optimizer, whose quantized network exists only while it is measured."""
    recipe, settings = bench.settings.recipe(name), bench.settings
    algorithm = row.removeprefix(MODELOPT)

    def measure(known: Sequence[Reference]) -> Iterable[rows.Row]:
        from benchmarks.baselines.modelopt import measure_modelopt

        return measure_modelopt(bench, known, recipe, algorithm, held())

    subject = {
        "row": row,
        "model": identity(MODEL),
        "bits": [recipe.weight_bits, recipe.activation_bits],
        "overrides": [vars(override) for override in recipe.overrides],
        "prompts": [recipe.calibration_prompts, recipe.calibration_steps, settings.seed],
        "modelopt": _version(),
        "code": sources_digest((MODELOPT_MADE_BY,)),
    }
    return rows.measured(bench, f"{name}-{row}", label, subject, measure)[0]

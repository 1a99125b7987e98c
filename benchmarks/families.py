"""What the recipes cost models that read no text: by class and predicting v, and unconditional and predicting noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import quality, stages
from benchmarks.environment import header
from benchmarks.runtimes import codes, gate, summarize, within_gates
from benchmarks.settings import Settings
from benchmarks.tables import Table, interval, number, yes
from quest_deploy.artifacts import read_json
from quest_deploy.config import HELD_OUT_SEED
from quest_deploy.manifest import MANIFEST_NAME
from quest_deploy.model.families import choose_prompts
from quest_deploy.model.spec import classes_of, family_of

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.trajectories import Reference

NAME = "families"
MODELS = {"digits-class": "digits by class, v, guided", "digits": "digits, unconditional, noise"}
"""Folders below `reference-model/`, and what the tables call them."""
ROWS = {row: quality.ROWS[row] for row in ("calibrated", "start", "quest")}
PAIRS = (("quest", "calibrated"), ("start", "calibrated"), ("quest", "start"))
SAMPLES, QUICK_SAMPLES = 64, 3
GUIDANCE_SCALE = 2.0
GRID_COLUMNS = 10


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Settings of one model; its classes, in turn, are the prompts.

    Attributes:
        model: A diffusers directory.
    """

    model: Path
    guidance_scale: float = GUIDANCE_SCALE

    @property
    def prompts(self) -> tuple[str, ...]:
        count = QUICK_SAMPLES if self.quick else SAMPLES
        return choose_prompts(family_of(self.model), classes_of(self.model), (), default=(), count=count)


def run(settings: Settings) -> dict[str, Any]:
    """Measure all rows of all recipes for each model."""
    subjects = {
        name: ModelSettings(
            recipes=settings.recipes, quick=settings.quick, model=Path("reference-model") / name
        )
        for name in MODELS
    }
    # Every stage runs in a process of its own, measured, before torch is loaded here.
    made = {
        name: {recipe: _make(subject, recipe) for recipe in settings.recipes}
        for name, subject in subjects.items()
    }
    models = {}
    for name, subject in subjects.items():
        known = full_precision(subject)
        models[name] = {
            recipe: _recipe(subject, recipe, known, **made[name][recipe]) for recipe in settings.recipes
        }
    described = {key: value for key, value in settings.describe().items() if key != "noise_seeds"}
    described |= {
        "model": [str(subject.model) for subject in subjects.values()],
        "prompts": len(subjects["digits"].prompts),
        "guidance_scale": GUIDANCE_SCALE,
        "held_out_seed": HELD_OUT_SEED,
    }
    return {**header(settings), "settings": described, "models": models}


def _make(subject: ModelSettings, name: str) -> dict[str, Any]:
    """Checkpoints of every row; the finetuned one exported, compared with its ONNX, and built."""
    folder, unique = subject.work / NAME, f"{subject.model.name}-{name}"
    recipe = subject.recipe(name)
    checkpoints = {row: folder / "checkpoints" / f"{unique}-{row}" for row in ROWS}
    taken = {
        row: stages.finetune(
            subject,
            recipe if row == "quest" else quality.variant(recipe, row),
            checkpoints[row],
            model=subject.model,
        )
        for row in ROWS
    }
    finetuned = checkpoints["quest"]
    onnx, _ = stages.export(subject, unique, finetuned, "onnxruntime")
    report, _ = stages.parity(subject, unique, finetuned, onnx, model=subject.model)
    for_engines, _ = stages.export(subject, unique, finetuned, "tensorrt-rtx")
    engines, built = stages.build(subject, unique, for_engines)
    return {
        "checkpoints": checkpoints,
        "finetuning": taken["quest"],
        "deployment": summarize(read_json(report / "report.json")),
        "engines": {**built, "builds": built["exit_code"] == 0 and (engines / MANIFEST_NAME).is_file()},
    }


def full_precision(subject: ModelSettings) -> Reference:
    """Trajectories and images of the full-precision model."""
    from benchmarks.trajectories import Reference, draw
    from quest_deploy.model.load import load_model
    from quest_deploy.pipeline import load_pipeline
    from quest_deploy.quantize.calibrate import record_trajectories

    data = record_trajectories(
        load_model(subject.model),
        subject.prompts,
        steps=subject.denoising_steps,
        guidance_scale=subject.guidance_scale,
        seed=HELD_OUT_SEED,
        batch_size=subject.batch_size,
    )
    with load_pipeline(subject.model) as pipeline:
        images = draw(pipeline, subject, HELD_OUT_SEED)
    return Reference(seed=HELD_OUT_SEED, data=data, images=images)


def _recipe(
    subject: ModelSettings, name: str, known: Reference, *, checkpoints: dict[str, Path], **stages_taken: Any
) -> dict[str, Any]:
    """All rows of one recipe, their differences, and the grid of images."""
    from benchmarks.trajectories import measure

    figures: dict[str, dict[str, Any]] = {}
    images = {"fp32": known.images}
    for row, label in ROWS.items():
        print(f"\nmeasuring {subject.model.name}, {name}, {label}", flush=True)
        ((figures[row], images[row]),) = measure(checkpoints[row], [known], subject)
    _save_grid(subject, name, images)
    return {"rows": figures, "differences": differences(figures), **stages_taken}


def differences(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Of each pair of rows that is compared."""
    return {_key(pair): quality.difference(rows[pair[0]], rows[pair[1]]) for pair in PAIRS}


def _save_grid(subject: ModelSettings, name: str, images: dict[str, Tensor]) -> None:
    from benchmarks.grid import save_grid
    from quest_deploy.pipeline.images import to_pil

    shown = range(min(GRID_COLUMNS, len(subject.prompts)))
    rows = [(quality.GRID_LABELS[row], [to_pil(images[row][i]) for i in shown]) for row in images]
    captions = [subject.prompts[i] for i in shown]
    save_grid(subject.results / f"{NAME}-{subject.model.name}-{name}.png", rows, captions)


def tables(result: dict[str, Any]) -> list[Table]:
    """The figures, the differences, and what deployment did."""
    each = [
        ((MODELS[model], name.upper()), result["models"][model][name])
        for model in MODELS
        for name in result["settings"]["recipes"]
    ]
    settings = result["settings"]
    return [
        Table(
            title="Models without text, against full precision",
            columns=("model", "recipe", "row", "noise SNR, dB", "guided, dB", "image PSNR, dB", "SSIM"),
            rows=tuple(
                (
                    *labels,
                    ROWS[row],
                    number(recipe["rows"][row]["raw_snr_db"]["mean"]),
                    number(recipe["rows"][row]["guided_snr_db"]["mean"]),
                    number(recipe["rows"][row]["psnr_db"]["mean"]),
                    number(recipe["rows"][row]["ssim"]["mean"], 4),
                )
                for labels, recipe in each
                for row in ROWS
            ),
            labels=3,
            note=f"Means over {settings['prompts']} held-out seeds (of the classes in turn), {settings['steps']} DDIM "
            f"steps, guidance {settings['guidance_scale']:g} where there are classes, same noise; figures as those "
            "of the first table under Quality.",
        ),
        Table(
            title="Differences, paired by seed",
            columns=("model", "recipe", "rows", "noise SNR, dB", "image PSNR, dB", "SSIM"),
            rows=tuple(
                (
                    *labels,
                    " − ".join(ROWS[row].partition(" ")[0] for row in pair),
                    *(
                        interval(recipe["differences"][_key(pair)][figure])
                        for figure in ("raw_snr_db", "psnr_db")
                    ),
                    interval(recipe["differences"][_key(pair)]["ssim"], 4),
                )
                for labels, recipe in each
                for pair in PAIRS
            ),
            labels=3,
            note="Mean and 95 % bootstrap interval over seeds.",
        ),
        Table(
            title="Deployment of models without text",
            columns=(
                "model",
                "recipe",
                "all gates kept",
                "int8 codes that differ",
                "noise SNR, same codes, dB",
                "TensorRT for RTX builds",
            ),
            rows=tuple(
                (
                    *labels,
                    yes(within_gates(recipe["deployment"])),
                    codes(recipe["deployment"]["codes"]),
                    number(gate(recipe["deployment"], "noise SNR, same codes"), 1),
                    yes(recipe["engines"]["builds"]),
                )
                for labels, recipe in each
            ),
            labels=2,
            note="The finetuned checkpoint from torch to ONNX Runtime, with the gates of text-to-image (codes, and "
            "noise SNR with the same codes, of the first two seeds), and whether its engine is built (not run).",
        ),
    ]


def _key(pair: tuple[str, str]) -> str:
    return " - ".join(pair)

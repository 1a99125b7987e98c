"""What each part of the method contributes at W4A4, and how a checkpoint does on samplers it was not calibrated on.

Variants are finetuned with fewer prompts and updates than the packaged recipe, which is one row: differences between
them count.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import quality, rows, stages
from benchmarks.baselines.rows import ADAROUND_ITERATIONS
from benchmarks.environment import header
from benchmarks.settings import MODEL, Settings
from benchmarks.tables import MISSING, Table, interval, number
from quest_deploy.config import Recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

NAME = "ablation"
RECIPE = "w4a4"
PROMPTS, STEPS = 48, (30, 60)
VARIANTS = {
    "short": "QuEST, fewer prompts and updates",
    "adaround-start": "weights rounded by AdaRound at the start",
    "no-phase-1": "phase 1 off",
    "no-phase-2": "phase 2 off",
    "no-time-aware": "one activation scale for all timesteps",
    "no-channel-wise": "no channel rows",
    "no-walks": "no walks",
    "own-trajectories": "half of the pairs of the quantized network's own trajectories",
    "own-trajectories-no-walks": "the same, and no walks",
    "uniform": "4-bit activations in the residual projections too",
    "collapsed": "one scale where the groups agree, for at most 0.1 dB",
    "split": "a grid for each half of a skip concatenation",
    "no-rotation": "feed-forwards as they are",
    "shared-inputs": "one quantizer for queries, keys and values of one input",
    "queries-keys-8": "8-bit queries and keys",
    "attention-8-softmax-8": "8-bit queries, keys, values and softmax",
    "attention-4-softmax-8": "4-bit queries, keys and values, 8-bit softmax",
    "table": "time-embedding tables instead of a quantized time path",
    "paper-sd": "phase 2 trains `paper-sd` (feed-forward layers)",
    "auto": "phase 2 trains `auto` (a fifth of the weights)",
    "groups-5": "calibrated on 5 sampler steps (5 timestep groups)",
    "groups-50": "calibrated on 50 sampler steps (50 timestep groups)",
}
SAMPLERS: tuple[tuple[str, int], ...] = (
    ("ddim", 25),
    ("ddim", 10),
    ("ddim", 50),
    ("euler", 25),
    ("dpm++", 20),
)
SAMPLED = ("calibrated", "quest")
FIGURES = ("raw_snr_db", "guided_snr_db", "psnr_db")
COMPARED = ("raw_snr_db", "psnr_db")


def variant(recipe: Recipe, name: str) -> Recipe:
    """The recipe of a row of the ablation."""
    temporal = dataclasses.replace(recipe.temporal, steps=STEPS[0])
    sensitive = dataclasses.replace(recipe.sensitive, steps=STEPS[1])
    own = PROMPTS - recipe.validation_prompts
    changes: dict[str, Any] = {
        "short": {},
        "adaround-start": {"initializer": "adaround"},
        "no-phase-1": {"temporal": dataclasses.replace(temporal, steps=0)},
        "no-phase-2": {"sensitive": dataclasses.replace(sensitive, steps=0)},
        "no-time-aware": {"time_aware": False},
        "no-channel-wise": {"channel_wise": False},
        "no-walks": {"walk_share": 0.0},
        "own-trajectories": {"on_policy_prompts": own},
        "own-trajectories-no-walks": {"on_policy_prompts": own, "walk_share": 0.0},
        "uniform": {"overrides": ()},
        "paper-sd": {"sensitive": dataclasses.replace(sensitive, layers="paper-sd")},
        "collapsed": {"collapse_loss_db": 0.1},
        "split": {"split": True},
        "no-rotation": {"rotation": None},
        "shared-inputs": {"shared_inputs": True},
        "queries-keys-8": {"attention_bits": 8},
        "attention-8-softmax-8": {"attention_bits": 8, "softmax_bits": 8},
        "attention-4-softmax-8": {"attention_bits": 4, "softmax_bits": 8},
        "table": {"temporal_path": "table"},
        "auto": {"sensitive": dataclasses.replace(sensitive, layers="auto")},
        "groups-5": {"calibration_steps": 5},
        "groups-50": {"calibration_steps": 50},
    }[name]
    short = {
        "name": f"{recipe.name}-{name}",
        "calibration_prompts": PROMPTS,
        "adaround_iterations": ADAROUND_ITERATIONS,
        "temporal": temporal,
        "sensitive": sensitive,
    }
    return dataclasses.replace(recipe, **(short | changes))


def run(settings: Settings) -> dict[str, Any]:
    """Finetune and measure every variant; then the whole recipe on other samplers."""
    one_seed = dataclasses.replace(settings, noise_seeds=settings.noise_seeds[:1])
    recipe = settings.recipe(RECIPE)
    folder = settings.work / rows.FOLDER
    paths: dict[str, Path] = {"quest": stages.finetuned(settings, RECIPE)[0]}
    paths["calibrated"] = folder / "checkpoints" / f"{RECIPE}-calibrated"
    stages.finetune(settings, quality.variant(recipe, "calibrated"), paths["calibrated"])
    took: dict[str, float | None] = {}
    for name in VARIANTS:
        paths[name] = folder / "checkpoints" / f"{RECIPE}-{name}"
        outcome = stages.finetune(settings, variant(recipe, name), paths[name])
        took[name] = None if outcome["resumed"] else outcome["seconds"]
    bench = rows.bench(one_seed)
    found: dict[str, dict[str, Any]] = {}
    for name, path in paths.items():
        found[name], _ = rows.measured_checkpoint(bench, f"{RECIPE}-{name}", f"{RECIPE}, {name}", path)
    differences = {
        name: quality.difference(found[name], found["short"]) for name in VARIANTS if name != "short"
    }
    return {
        **header(one_seed),
        "recipe": RECIPE,
        "prompts": PROMPTS,
        "updates": list(STEPS),
        "rows": found,
        "differences": differences,
        "seconds": took,
        "samplers": _samplers(one_seed, {name: paths[name] for name in SAMPLED}),
    }


def _samplers(settings: Settings, paths: dict[str, Path]) -> list[dict[str, Any]]:
    """Image PSNR of checkpoints against full precision under each sampler."""
    from benchmarks.stages import identity, made_by
    from quest_deploy.artifacts import read_json, write_json
    from quest_deploy.files import hash_mapping

    result = []
    for scheduler, steps in SAMPLERS:
        subject = {
            "model": identity(MODEL),
            "checkpoints": {name: identity(path) for name, path in paths.items()},
            "sampler": [scheduler, steps],
            "settings": settings.describe(),
            "prompts": list(settings.prompts),
            **made_by(rows.MEASURED_BY),
        }
        file = settings.work / NAME / f"{scheduler}-{steps}-{hash_mapping(subject)[:12]}.json"
        if not file.is_file():
            print(f"\ndrawing with {scheduler}, {steps} steps", flush=True)
            file.parent.mkdir(parents=True, exist_ok=True)
            write_json(file, _sampler(settings, paths, scheduler, steps))
        result.append({"scheduler": scheduler, "steps": steps, **read_json(file)})
    return result


def _sampler(settings: Settings, paths: dict[str, Path], scheduler: str, steps: int) -> dict[str, Any]:
    from quest_deploy.metrics import paired_interval, psnr_db

    wanted = draw(MODEL, settings, scheduler, steps)
    psnr = {
        name: psnr_db(wanted, draw(path, settings, scheduler, steps)).tolist() for name, path in paths.items()
    }
    pairs = zip(psnr["quest"], psnr["calibrated"], strict=True)
    ends = paired_interval([first - second for first, second in pairs])
    means = {name: round(sum(values) / len(values), 4) for name, values in psnr.items()}
    return {"psnr_db": means, "gain_db": dict(zip(("low", "mean", "high"), ends, strict=True))}


def draw(path: Path, settings: Settings, scheduler: str, steps: int) -> Tensor:
    """The held-out prompts' images [P, 3, H, W] by one sampler."""
    import torch

    from quest_deploy.pipeline import load_pipeline
    from quest_deploy.sampling import generators_of

    images = []
    with load_pipeline(path) as pipeline:
        for chunk in _chunks(settings.prompts, settings.batch_size):
            seeds = [settings.noise_seeds[0] + index for index, _ in chunk]
            latents = pipeline.denoise(
                pipeline.initial_noise(seeds),
                pipeline.encode([prompt for _, prompt in chunk]),
                pipeline.encode_negative(len(chunk)),
                steps=steps,
                guidance_scale=settings.guidance_scale,
                scheduler=scheduler,
                generators=generators_of(seeds),
            )
            images.append(pipeline.decode(latents).cpu())
    return torch.cat(images)


def _chunks(prompts: Sequence[str], size: int) -> list[list[tuple[int, str]]]:
    numbered = list(enumerate(prompts))
    return [numbered[start : start + size] for start in range(0, len(numbered), size)]


def tables(result: dict[str, Any]) -> list[Table]:
    """The parts, then the samplers."""
    found = result["rows"]
    labels = {"calibrated": "calibrated, not finetuned", **VARIANTS, "quest": "QuEST, the packaged recipe"}
    first, second = result["updates"]
    name = result["recipe"].upper()
    return [
        Table(
            title=f"Parts of the method at {name}",
            columns=(
                "row",
                *("noise SNR, dB", "noise SNR guided, dB", "image PSNR, dB"),
                "noise SNR against the first variant, dB",
                "image PSNR against it, dB",
            ),
            rows=tuple(
                (
                    label,
                    *(number(found[row][figure]["mean"]) for figure in FIGURES),
                    *(
                        interval(result["differences"][row][figure])
                        if row in result["differences"]
                        else MISSING
                        for figure in COMPARED
                    ),
                )
                for row, label in labels.items()
                if row in found
            ),
            labels=1,
            note=f"{quality.sample_size(result)}. Variants have {result['prompts']} calibration prompts and "
            f"{first} + {second} updates, the packaged recipe more. "
            "Each differs from the first variant in what its name says. Intervals are paired by prompt, of one noise "
            "seed: what another would do to image PSNR is not in them, nor what another finetuning of the same recipe "
            "gives (its row here and under Quality are two)." + quality.seen_noise(result),
        ),
        Table(
            title=f"{name} on samplers it was not calibrated on",
            columns=("sampler", "steps", "calibrated, image PSNR, dB", "QuEST, image PSNR, dB", "gain, dB"),
            rows=tuple(
                (
                    row["scheduler"],
                    str(row["steps"]),
                    number(row["psnr_db"]["calibrated"]),
                    number(row["psnr_db"]["quest"]),
                    interval(row["gain_db"]),
                )
                for row in result["samplers"]
            ),
            labels=1,
            note="Calibrated on 25 DDIM steps (the first row). Against full precision with the same sampler and noise.",
        ),
    ]

"""Kernel distance (KID) of what each recipe and baseline draws to real emoji, in the features of a small encoder.

Every picture is drawn by the exported ONNX in OpenVINO, the fastest CPU runtime of these files: 2,048 prompts that name
an emoji each, the same noise in every row. So the baselines are those that can be exported; Model-Optimizer's exist in
PyTorch alone here. The encoder is not Inception (see benchmarks/encoder.py), so the figures compare with each other
alone.
"""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import quality, rows, stages
from benchmarks.baselines.rows import MADE_BY_FINETUNE, ROWS, variant
from benchmarks.environment import header
from benchmarks.settings import MODEL, ROOT, Settings
from benchmarks.stages import identity, made_by
from benchmarks.tables import Table, interval
from quest_deploy.artifacts import write_json
from quest_deploy.files import hash_file, hash_mapping

if TYPE_CHECKING:
    from torch import Tensor

NAME = "kid"
TARGET = "onnxruntime"
PROMPTS = ROOT / "benchmarks" / "data" / "kid-prompts.txt"
REAL = ROOT / "benchmarks" / "data" / "kid-features.safetensors"
# What draws, beside the artifact.
DRAWN_BY = (
    "quest_deploy/pipeline",
    "quest_deploy/sampling.py",
    "engines/base.py",
    "engines/openvino_runtime.py",
)
FIRST_SEED = 10_000
# It has prompts and noise of its own.
UNUSED_SETTINGS = ("prompts", "noise_seeds")
CHUNK = 256
GROUPS = 32
SCALE = 1000
FIGURES = ("kid", "above_fp32")


def run(settings: Settings) -> dict[str, Any]:
    """Draw with every row, and measure how far the pictures are from real ones."""
    checkpoints = _checkpoints(settings)
    artifacts = {"fp32": stages.export(settings, "fp32", MODEL, TARGET)[0]}
    for label, checkpoint in checkpoints.items():
        artifacts[label] = stages.export(settings, label, checkpoint, TARGET)[0]
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    if settings.quick:
        prompts = prompts[: 2 * GROUPS]
    features = {label: draw_features(settings, label, onnx, prompts) for label, onnx in artifacts.items()}
    found = compare(features)
    recipes: dict[str, Any] = {name: {} for name in settings.recipes}
    for label in checkpoints:
        name, _, row = label.partition("-")
        recipes[name][row] = found[label]
    return {
        **header(settings),
        **_versions(),
        "images": len(prompts),
        "groups": GROUPS,
        "fp32": found["fp32"],
        "recipes": recipes,
    }


def _checkpoints(settings: Settings) -> dict[str, Path]:
    """Of every row, by "recipe-row"."""
    folder = settings.work / rows.FOLDER
    found: dict[str, Path] = {}
    # Processes of their own come first, before torch is loaded here.
    for name in settings.recipes:
        found[f"{name}-quest"] = stages.finetuned(settings, name)[0]
        for row in MADE_BY_FINETUNE:
            path = found[f"{name}-{row}"] = folder / "checkpoints" / f"{name}-{row}"
            stages.finetune(settings, variant(settings.recipe(name), row, quick=settings.quick), path)
    for name in settings.recipes:
        found[f"{name}-minmax"] = _minmax(settings, name, folder)
    return found


def _minmax(settings: Settings, name: str, folder: Path) -> Path:
    """Made by a process of its own too: it loads torch, and every row is exported after it."""
    apart = get_context("spawn").Process(target=quality.minmax, args=(settings, name, folder))
    apart.start()
    apart.join()
    if apart.exitcode:
        raise SystemExit(f"benchmarks: the min-max ranges of {name} failed")
    return quality.minmax(settings, name, folder)


def _versions() -> dict[str, str]:
    from importlib import metadata

    return {"openvino": metadata.version("openvino")}


def draw_features(settings: Settings, label: str, onnx: Path, prompts: list[str]) -> Tensor:
    """Features [n, d] of what an ONNX directory draws; prompt `i` from the noise of seed `FIRST_SEED + i`."""
    import torch
    from safetensors.torch import load_file

    from benchmarks.encoder import FILE, features_of, load_encoder
    from benchmarks.trajectories import save
    from quest_deploy.pipeline import load_pipeline

    subject = {
        "artifact": identity(onnx),
        "prompts": hash_file(PROMPTS),
        "steps": settings.denoising_steps,
        "guidance_scale": settings.guidance_scale,
        "count": len(prompts),
        **made_by(DRAWN_BY),
    }
    folder = settings.work / NAME / f"{label}-{hash_mapping(subject)[:12]}"
    starts = range(0, len(prompts), CHUNK)
    files = [folder / f"images-{start:05d}.safetensors" for start in starts]
    if not all(file.is_file() for file in files):
        print(f"\ndrawing {label}", flush=True)
        with load_pipeline(onnx, backend="openvino") as pipeline:
            for start, file in zip(starts, files, strict=True):
                if file.is_file():
                    continue
                parts = []
                for first in range(start, min(start + CHUNK, len(prompts)), settings.batch_size):
                    chunk = prompts[first : min(first + settings.batch_size, start + CHUNK)]
                    latents = pipeline.denoise(
                        pipeline.initial_noise(range(FIRST_SEED + first, FIRST_SEED + first + len(chunk))),
                        pipeline.encode(chunk),
                        pipeline.encode_negative(len(chunk)),
                        steps=settings.denoising_steps,
                        guidance_scale=settings.guidance_scale,
                    )
                    parts.append((pipeline.decode(latents) * 255).round().to(torch.uint8))
                save(file, {"images": torch.cat(parts)})
                print(f"  {min(start + CHUNK, len(prompts))} of {len(prompts)}", flush=True)
        write_json(folder / "subject.json", subject)
    images = torch.cat([load_file(file)["images"] for file in files])
    return features_of(load_encoder(FILE), images)


def compare(features: dict[str, Tensor]) -> dict[str, Any]:
    """KID of every row with its interval, and what it is above full precision's."""
    from safetensors.torch import load_file

    count = len(features["fp32"])
    real = load_file(REAL)["features"].float()[:count]
    found = {label: jackknife(real, drawn) for label, drawn in features.items()}
    rows: dict[str, Any] = {}
    for label, values in found.items():
        rows[label] = {"kid": _interval(*values)}
        if label != "fp32":
            pairs = (mine - other for mine, other in zip(values, found["fp32"], strict=True))
            rows[label]["above_fp32"] = _interval(*pairs)
    return rows


def jackknife(real: Tensor, drawn: Tensor) -> tuple[float, Tensor]:
    """Unbiased squared kernel distance, and those without each group of prompts in turn, [GROUPS].

    The kernel is KID's, (x.y / d + 1)^3 (Binkowski et al. 2018). Picture `i` of either side is of prompt `i`, so they
    are not independent: of the products between the sides, too, only those of two prompts count (the estimator of
    Gretton et al. 2012, equation 4). Prompt `i` is in group `i mod GROUPS`.
    """
    import torch
    from torchmetrics.image.kid import poly_kernel

    x, y = real.double(), drawn.double()
    across = poly_kernel(x, y)
    products = (poly_kernel(x, x) + poly_kernel(y, y) - across - across.T).fill_diagonal_(0)
    group = torch.arange(len(x)) % GROUPS

    def mean(kept: Tensor) -> Tensor:
        count = int(kept.sum())
        return products[kept][:, kept].sum() / (count * (count - 1))

    without = torch.stack([mean(group != left_out) for left_out in range(GROUPS)])
    return float(mean(group >= 0)), without


def _interval(whole: float, without: Tensor) -> dict[str, float]:
    """95 % interval by the delete-a-group jackknife, times `SCALE`."""
    groups = without.numel()
    error = float(((groups - 1) / groups * (without - without.mean()).square().sum()).sqrt())
    # Student's t with GROUPS - 1 = 31 degrees of freedom.
    reach = 2.0395 * error
    return {
        "low": round(SCALE * (whole - reach), 4),
        "mean": round(SCALE * whole, 4),
        "high": round(SCALE * (whole + reach), 4),
    }


def overlap(result: dict[str, Any], name: str) -> bool:
    """Whether the interval of QuEST with a recipe and full precision's have something in common."""
    mine, other = result["recipes"][name]["quest"]["kid"], result["fp32"]["kid"]
    return bool(mine["low"] <= other["high"] and other["low"] <= mine["high"])


def tables(result: dict[str, Any]) -> list[Table]:
    """One row for each set of pictures."""
    lines = [("fp32", "full precision", interval(result["fp32"]["kid"]), "–")]
    lines += [
        (name.upper(), label, *(interval(result["recipes"][name][row][figure]) for figure in FIGURES))
        for name in result["settings"]["recipes"]
        for row, label in ROWS.items()
        if row in result["recipes"][name]
    ]
    return [
        Table(
            title=f"Kernel distance to real emoji, × {SCALE}",
            columns=("recipe", "row", "KID", "above full precision, same prompts and noise"),
            rows=tuple(lines),
            labels=2,
            note=f"{result['images']:,} pictures a row, one for each prompt, drawn by the exported ONNX in OpenVINO "
            f"{result['openvino']}, against the {result['images']:,} real pictures. Features of a small "
            "encoder trained on emoji, not Inception's: figures compare with each other alone. Intervals of 95 % by a "
            f"jackknife over {result['groups']} groups of prompts.",
        )
    ]

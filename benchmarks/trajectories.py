"""Running denoisers for the quality benchmark: the full-precision trajectories, and what a row does with them."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.settings import MODEL, Settings
from quest_deploy.artifacts import hash_directory, write_artifact
from quest_deploy.config import FinetuneConfig, Recipe, to_dict
from quest_deploy.metrics import IDENTICAL_DB, psnr_db, snr_db, ssim
from quest_deploy.model.components import predict
from quest_deploy.model.load import load_model
from quest_deploy.pipeline import Pipeline, load_pipeline
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize import calibrate
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.checkpoint import freeze, save_checkpoint
from quest_deploy.quantize.initialize import initialize
from quest_deploy.quantize.insert import insert, quantizable_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.select import layer_bits
from quest_deploy.quantize.trace import trace
from quest_deploy.sampling import guide


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What full precision does with the held-out prompts.

    Attributes:
        seed: Of the first prompt's noise.
        data: Inputs and both branches' outputs at every step.
        images: float32 [P, 3, H, W] in [0, 1].
    """

    seed: int
    data: CalibrationSet
    images: Tensor


def record(
    model: Path,
    prompts: Sequence[str],
    *,
    steps: int,
    guidance_scale: float,
    seed: int,
    batch_size: int,
    file: Path,
) -> CalibrationSet:
    """The trajectories of the full-precision `model`, kept in `file`."""
    if file.is_file():
        return calibrate.from_tensors(load_file(file))
    data = calibrate.record_trajectories(
        load_model(model),
        prompts,
        steps=steps,
        guidance_scale=guidance_scale,
        seed=seed,
        batch_size=batch_size,
        report=lambda completed, total: print(f"  recorded {completed} of {total} prompts", flush=True),
    )
    save(file, data.tensors())
    return data


def reference(model: Path, settings: Settings, folder: Path, seed: int) -> Reference:
    """Trajectories and images of the full-precision `model`, recorded once and shared by all rows."""
    data = record(
        model,
        settings.prompts,
        steps=settings.denoising_steps,
        guidance_scale=settings.guidance_scale,
        seed=seed,
        batch_size=settings.batch_size,
        file=folder / f"trajectories-{seed}.safetensors",
    )
    file = folder / f"images-{seed}.safetensors"
    if not file.is_file():
        with load_pipeline(model) as pipeline:
            save(file, {"images": draw(pipeline, settings, seed)})
    return Reference(seed=seed, data=data, images=load_file(file)["images"])


def save(file: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file, all of it or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)
    partial.replace(file)


def draw(pipeline: Pipeline, settings: Settings, seed: int) -> Tensor:
    """The held-out prompts' images, float32 [P, 3, H, W]; prompt `i` from the noise of seed `seed + i`."""
    images = []
    prompts = settings.prompts
    for start in range(0, len(prompts), settings.batch_size):
        chunk = prompts[start : start + settings.batch_size]
        seeds = range(seed + start, seed + start + len(chunk))
        latents = pipeline.denoise(
            pipeline.initial_noise(seeds),
            pipeline.encode(chunk),
            pipeline.encode_negative(len(chunk)),
            steps=settings.denoising_steps,
            guidance_scale=settings.guidance_scale,
        )
        images.append(pipeline.decode(latents).cpu())
    return torch.cat(images)


def teacher_forced(pipeline: Pipeline, data: CalibrationSet, settings: Settings) -> tuple[Tensor, Tensor]:
    """Noise SNR on the full-precision trajectories, of a denoiser with one branch or two.

    Returns:
        float64 [T, P] in dB: of the network's output, mean over branches; and of what the sampler follows.
    """
    raw, guided = [], []
    for step in range(data.timesteps.numel()):
        raw_parts, guided_parts = [], []
        for prompt in torch.arange(data.num_prompts).split(settings.batch_size):
            target, output = predicted(pipeline, data, prompt, step)
            raw_parts.append(decibel(snr_db(target, output)).reshape(-1, len(prompt)).mean(0))
            if data.guided:
                target, output = (guide(tensor, settings.guidance_scale) for tensor in (target, output))
            guided_parts.append(decibel(snr_db(target, output)))
        raw.append(torch.cat(raw_parts))
        guided.append(torch.cat(guided_parts))
    return torch.stack(raw), torch.stack(guided)


def predicted(pipeline: Pipeline, data: CalibrationSet, prompt: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """What full precision answered at one step for the given prompts, and what the pipeline does; [2n, c, h, w]."""
    sample, timestep, conditioning, target = data.batch(prompt, torch.full_like(prompt, step))
    output = pipeline.engines["unet"](sample=sample, timestep=timestep[:1], **conditioning)["out_sample"]
    return target, output.cpu()


def run_denoiser(denoiser: nn.Module, data: CalibrationSet, prompt: Tensor, step: int) -> None:
    """Run the module of diffusers at one step, for whoever watches its layers."""
    sample, timestep, conditioning, _ = data.batch(prompt, torch.full_like(prompt, step))
    predict(denoiser, sample, timestep[:1], conditioning)


def decibel(values: Tensor) -> Tensor:
    """`values` with exact matches as the figure that they count in means."""
    return values.clamp(max=IDENTICAL_DB)


def measure(
    path: Path, known: Iterable[Reference], settings: Settings
) -> Iterator[tuple[dict[str, Any], Tensor]]:
    """One row: its figures and its images [P, 3, H, W], beside each of `known`."""
    with load_pipeline(path) as pipeline:
        for reference in known:
            yield measure_pipeline(pipeline, reference, settings)


def measure_pipeline(
    pipeline: Pipeline, known: Reference, settings: Settings
) -> tuple[dict[str, Any], Tensor]:
    """As :func:`measure`, of a pipeline that is open, beside one reference."""
    started = time.monotonic()
    raw, guided = teacher_forced(pipeline, known.data, settings)
    images = draw(pipeline, settings, known.seed)
    figures = {
        "raw_snr_db": summary(raw),
        "guided_snr_db": summary(guided),
        "psnr_db": summary(decibel(psnr_db(known.images, images))[None]),
        "ssim": summary(ssim(known.images, images)[None]),
        "seconds": round(time.monotonic() - started, 1),
    }
    return figures, images


def summary(values: Tensor) -> dict[str, Any]:
    """Means of [T, P] figures: over all, of each prompt, and of each step where there are several."""
    result: dict[str, Any] = {"mean": _rounded(values.mean()), "per_prompt": _rounded(values.mean(0))}
    return result if len(values) == 1 else {**result, "per_step": _rounded(values.mean(1))}


def _rounded(values: Tensor) -> Any:
    numbers = values.tolist()
    return [round(x, 4) for x in numbers] if isinstance(numbers, list) else round(numbers, 4)


@torch.no_grad()
def extremes(denoiser: nn.Module, data: CalibrationSet, batch_size: int) -> dict[str, Tensor]:
    """Smallest and largest value, [2], that enters each layer anywhere in the calibration set, no position left out."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            low, high = args[0].aminmax()
            before = found.get(name, torch.tensor([0.0, 0.0]))
            found[name] = torch.stack([torch.minimum(before[0], low), torch.maximum(before[1], high)])

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(name)) for name, layer in quantizable_layers(denoiser).items()
    ]
    try:
        for step in range(data.timesteps.numel()):
            for prompt in torch.arange(data.num_prompts).split(batch_size):
                run_denoiser(denoiser, data, prompt, step)
    finally:
        for handle in handles:
            handle.remove()
    return found


def minmax_checkpoint(settings: Settings, recipe: Recipe, output: Path, cache: Path) -> None:
    """Write the plainest quantization as a checkpoint: round to nearest, ranges that cover everything seen.

    Args:
        settings: Of the benchmark.
        recipe: Its bits, and how it calibrates.
        output: The checkpoint.
        cache: Where trajectories and ranges, which the recipes share, are kept.
    """
    config = FinetuneConfig(recipe=recipe, prompts=load_prompts(default="calibration"), seed=settings.seed)
    model = load_model(MODEL)
    data = record(
        MODEL,
        config.prompts[: recipe.calibration_prompts],
        steps=recipe.calibration_steps,
        guidance_scale=recipe.guidance_scale,
        seed=config.seed,
        batch_size=settings.batch_size,
        file=cache / "trajectories.safetensors",
    )
    file = cache / "extremes.safetensors"
    if not file.is_file():
        save(file, extremes(model.denoiser, data, settings.batch_size))
    # As inputs [G = 1, 2, c_in] that hold nothing but the two ends: one scale for all timesteps.
    layers = quantizable_layers(model.denoiser)
    inputs = {
        name: ends[None, :, None].expand(1, 2, layers[name].weight.shape[1])
        for name, ends in load_file(file).items()
    }
    bits = layer_bits(trace(model).roles, recipe)
    qparams = initialize(model.denoiser, inputs, bits, method="minmax", time_aware=False, channel_wise=False)
    student, context = copy.deepcopy(model.denoiser), TimestepContext(torch.empty(0))
    insert(student, qparams, context)
    freeze(student)
    source = hash_directory(model.path)
    with write_artifact(
        output, stage="checkpoint", config=to_dict(config), inputs={"source": source}, overwrite=True
    ) as writer:
        save_checkpoint(
            writer.path,
            model,
            student,
            recipe=recipe,
            activation_bits={name: activation for name, (_, activation) in bits.items()},
            context=context,
            history={},
        )

"""NVIDIA Model-Optimizer's post-training quantization of the same network, on the same calibration trajectories.

Its quantizers are simulated in torch by its own code, in the pipeline that every row is measured with.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.baselines.held import calibration_trajectories, prediction_loss
from benchmarks.rows import Bench, Row
from benchmarks.settings import MODEL
from benchmarks.trajectories import Reference, measure_pipeline, run_denoiser
from quest_deploy.config import Recipe
from quest_deploy.pipeline import Pipeline, load_pipeline
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.select import layer_bits
from quest_deploy.quantize.trace import trace_denoiser

ALGORITHMS = ("max", "smoothquant", "mse")


def modelopt_config(algorithm: str, bits: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """A configuration of Model-Optimizer.

    At 8 bits everywhere this is what it ships (which leaves a transformer's `proj_out` in float). With fewer bits,
    every layer is given its own: weights per output channel and activations per tensor, as in the other rows.

    Args:
        algorithm: One of `ALGORITHMS`.
        bits: Of weights and activations, by layer name.
    """
    import modelopt.torch.quantization as mtq

    shipped = mtq.INT8_SMOOTHQUANT_CFG if algorithm == "smoothquant" else mtq.INT8_DEFAULT_CFG
    config: dict[str, Any] = copy.deepcopy(shipped)
    if algorithm == "mse":
        config["algorithm"] = {"method": "mse"}
    if set(bits.values()) == {(8, 8)}:
        return config
    for name, (weight, activation) in bits.items():
        config["quant_cfg"] += [
            {"quantizer_name": f"{name}.weight_quantizer", "cfg": {"num_bits": weight, "axis": 0}},
            {"quantizer_name": f"{name}.input_quantizer", "cfg": {"num_bits": activation, "axis": None}},
        ]
    return config


def quantize(
    denoiser: nn.Module,
    data: CalibrationSet,
    bits: Mapping[str, tuple[int, int]],
    algorithm: str,
    batch_size: int,
) -> None:
    """Quantize `denoiser` in place, with all of `data` for calibration.

    Raises:
        SystemExit: Model-Optimizer left a layer that should have quantizers without.
    """
    import modelopt.torch.quantization as mtq

    config = modelopt_config(algorithm, bits)

    def calibrate(model: nn.Module) -> None:
        for step in range(data.timesteps.numel()):
            for prompt in torch.arange(data.num_prompts).split(batch_size):
                run_denoiser(model, data, prompt, step)

    with torch.no_grad():
        mtq.quantize(denoiser, config, calibrate)
    enabled = {name for name in bits if _enabled(denoiser.get_submodule(name))}
    shipped = set(bits.values()) == {(8, 8)}
    missing = sorted(bits.keys() - enabled)
    if missing and not (shipped and all(name.endswith("proj_out") for name in missing)):
        raise SystemExit(f"benchmarks: Model-Optimizer did not quantize {', '.join(missing[:3])}")


def _enabled(layer: nn.Module) -> bool:
    quantizers = (getattr(layer, f"{kind}_quantizer", None) for kind in ("weight", "input"))
    return all(quantizer is not None and quantizer.is_enabled for quantizer in quantizers)


def denoiser_of(pipeline: Pipeline) -> nn.Module:
    """The module of diffusers inside a pipeline that torch runs."""
    engine: Any = pipeline.engines["unet"]
    module: nn.Module = engine.module.get_submodule("unet")
    return module


def measure_modelopt(
    bench: Bench, known: Sequence[Reference], recipe: Recipe, algorithm: str, held: CalibrationSet
) -> Iterator[Row]:
    """Figures and images of one row beside each of `known`, and how long quantizing took."""
    settings = bench.settings
    data = calibration_trajectories(settings, recipe, 0, recipe.calibration_prompts)
    with load_pipeline(MODEL) as pipeline:
        denoiser = denoiser_of(pipeline)
        bits = layer_bits(trace_denoiser(denoiser, pipeline.engines["unet"].spec).roles, recipe)
        started = time.monotonic()
        quantize(denoiser, data, bits, algorithm, settings.batch_size)
        seconds = round(time.monotonic() - started, 1)
        loss = round(prediction_loss(pipeline, held, settings.batch_size), 8)
        for reference in known:
            figures, images = measure_pipeline(pipeline, reference, settings)
            yield {**figures, "validation_loss": loss, "made_in_seconds": seconds}, images

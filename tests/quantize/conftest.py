"""The tiny model, its recorded trajectories, and a quantized copy of its U-Net."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.model.load import LoadedModel, load_model
from quest_deploy.quantize import losses, resume, train
from quest_deploy.quantize.calibrate import CalibrationSet, collect_inputs, record_trajectories
from quest_deploy.quantize.initialize import initialize
from quest_deploy.quantize.insert import LayerQParams, insert
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.resume import WorkDirectory
from quest_deploy.quantize.trace import Trace, trace
from quest_deploy.quantize.walk import fit_steps

GUIDANCE = 3.0
PROMPTS = ("a red heart", "a blue car", "the moon", "a cat")


@pytest.fixture(scope="session")
def float_model(tiny_model: Path) -> LoadedModel:
    """The tiny model in memory; shared, so never changed."""
    return load_model(tiny_model)


@pytest.fixture(scope="session")
def traced(float_model: LoadedModel) -> Trace:
    """The part that each layer of the tiny U-Net plays."""
    return trace(float_model)


@pytest.fixture(scope="session")
def recorded(float_model: LoadedModel) -> CalibrationSet:
    """Trajectories of four prompts over three timesteps."""
    return record_trajectories(float_model, PROMPTS, steps=3, guidance_scale=3.0, seed=0, batch_size=2)


@pytest.fixture(scope="session")
def inputs(float_model: LoadedModel, recorded: CalibrationSet) -> dict[str, Tensor]:
    """What each layer of the tiny U-Net saw, [3, 8, c_in]."""
    return collect_inputs(float_model.denoiser, recorded, prompts_per_step=2, positions=8, seed=0)


@pytest.fixture(scope="session")
def qparams(
    float_model: LoadedModel, inputs: dict[str, Tensor]
) -> Callable[[int, int], dict[str, LayerQParams]]:
    """Starting scales at given weight and activation bits, those of the groups pulled apart."""

    def make(weight_bits: int, activation_bits: int) -> dict[str, LayerQParams]:
        bits = dict.fromkeys(inputs, (weight_bits, activation_bits))
        bits |= dict.fromkeys(("conv_in", "conv_out"), (8, 8))
        scales = initialize(float_model.denoiser, inputs, bits, method="minmax")
        apart = torch.tensor([0.9, 1.0, 1.2])
        return {
            name: dataclasses.replace(layer, group_scale=layer.group_scale * apart)
            for name, layer in scales.items()
        }

    return make


@pytest.fixture
def quantize_tiny(
    float_model: LoadedModel,
    recorded: CalibrationSet,
    qparams: Callable[[int, int], dict[str, LayerQParams]],
) -> Callable[[int, int], tuple[nn.Module, TimestepContext]]:
    """Makes a copy of the tiny U-Net with quantized layers, not frozen yet."""

    def make(weight_bits: int, activation_bits: int) -> tuple[nn.Module, TimestepContext]:
        unet, context = copy.deepcopy(float_model.denoiser), TimestepContext(recorded.boundaries())
        insert(unet, qparams(weight_bits, activation_bits), context)
        return unet.requires_grad_(False), context

    return make


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WorkDirectory:
    """Where every step is saved."""
    monkeypatch.setattr(resume, "SAVE_EVERY_SECONDS", 0.0)
    directory = WorkDirectory(tmp_path / "out")
    directory.open({}, resume=False, overwrite=False)
    return directory


@pytest.fixture
def task(
    float_model: LoadedModel,
    traced: Trace,
    recorded: CalibrationSet,
    quantize_tiny: Callable[[int, int], tuple[nn.Module, TimestepContext]],
) -> train.Task:
    """The tiny model at W4A4, two prompts to train on and two that judge."""
    student, context = quantize_tiny(4, 4)
    validation = torch.tensor([2, 3])
    steps = fit_steps(recorded, GUIDANCE)
    assert steps is not None
    objective = losses.make_objective(
        student, recorded, validation, steps, walk_length=2, walk_share=1.0, guidance_scale=GUIDANCE
    )
    return train.Task(
        student=student,
        teacher=float_model.denoiser,
        trace=traced,
        data=recorded,
        training=torch.tensor([0, 1]),
        validation=validation,
        objective=objective,
        context=context,
        seed=0,
        last_time=999.0,
    )

"""Calibration on every kind of prediction and schedule: groups for fractional timesteps, one error where none are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from quest_deploy import sampling
from quest_deploy.errors import CalibrationError, ConfigError
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.calibrate import CalibrationSet, record_trajectories
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.walk import fit_steps

ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "clip_sample": False}


def as_saved(scheduler: Any) -> Any:
    """`scheduler` as it comes back from a file: with its class in its configuration."""
    kind = type(scheduler)
    return kind.from_config({**scheduler.config, "_class_name": kind.__name__})


def record(model: LoadedModel, scheduler: Any) -> CalibrationSet:
    model = dataclasses.replace(model, scheduler=as_saved(scheduler))
    return record_trajectories(model, ["", ""], steps=3, guidance_scale=3.0, seed=0, batch_size=2)


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(timestep_spacing="linspace"),
        DDIMScheduler(prediction_type="sample", clip_sample=False),
        DDIMScheduler(prediction_type="v_prediction", **ZERO_SNR),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=["epsilon, fractional timesteps", "x0", "v, zero SNR", "flow"],
)
def test_every_step_has_a_group_and_walks_can_follow(
    scheduler: Any, loaded: Callable[[str], LoadedModel]
) -> None:
    data = record(loaded("ldm"), scheduler)
    assert data.timesteps.tolist() == sampling.timesteps(scheduler, 3).tolist()
    context = TimestepContext(data.boundaries())
    context.set_timestep(data.timesteps)
    assert context.group.tolist() == [2, 1, 0]
    assert fit_steps(data, 3.0) is not None


def test_a_noise_prediction_of_pure_noise_is_refused(loaded: Callable[[str], LoadedModel]) -> None:
    with pytest.raises(
        CalibrationError, match="NaN or infinity.*a zero-SNR schedule has no epsilon prediction"
    ):
        record(loaded("ldm"), DDIMScheduler(prediction_type="epsilon", **ZERO_SNR))


def test_an_unconditional_trajectory_has_one_branch(loaded: Callable[[str], LoadedModel]) -> None:
    data = record(loaded("ldm"), DDIMScheduler())
    assert data.targets.shape[:3] == (2, 3, 1) and not data.guided
    assert (data.positive, data.negative) == ({}, {})


def test_a_flow_cannot_be_followed_by_a_scheduler_of_noise() -> None:
    with pytest.raises(ConfigError, match="'DDIMScheduler' is for noise predictions"):
        sampling.make_scheduler("ddim", as_saved(FlowMatchEulerDiscreteScheduler()).config)

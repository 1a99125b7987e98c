"""Calibration on every kind of prediction and schedule: groups for fractional timesteps, one error where none are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
)

from quest_deploy import sampling
from quest_deploy.errors import CalibrationError, ConfigError
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.calibrate import CalibrationSet, record_trajectories
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.schedule import recording_config
from quest_deploy.quantize.walk import fit_steps

NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
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


# As Stable Diffusion 1.x is published.
PUBLISHED = PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)


@pytest.mark.parametrize(
    ("second_order", "first_order"),
    [
        (PUBLISHED, DDIMScheduler(**NOISE, clip_sample=False, set_alpha_to_one=False, steps_offset=1)),
        # Values that were left out are the class's own: here the spacing, and where the betas begin and end.
        (
            HeunDiscreteScheduler(prediction_type="v_prediction"),
            DDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                clip_sample=False,
                timestep_spacing="linspace",
                prediction_type="v_prediction",
            ),
        ),
        (FlowMatchHeunDiscreteScheduler(shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)),
    ],
    ids=["PNDM", "Heun", "flow Heun"],
)
def test_what_visits_a_timestep_twice_is_recorded_with_a_first_order_scheduler_of_the_same_noise(
    second_order: Any,
    first_order: Any,
    loaded: Callable[[str], LoadedModel],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", logger="quest_deploy"):
        data = record(loaded("ldm"), second_order)
    names = type(second_order).__name__, type(first_order).__name__
    assert [entry.message for entry in caplog.records] == [
        f"{names[0]} visits a timestep twice: trajectories are recorded with {names[1]} of the same noise schedule"
    ]
    expected = record(loaded("ldm"), first_order)
    assert torch.equal(data.timesteps, expected.timesteps)
    assert torch.equal(data.latents, expected.latents)


def test_a_first_order_scheduler_stays_and_nothing_is_said(
    loaded: Callable[[str], LoadedModel], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="quest_deploy"):
        record(loaded("ldm"), EulerDiscreteScheduler())
    assert not caplog.records


def test_a_prediction_that_ddim_does_not_take_is_refused_with_what_to_change(
    loaded: Callable[[str], LoadedModel],
) -> None:
    # So few noise levels that their rounded timesteps repeat.
    settings = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "num_train_timesteps": 4}
    model = dataclasses.replace(
        loaded("ldm"), scheduler=as_saved(DPMSolverMultistepScheduler(flow_shift=20.0, **settings))
    )
    with pytest.raises(
        CalibrationError,
        match="twice in 4 steps.*does not take a flow_prediction; choose fewer calibration_steps",
    ):
        recording_config(model, 4)

"""Weights of errors: what an error of one step's output does to the image, against the scheduler itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from quest_deploy import sampling
from quest_deploy.errors import CalibrationError
from quest_deploy.quantize.schedule import image_steps

STEPS = 8
PLAIN = {"clip_sample": False, "beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}


def response(scheduler: Any, step: int) -> float:
    """By how much an error of 1 in the output of one step changes the image, found by making that error.

    The denoiser finds no noise in whatever it is given, so that nothing answers to the error.
    """
    kind = scheduler.config.get("prediction_type", "flow")

    def denoiser(sample: Tensor, timestep: Tensor, conditioning: Any) -> Tensor:
        wrong = float(float(timestep) == float(scheduler.timesteps[step]))
        if kind in ("epsilon", "flow") or not sample.any():
            return torch.full_like(sample, wrong)
        sigmas = ((1 - scheduler.alphas_cumprod) / scheduler.alphas_cumprod).sqrt().double().numpy()
        sigma = np.interp(float(timestep), np.arange(len(sigmas)), sigmas)
        alpha = 1 / np.sqrt(1 + sigma**2)
        return wrong + (sample / alpha if kind == "sample" else -sigma * sample)

    noise = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    image = sampling.denoise(denoiser, scheduler, noise, {}, None, steps=STEPS, guidance_scale=1.0)
    return abs(float(image))


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(prediction_type="epsilon", **PLAIN),
        DDIMScheduler(prediction_type="v_prediction", **PLAIN),
        DDIMScheduler(prediction_type="sample", **PLAIN),
        DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True, **PLAIN),
        DDIMScheduler(prediction_type="sample", rescale_betas_zero_snr=True, **PLAIN),
        EulerDiscreteScheduler(prediction_type="v_prediction", timestep_spacing="linspace"),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
    ids=["epsilon", "v", "x0", "v, zero SNR", "x0, zero SNR", "v, fractional timesteps", "flow"],
)
def test_weights_are_what_the_scheduler_does_with_an_error(scheduler: Any) -> None:
    visited = sampling.timesteps(scheduler, STEPS).to(torch.float32)
    expected = torch.tensor([response(scheduler, step) for step in range(STEPS)])
    got = image_steps(visited, scheduler)
    assert torch.isfinite(got).all()
    # Up to one factor, which normalizing the loss removes; schedules are float32.
    torch.testing.assert_close(got / got.sum(), expected / expected.sum(), rtol=2e-3, atol=1e-5)


def test_steps_in_sigma_add_up_to_the_noise_at_the_first_timestep() -> None:
    scheduler = DDIMScheduler(**PLAIN)
    alphas = scheduler.alphas_cumprod
    steps = image_steps(torch.tensor([980.0, 500.0, 20.0]), scheduler)
    assert (steps > 0).all()
    torch.testing.assert_close(steps.sum(), ((1 - alphas[980]) / alphas[980]).sqrt())


def test_a_fraction_lies_between_its_neighbours() -> None:
    scheduler = DDIMScheduler(**PLAIN)
    low, middle, high = (image_steps(torch.tensor([t]), scheduler) for t in (500.0, 500.5, 501.0))
    assert low < middle < high


def test_a_noise_prediction_of_pure_noise_is_refused() -> None:
    scheduler = DDIMScheduler(prediction_type="epsilon", rescale_betas_zero_snr=True, **PLAIN)
    with pytest.raises(CalibrationError, match="ends in pure noise .* needs v-prediction"):
        image_steps(torch.tensor([999.0, 500.0]), scheduler)


def test_a_scheduler_without_a_known_schedule_is_refused() -> None:
    with pytest.raises(CalibrationError, match="EDMEulerScheduler with 'epsilon' predictions: expected"):
        image_steps(torch.tensor([1.0]), EDMEulerScheduler())

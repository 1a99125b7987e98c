"""What an error of the denoiser's output at each step of a schedule does to the final image.

With x_t = alpha_t x_0 + s_t e, s_t = sqrt(1 - alpha_t^2) and sigma_t = s_t / alpha_t, a deterministic first-order
sampler moves x / alpha by the noise prediction times the step in sigma. To first order (the noise that later steps find
stays the same), an error d of the output ends up in the image as w_t d, up to a sign that all steps share:

=============  ==========================  ===================================
prediction     noise error it stands for   w_t, with sigma' of the next step
=============  ==========================  ===================================
epsilon        d                           sigma_t - sigma'
v              alpha_t d                   s_t - alpha_t sigma'
x_0            d / sigma_t                 1 - sigma' / sigma_t
flow           velocity itself             sigma_t - sigma' of the flow
=============  ==========================  ===================================

The forms for v and x_0 stay finite where a schedule ends in pure noise (zero terminal signal-to-noise ratio).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quest_deploy.errors import CalibrationError
from quest_deploy.sampling import is_flow

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def image_steps(timesteps: Tensor, scheduler: Any) -> Tensor:
    """float32 [T]: w_t of the module's table for each step.

    Args:
        timesteps: [T], descending, as the scheduler visited them; may be fractions.
        scheduler: The model's own.

    Raises:
        CalibrationError: the scheduler's predictions have no such weight.
    """
    name = type(scheduler).__name__
    if is_flow(name):
        sigma = timesteps / scheduler.config.num_train_timesteps
        return sigma - _next(sigma)
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    if kind not in PREDICTIONS or not hasattr(scheduler, "alphas_cumprod"):
        raise CalibrationError(
            f"{name} with {kind!r} predictions: expected a scheduler with a noise schedule (alphas_cumprod) and one of "
            f"{', '.join(PREDICTIONS)}, or a flow-matching one; set such a scheduler in scheduler_config.json"
        )
    signal = _at(scheduler.alphas_cumprod, timesteps)
    if kind == "epsilon" and not bool((signal > 0).all()):
        raise CalibrationError(
            f"{name} ends in pure noise (zero terminal SNR), where a noise prediction says nothing about the image; "
            "such a model needs v-prediction: check prediction_type and rescale_betas_zero_snr in scheduler_config.json"
        )
    sigma = ((1 - signal) / signal).sqrt().to(torch.float32)
    following = _next(sigma)
    if kind == "epsilon":
        return sigma - following
    if kind == "sample":
        return 1 - following / sigma
    return (1 - signal).sqrt().to(torch.float32) - signal.sqrt().to(torch.float32) * following


def _next(sigma: Tensor) -> Tensor:
    return torch.cat([sigma[1:], torch.zeros(1)])


def _at(alphas_cumprod: Tensor, timesteps: Tensor) -> Tensor:
    """alpha^2 at each timestep; between two of the schedule, sigma lies on the straight line, as samplers have it."""
    low = timesteps.floor().long().clamp(0, alphas_cumprod.numel() - 1)
    high = timesteps.ceil().long().clamp(0, alphas_cumprod.numel() - 1)
    share = (timesteps - low).clamp(0, 1)
    sigma = ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    between = sigma[low] + (sigma[high] - sigma[low]) * share
    return torch.where(low == high, alphas_cumprod[low], 1 / (1 + between.square()))

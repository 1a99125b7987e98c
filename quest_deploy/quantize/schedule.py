"""Which scheduler trajectories are recorded with: groups need one that visits every timestep once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from quest_deploy import sampling
from quest_deploy.errors import CalibrationError
from quest_deploy.model.load import LoadedModel

logger = logging.getLogger(__name__)

# What DDIM takes; a flow that a scheduler of noise follows is none of them.
PREDICTIONS = ("epsilon", "sample", "v_prediction")


def flow_of(model: LoadedModel) -> sampling.Flow:
    """How a flow's noise levels are made for the model."""
    family = model.family
    return sampling.Flow(patch=model.patch, even_sigmas=family.even_sigmas, max_shift=family.max_shift)


def recording_config(
    model: LoadedModel,
    steps: int,
    *,
    latent_shape: tuple[int, int, int] | None = None,
    tell: bool = False,
) -> Mapping[str, Any]:
    """The configuration of the scheduler that trajectories are recorded with, as `sampling.make_scheduler` takes it.

    It is the model's own; where that visits a timestep twice (PNDM of Stable Diffusion 1.x, Heun), DDIM with the same
    noise schedule and kind of prediction, or Euler for a flow.

    Args:
        model: Whose.
        steps: Denoising steps.
        latent_shape: Channels, height and width of the latents; None for those of the model's own size.
        tell: Whether to log that it is another one than the model's.

    Raises:
        CalibrationError: the model's own visits a timestep twice, and neither of the others takes such predictions.
        ConfigError: the scheduler cannot make so many steps.
    """
    own = sampling.make_scheduler(None, model.scheduler.config)
    size = (latent_shape or model.latent_shape)[-2:]
    visited = sampling.timesteps(own, steps, flow=flow_of(model), size=size)
    if (visited.diff() < 0).all():
        return model.scheduler.config
    name, flow = type(own).__name__, sampling.is_flow(type(own).__name__)
    prediction = own.config.get("prediction_type", "epsilon")
    if not flow and prediction not in PREDICTIONS:
        raise CalibrationError(
            f"{name} visits a timestep twice in {steps} steps, so timestep groups are not defined, and DDIM does not "
            f"take a {prediction}; choose fewer calibration_steps in the recipe"
        )
    # Of a value that its file left out, diffusers would take the other class's default.
    config = {key: value for key, value in own.config.items() if key != "_use_default_values"}
    if not flow:
        # The only one of those classes that clips unless it is told not to is DDIM.
        config.setdefault("clip_sample", False)
    other = sampling.make_scheduler("flow-euler" if flow else "ddim", config)
    if tell:
        logger.info(
            "%s visits a timestep twice: trajectories are recorded with %s of the same noise schedule",
            name,
            type(other).__name__,
        )
    return other.config

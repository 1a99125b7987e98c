"""Noise, guidance, and the one denoising loop that calibration, generation and parity share.

Plain functions on tensors; nothing here knows whether the denoiser is torch, ONNX Runtime or TensorRT. On the torch
backend the latents equal those of the ``__call__`` of diffusers' pipelines bit for bit, which fixes the order of every
operation below.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from quest_deploy.errors import ConfigError
from quest_deploy.model.components import Conditioning, join_conditioning
from quest_deploy.model.libraries import class_of

Denoise = Callable[[Tensor, Tensor, Conditioning], Tensor]
"""(sample [b, c, h, w], timestep [1], conditioning [b, ...] by input name) -> prediction [b, c, h, w]."""

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "dpm++-single": "DPMSolverSinglestepScheduler",
    "deis": "DEISMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}
"""Short names; the diffusers class names are accepted as well."""

# What `set_timesteps` would switch on by itself, with a warning each time.
DEFAULTS = {"DPMSolverSinglestepScheduler": {"lower_order_final": True}}
# They would say so at their first step.
_NOT_FOR_SAMPLES = ("PNDMScheduler", "EulerAncestralDiscreteScheduler")
_SAID_OF_FLOWS = ("prediction_type", "use_flow_sigmas", "flow_shift")


@dataclass(frozen=True)
class Step:
    """One step of the loop, as callbacks see it.

    Attributes:
        index: Position in the schedule, from 0.
        timestep: 0-d tensor.
        latents: What the denoiser was given before guidance doubled it, [n, c, h, w].
        noise_pred: The guided prediction, [n, c, h, w].
    """

    index: int
    timestep: Tensor
    latents: Tensor
    noise_pred: Tensor


def make_scheduler(name: str | None, config: Any, *, own: str | None = None) -> Any:
    """A fresh diffusers scheduler with the model's noise schedule.

    Args:
        name: A short name, a diffusers class name, or None for the model's own scheduler.
        config: The scheduler configuration of the model.
        own: The class of the model's own scheduler, where its configuration may name another.

    Raises:
        ConfigError: the name is unknown, or that scheduler does not take what the model predicts, or its settings.
        NotImplementedError: the model's own scheduler does not take its settings.
        TypeError: the same.
        ValueError: the same.
    """
    own = str(own or config.get("_class_name"))
    class_name = own if name is None else SCHEDULERS.get(name.lower(), name)
    kind = class_of("diffusers", str(class_name))
    if class_name not in {*SCHEDULERS.values(), own} or kind is None:
        known = ", ".join(SCHEDULERS)
        raise ConfigError(
            f"scheduler {class_name!r} is unknown; choose one of {known} or the diffusers class name of one"
        )
    flow = predicts_flow(config, own)
    # A flow-matching scheduler's configuration lacks what other schedulers go by.
    fits = is_flow(str(class_name)) or (flow and not is_flow(own) and takes_flow(kind))
    if fits != flow and class_name != own:
        raise ConfigError(
            f"scheduler {class_name!r} is for {'noise' if flow else 'flow'} predictions, and the model's own, a {own}, "
            f"for those of {'a flow' if flow else 'noise'}; leave the scheduler out"
        )
    if config.get("prediction_type") == "sample" and class_name in _NOT_FOR_SAMPLES:
        raise ConfigError(
            f"scheduler {class_name!r} does not take predictions of the sample itself, which this model makes; "
            "take another"
        )
    settings = {**DEFAULTS.get(str(class_name), {}), **config}
    if is_flow(str(class_name)) and not is_flow(own):
        # They take nothing else, and have another name for the shift.
        settings = {name: value for name, value in settings.items() if name not in _SAID_OF_FLOWS}
        settings["shift"] = config.get("flow_shift", 1.0)
    try:
        return kind.from_config(settings)
    except (NotImplementedError, ValueError, TypeError) as error:
        if class_name == own:
            raise
        raise ConfigError(
            f"scheduler {class_name!r} does not fit the model's own configuration ({str(error).strip()}); take another"
        ) from error


def predicts_flow(config: Any, own: str) -> bool:
    """Whether a model predicts the velocity of a flow from noise to data.

    Args:
        config: The configuration of its scheduler.
        own: The class of that.
    """
    said = config.get("prediction_type") == "flow_prediction" or config.get("use_flow_sigmas")
    return is_flow(own) or bool(said)


def takes_flow(kind: type) -> bool:
    """Whether a scheduler class of diffusers can be told that predictions are those of a flow."""
    return "use_flow_sigmas" in inspect.signature(kind).parameters


def is_flow(class_name: str) -> bool:
    """Whether a scheduler class of diffusers takes the velocity of a flow, and nothing else."""
    return class_name.startswith("FlowMatch")


@dataclass(frozen=True, kw_only=True)
class Flow:
    """How a flow's noise levels follow from the number of steps and the size of the image.

    Attributes:
        patch: Latents along one side of an image token.
        even_sigmas: Whether they are spread evenly from 1 to 1 / steps, and only then shifted.
        max_shift: How far the most image tokens shift them, where the scheduler does not say.
    """

    patch: int = 1
    even_sigmas: bool = False
    max_shift: float = 1.15

    def options(self, scheduler: Any, steps: int, size: Sequence[int]) -> dict[str, Any]:
        """What `set_timesteps` is given besides the number of steps, for which `sigmas` stand.

        `size` is the latents' height and width.
        """
        settings = scheduler.config
        options: dict[str, Any] = {}
        if self.even_sigmas and not settings.get("use_flow_sigmas"):
            options = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
        if settings.get("use_dynamic_shifting"):
            tokens = (size[-2] // self.patch) * (size[-1] // self.patch)
            options["mu"] = image_shift(settings, tokens, self.max_shift)
        return options


PLAIN = Flow()


def image_shift(settings: Any, tokens: int, max_shift: float) -> float:
    """mu, linear in the number of image tokens: larger images need more noise (arXiv 2403.03206, section 5.3.2)."""
    # Solvers that follow flows have no such settings: these are of diffusers' pipelines.
    few, many = settings.get("base_image_seq_len", 256), settings.get("max_image_seq_len", 4096)
    least, most = settings.get("base_shift", 0.5), settings.get("max_shift", max_shift)
    slope = (most - least) / (many - few)
    return float(tokens * slope + (least - slope * few))


def timesteps(
    scheduler: Any,
    steps: int,
    device: torch.device | None = None,
    *,
    flow: Flow = PLAIN,
    size: Sequence[int] = (1, 1),
) -> Tensor:
    """Set a scheduler's timesteps and return them; some schedulers visit more than `steps`.

    Args:
        scheduler: A scheduler of diffusers.
        steps: Number of denoising steps.
        device: Where its tensors are put.
        flow: How a flow's noise levels are made.
        size: The latents' height and width, which some flows' noise levels depend on.

    Raises:
        ConfigError: the scheduler cannot do that many, or leaves the timesteps that the model was trained on.
    """
    try:
        options = flow.options(scheduler, steps, size)
        count = () if "sigmas" in options else (steps,)
        scheduler.set_timesteps(*count, device=device, **options)
    except (ValueError, IndexError) as error:
        raise ConfigError(
            f"{type(scheduler).__name__} cannot make a schedule of {steps} steps ({str(error).strip()}); "
            "change the number of steps, or take another scheduler"
        ) from error
    visited = torch.as_tensor(scheduler.timesteps)
    trained = scheduler.config.get("num_train_timesteps")
    # A flow begins at its last timestep, where there is nothing but noise.
    flows = is_flow(type(scheduler).__name__) or scheduler.config.get("use_flow_sigmas")
    if trained and not flows and visited.max() >= trained:
        raise ConfigError(
            f"{type(scheduler).__name__} visits timestep {visited.max().item():g} in {steps} steps, expected less than "
            f"the {trained} that the model was trained on; take fewer steps"
        )
    return visited


def initial_noise(seeds: Sequence[int], shape: tuple[int, int, int]) -> Tensor:
    """Unit Gaussian noise, one CPU generator a seed, so that a seed means the same noise at any batch size.

    Args:
        seeds: One for each image.
        shape: Channels, height and width of the latents.

    Returns:
        float32 [n, c, h, w].
    """
    return draw_noise(generators_of(seeds), shape)


def generators_of(seeds: Sequence[int]) -> list[torch.Generator]:
    """One CPU generator a seed."""
    return [torch.Generator("cpu").manual_seed(seed) for seed in seeds]


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """Unit Gaussian noise, float32 [n, c, h, w] on the CPU, whatever the process's defaults are.

    The generators move on, and schedulers that draw noise at every step go on with them, as in diffusers.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    return torch.cat([torch.randn((1, *shape), generator=one, **options) for one in generators])


def guide(noise_pred: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: [2n, c, h, w] (negative prompts first) -> [n, c, h, w]; up to 1 it is none."""
    negative, positive = noise_pred.chunk(2)
    return negative + max(guidance_scale, 1.0) * (positive - negative)


def predict_noise(
    denoise_fn: Denoise,
    latents: Tensor,
    timestep: Tensor,
    positive: Conditioning,
    negative: Conditioning | None,
    guidance_scale: float,
) -> Tensor:
    """The guided noise prediction of `latents` [n, c, h, w], which are already scaled for the timestep.

    Guidance up to 1 needs no second branch, as in diffusers; a model that has no negative branch is never guided.
    """
    timestep = timestep.reshape(1)
    if negative is None or guidance_scale <= 1:
        return denoise_fn(latents, timestep, positive)
    both = denoise_fn(torch.cat([latents] * 2), timestep, join_conditioning([negative, positive]))
    return guide(both, guidance_scale)


def denoise(
    denoise_fn: Denoise,
    scheduler: Any,
    noise: Tensor,
    positive: Conditioning,
    negative: Conditioning | None,
    *,
    steps: int,
    guidance_scale: float,
    flow: Flow = PLAIN,
    generators: Sequence[torch.Generator] | None = None,
    callback: Callable[[Step], None] | None = None,
) -> Tensor:
    """Run the whole loop.

    Args:
        denoise_fn: The denoiser, with inputs and output on the device of `noise`.
        scheduler: A diffusers scheduler of its own for this call (it is stateful).
        noise: Unit Gaussian noise, [n, c, h, w].
        positive: What the denoiser is told, [n, ...] by input name.
        negative: What it is told for the negative branch; None where the model has none.
        steps: Number of denoising steps.
        guidance_scale: Up to 1 means no guidance.
        flow: How a flow's noise levels are made.
        generators: One for each image, for schedulers that draw noise at every step.
        callback: Called once each step.

    Returns:
        Latents, [n, c, h, w].
    """
    schedule = timesteps(scheduler, steps, noise.device, flow=flow, size=noise.shape[-2:])
    extra: dict[str, Any] = {}
    options = inspect.signature(scheduler.step).parameters
    if generators is not None and "generator" in options:
        extra["generator"] = list(generators)
    if "eta" in options:
        # The pipelines' own, also for schedulers whose default is another: TCD's.
        extra["eta"] = 0.0
    # Flow-matching schedulers have neither: they start from unit noise and scale nothing.
    scale = getattr(scheduler, "scale_model_input", lambda sample, timestep: sample)
    latents = noise * getattr(scheduler, "init_noise_sigma", 1.0)
    for index, timestep in enumerate(schedule):
        scaled = scale(latents, timestep)
        noise_pred = predict_noise(denoise_fn, scaled, timestep, positive, negative, guidance_scale)
        latents = scheduler.step(noise_pred, timestep, latents, **extra, return_dict=False)[0]
        if callback is not None:
            callback(Step(index, timestep, scaled, noise_pred))
    return latents

"""The denoising loop: equal to diffusers' for every scheduler, the same noise per seed, guidance only above 1."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quest_deploy import sampling
from quest_deploy.errors import ConfigError
from quest_deploy.model.components import Conditioning
from quest_deploy.pipeline import Pipeline, load_pipeline

PROMPTS = ["red heart", "snowman"]
NEGATIVE = ["blue", "blue"]
SEEDS = [7, 11]
SHAPE = (4, 8, 8)
PIXELS = 32
# PNDM's warm-up needs four timesteps.
STEPS = 4


@pytest.fixture(scope="module")
def ours(reference_model: Path) -> Iterator[Pipeline]:
    with load_pipeline(reference_model) as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def theirs(reference_model: Path) -> Any:
    """diffusers' own pipeline, untouched."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(
        str(reference_model), torch_dtype=torch.float32, safety_checker=None
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw_ours(pipeline: Pipeline, scheduler: str, guidance_scale: float) -> Tensor:
    generators = sampling.generators_of(SEEDS)
    return pipeline.denoise(
        sampling.draw_noise(generators, SHAPE),
        pipeline.encode(PROMPTS),
        pipeline.encode(NEGATIVE),
        steps=STEPS,
        guidance_scale=guidance_scale,
        scheduler=scheduler,
        generators=generators,
    )


def draw_theirs(pipeline: Any, scheduler: str, guidance_scale: float) -> Tensor:
    import diffusers

    kind = getattr(diffusers, sampling.SCHEDULERS[scheduler])
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config)
    return pipeline(
        PROMPTS,
        negative_prompt=NEGATIVE,
        height=PIXELS,
        width=PIXELS,
        num_inference_steps=STEPS,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="latent",
    ).images


NOISY = [name for name, kind in sampling.SCHEDULERS.items() if not sampling.is_flow(kind)]


@pytest.mark.parametrize("scheduler", NOISY)
def test_latents_equal_those_of_diffusers(ours: Pipeline, theirs: Any, scheduler: str) -> None:
    assert torch.equal(draw_ours(ours, scheduler, 3.0), draw_theirs(theirs, scheduler, 3.0))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "euler", "euler-ancestral", "dpm++", "unipc"])
def test_latents_equal_those_of_diffusers_without_guidance(
    ours: Pipeline, theirs: Any, scheduler: str
) -> None:
    assert torch.equal(draw_ours(ours, scheduler, 1.0), draw_theirs(theirs, scheduler, 1.0))


@pytest.mark.parametrize("batch", [1, 2])
def test_a_seed_means_the_same_noise_at_any_batch_size(batch: int) -> None:
    together = sampling.initial_noise(range(5), SHAPE)
    apart = [
        sampling.initial_noise(range(start, min(5, start + batch)), SHAPE) for start in range(0, 5, batch)
    ]
    assert torch.equal(together, torch.cat(apart))


def test_seeds_mean_different_noise() -> None:
    first, second = sampling.initial_noise([0, 1], SHAPE)
    assert not torch.equal(first, second)


class Schedule:
    """A scheduler that adds the prediction and some noise."""

    init_noise_sigma = 2.0
    config: dict[str, Any] = {}

    def set_timesteps(self, steps: int, device: object = None) -> None:
        self.timesteps = torch.arange(steps, 0, -1)

    def scale_model_input(self, latents: Tensor, timestep: Tensor) -> Tensor:
        return latents / timestep

    def step(
        self,
        noise_pred: Tensor,
        timestep: Tensor,
        latents: Tensor,
        generator: list[torch.Generator],
        return_dict: bool = True,
    ) -> tuple[Tensor]:
        noise = sampling.draw_noise(generator, (1, 1, 1))
        return (latents + noise_pred + noise,)


def linear(sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
    """Depends on each input."""
    text = conditioning["text"].mean((1, 2))
    return sample * 0.5 + timestep.reshape(-1, 1, 1, 1) + text.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0])
def test_guidance_up_to_one_never_runs_the_negative_branch(guidance_scale: float) -> None:
    batches = []

    def denoiser(sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        batches.append(len(sample))
        return linear(sample, timestep, conditioning)

    latents = torch.ones(2, 1, 1, 1)
    positive, negative = {"text": torch.ones(2, 1, 1)}, {"text": torch.full((2, 1, 1), torch.nan)}
    guided = sampling.predict_noise(denoiser, latents, torch.tensor(3), positive, negative, guidance_scale)
    assert batches == [2]
    assert torch.equal(guided, torch.full((2, 1, 1, 1), 0.5 + 3 + 1))


def test_guidance_extrapolates_from_the_negative_to_the_positive_prompt() -> None:
    latents = torch.zeros(1, 1, 1, 1)
    positive, negative = {"text": torch.full((1, 1, 1), 5.0)}, {"text": torch.full((1, 1, 1), 2.0)}
    guided = sampling.predict_noise(linear, latents, torch.tensor(0), positive, negative, 4.0)
    assert guided.item() == 2 + 4 * (5 - 2)


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 1.0])
def test_answers_of_both_branches_are_joined_as_the_sampler_does_up_to_one(guidance_scale: float) -> None:
    negative, positive = torch.full((1, 1, 1, 1), 2.0), torch.full((1, 1, 1, 1), 5.0)
    assert sampling.guide(torch.cat([negative, positive]), guidance_scale).item() == 5


def test_the_callback_sees_what_the_denoiser_was_given_and_answered() -> None:
    steps: list[sampling.Step] = []
    noise, text = torch.ones(1, 1, 1, 1), {"text": torch.zeros(1, 1, 1)}
    sampling.denoise(
        linear,
        Schedule(),
        noise,
        text,
        text,
        steps=2,
        guidance_scale=1.0,
        generators=sampling.generators_of([0]),
        callback=steps.append,
    )
    assert [(step.index, step.timestep.item()) for step in steps] == [(0, 2), (1, 1)]
    assert steps[0].latents.item() == 2.0 / 2
    assert steps[0].noise_pred.item() == 1 * 0.5 + 2


def test_each_image_draws_its_steps_noise_from_its_own_generator() -> None:
    def run(seeds: list[int]) -> Tensor:
        count = len(seeds)
        generators = sampling.generators_of(seeds)
        return sampling.denoise(
            linear, Schedule(), torch.ones(count, 1, 1, 1), {"text": torch.zeros(count, 1, 1)}, None,
            steps=2, guidance_scale=1.0, generators=generators,
        )  # fmt: skip

    assert torch.equal(run([1, 2])[1], run([2])[0])


def test_an_unknown_scheduler_is_refused_with_the_known_ones(ours: Pipeline) -> None:
    with pytest.raises(ConfigError, match=r"'eulr' is unknown; choose one of ddim, .*unipc"):
        ours.make_scheduler("eulr")


def test_a_configuration_that_names_no_scheduler_of_diffusers_is_refused() -> None:
    with pytest.raises(ConfigError, match="'torch' is unknown"):
        sampling.make_scheduler(None, {"_class_name": "torch"})


def test_a_class_name_of_diffusers_is_a_scheduler_name(ours: Pipeline) -> None:
    assert type(ours.make_scheduler("EulerDiscreteScheduler")) is type(ours.make_scheduler("euler"))


def test_a_scheduler_keeps_the_noise_schedule_of_the_model(ours: Pipeline) -> None:
    config = ours.make_scheduler("unipc").config
    assert (config["beta_start"], config["beta_schedule"]) == (0.00085, "scaled_linear")


def test_too_few_steps_for_a_scheduler_are_refused(ours: Pipeline) -> None:
    with pytest.raises(ConfigError, match="PNDMScheduler cannot make a schedule of 2 steps"):
        sampling.timesteps(ours.make_scheduler("pndm"), 2)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_steps_that_leave_the_trained_timesteps_are_refused(ours: Pipeline, scheduler: str) -> None:
    """The model's timesteps are moved up by one, so that 1000 steps would begin at timestep 1000 of 0..999."""
    with pytest.raises(ConfigError, match="visits timestep 1000 in 1000 steps, .* take fewer steps"):
        sampling.timesteps(ours.make_scheduler(scheduler), 1000)
    assert sampling.timesteps(ours.make_scheduler(scheduler), 999).max() == 999


def test_a_flow_begins_at_its_last_timestep() -> None:
    flow = sampling.make_scheduler(None, {"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert sampling.timesteps(flow, 4).max() == 1000


SOLVER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "prediction_type": "flow_prediction",
    "use_flow_sigmas": True,
    "flow_shift": 3.0,
}


def follow(scheduler: Any, steps: int) -> Tensor:
    """Latents that start at one, where the velocity is theirs times 0.3."""
    noise, told = torch.ones(1, 1, 1, 1), {"text": torch.zeros(1, 1, 1)}

    def velocity(sample: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        return 0.3 * sample

    return sampling.denoise(velocity, scheduler, noise, told, None, steps=steps, guidance_scale=1.0)


@pytest.mark.parametrize("name", ["dpm++", "dpm++-single", "deis", "unipc", "flow-euler"])
def test_a_flow_that_a_solver_follows_is_followed_by_whatever_takes_flows(name: str) -> None:
    scheduler = sampling.make_scheduler(name, SOLVER)
    assert scheduler.config.get("flow_shift", scheduler.config.get("shift")) == 3.0
    # All go to the solution of the same equation.
    torch.testing.assert_close(follow(scheduler, 100), torch.full((1, 1, 1, 1), 0.7408), rtol=0, atol=1e-2)


@pytest.mark.parametrize(
    "name", ["ddim", "ddpm", "pndm", "lms", "euler", "euler-ancestral", "heun", "lcm", "LMSDiscreteScheduler"]
)
def test_a_flow_that_a_solver_follows_is_refused_to_schedulers_of_noise(name: str) -> None:
    with pytest.raises(
        ConfigError, match="is for noise predictions, and the model's own, a DPMSolver.*a flow"
    ):
        sampling.make_scheduler(name, SOLVER)


def test_noise_predictions_are_refused_to_schedulers_of_flows(ours: Pipeline) -> None:
    with pytest.raises(ConfigError, match="is for flow predictions, and the model's own, .* of noise"):
        ours.make_scheduler("flow-euler")


def test_settings_that_a_scheduler_does_not_have_are_refused() -> None:
    config = {"_class_name": "DPMSolverMultistepScheduler", "algorithm_type": "sde-dpmsolver++"}
    with pytest.raises(ConfigError, match="'DEISMultistepScheduler' does not fit .*sde-dpm.*; take another"):
        sampling.make_scheduler("deis", config)


@pytest.mark.parametrize("name", NOISY)
def test_predictions_of_the_sample_are_taken_or_refused_before_the_loop(name: str) -> None:
    config = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "prediction_type": "sample"}
    if name in ("pndm", "euler-ancestral"):
        with pytest.raises(ConfigError, match="predictions of the sample itself"):
            sampling.make_scheduler(name, config)
    else:
        assert follow(sampling.make_scheduler(name, config), 4).isfinite()

"""Walks: the sampler's steps from recorded trajectories, and what errors grow into."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quest_deploy import sampling
from quest_deploy.config import FinetuneConfig
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import phases
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.recipe import load_recipe
from quest_deploy.quantize.trace import Trace
from quest_deploy.quantize.walk import fit_steps, guided_target, has_steps, walk_errors

KEEP, MOVE = torch.tensor([0.9, 0.8, 1.1]), torch.tensor([-0.2, 0.3, -0.1])
GUIDANCE = 3.0


class Linear(nn.Module):
    """A denoiser whose branches answer with multiples of the latents."""

    def __init__(self, negative: float, positive: float, *, error: float = 0.0) -> None:
        super().__init__()
        self.negative, self.positive = negative, positive
        self.error = nn.Parameter(torch.tensor(error))

    def forward(self, sample: Tensor, timestep: Tensor, *, return_dict: bool) -> tuple[Tensor]:
        negative, positive = sample.chunk(2)
        return (torch.cat([self.negative * negative, (self.positive + self.error) * positive]),)


def recorded(denoiser: Linear, prompts: int = 2) -> CalibrationSet:
    """Trajectories of `denoiser` under the steps above."""
    latents = torch.randn(prompts, 1, 2, 3, generator=torch.Generator().manual_seed(0))
    seen, answered = [], []
    for step in range(4):
        both = denoiser(torch.cat([latents, latents]), torch.tensor(0.0), return_dict=False)[0].detach()
        negative, positive = both.chunk(2)
        seen.append(latents)
        answered.append(torch.stack([negative, positive], dim=1))
        if step < 3:
            latents = KEEP[step] * latents + MOVE[step] * (negative + GUIDANCE * (positive - negative))
    return CalibrationSet(
        timesteps=torch.tensor([900.0, 600.0, 300.0, 0.0]),
        latents=torch.stack(seen, dim=1),
        targets=torch.stack(answered, dim=1),
        positive={},
        negative={},
    )


def noisy(data: CalibrationSet) -> CalibrationSet:
    generator = torch.Generator().manual_seed(1)
    return dataclasses.replace(
        data,
        targets=data.targets + torch.randn(data.targets.shape, generator=generator),
    )


def test_the_steps_of_a_linear_sampler_are_found() -> None:
    data = recorded(Linear(0.5, 0.7))
    # Answers that are multiples of the latents would leave the two numbers undetermined.
    varied = noisy(data)
    guided = torch.stack([guided_target(varied.targets[:, step], GUIDANCE) for step in range(4)], dim=1)
    latents = [varied.latents[:, 0]]
    for step in range(3):
        latents.append(KEEP[step] * latents[-1] + MOVE[step] * guided[:, step])
    steps = fit_steps(dataclasses.replace(varied, latents=torch.stack(latents, dim=1)), GUIDANCE)
    assert steps is not None
    torch.testing.assert_close(steps.keep, KEEP, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(steps.move, MOVE, rtol=1e-5, atol=1e-5)


def test_without_guidance_the_sampler_followed_the_positive_branch() -> None:
    targets = torch.tensor([[2.0, 5.0]]).reshape(1, 2, 1, 1, 1)
    assert guided_target(targets, 0.0).item() == 5


def test_a_sampler_of_another_form_has_no_steps() -> None:
    assert fit_steps(noisy(recorded(Linear(0.5, 0.7))), GUIDANCE) is None


@pytest.fixture
def walked() -> tuple[CalibrationSet, object]:
    from quest_deploy.quantize.walk import Steps

    return recorded(Linear(0.5, 0.7)), Steps(keep=KEEP, move=MOVE)


def test_the_teacher_ends_where_it_was(walked) -> None:  # type: ignore[no-untyped-def]
    data, steps = walked
    prompt, start = torch.tensor([0, 1]), torch.tensor([0, 1])
    errors = walk_errors(Linear(0.5, 0.7), data, steps, prompt, start, length=2, guidance_scale=GUIDANCE)
    assert float(errors.detach().max()) < 1e-12


def test_an_error_grows_by_the_closed_form(walked) -> None:  # type: ignore[no-untyped-def]
    data, steps = walked
    errors = walk_errors(
        Linear(0.5, 0.7, error=0.1),
        data,
        steps,
        torch.tensor([1]),
        torch.tensor([1]),
        length=2,
        guidance_scale=GUIDANCE,
    )
    # Guided answers are multiples g of the latents: 0.5 + 3 * 0.2, and with the error 0.5 + 3 * 0.3.
    true, wrong = 1.0, 1.0
    for step in (1, 2):
        true *= float(KEEP[step] + MOVE[step] * 1.1)
        wrong *= float(KEEP[step] + MOVE[step] * 1.4)
    expected = (wrong - true) ** 2 * data.latents[1, 1].square().mean()
    torch.testing.assert_close(errors, expected[None], rtol=1e-4, atol=0)


def test_every_step_of_a_walk_is_learned_from(walked) -> None:  # type: ignore[no-untyped-def]
    data, steps = walked
    student = Linear(0.5, 0.7, error=0.1)
    gradients = []
    for length in (1, 2):
        errors = walk_errors(
            student, data, steps, torch.tensor([0]), torch.tensor([1]), length=length, guidance_scale=GUIDANCE
        )
        gradients.append(float(torch.autograd.grad(errors.sum(), student.error)[0]))
    assert 0 < gradients[0] != gradients[1] > 0


def test_walks_end_at_recorded_latents(walked) -> None:  # type: ignore[no-untyped-def]
    _, steps = walked
    assert [steps.starts(length) for length in (1, 3, 4, 9)] == [3, 1, 0, 0]


@pytest.mark.parametrize(
    ("scheduler", "options", "expected"),
    [
        ("ddim", {}, True),
        # Recorded with DDIM.
        ("pndm", {}, True),
        ("ddim", {"clip_sample": True}, True),
        ("euler", {}, True),
        ("flow-euler", {}, True),
        ("dpm++", {}, False),
        ("lcm", {}, False),
    ],
)
def test_which_schedulers_have_walks_is_known_beforehand(
    float_model: LoadedModel, scheduler: str, options: dict[str, bool], expected: bool
) -> None:
    config = {**float_model.scheduler.config, **options, "_class_name": sampling.SCHEDULERS[scheduler]}
    own = sampling.make_scheduler(None, config)
    assert has_steps(dataclasses.replace(float_model, scheduler=own), 4) == expected


@pytest.mark.parametrize(("length", "told"), [(2, []), (3, [(3, 3)])])
def test_walks_that_are_as_long_as_trajectories_are_told_of(
    length: int,
    told: list[tuple[int, int]],
    float_model: LoadedModel,
    traced: Trace,
    quantize_tiny: Callable,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """They were left out without a word."""
    monkeypatch.setattr(phases, "make_objective", lambda *arguments, **options: None)
    student, context = quantize_tiny(8, 8)
    recipe = dataclasses.replace(
        load_recipe("w8a8"), validation_prompts=1, walk_length=length, calibration_steps=3
    )
    phases.make_task(
        phases.Inputs(
            model=float_model,
            student=student,
            trace=traced,
            data=request.getfixturevalue("recorded"),
            context=context,
            config=FinetuneConfig(recipe=recipe),
        )
    )
    assert [entry.args for entry in caplog.records] == told

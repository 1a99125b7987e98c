"""Calibration: what is recorded is what the full-precision loop did, step by step and layer by layer."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from torch import nn

from quest_deploy import sampling
from quest_deploy.errors import CalibrationError
from quest_deploy.model.components import TextEncoder, predict
from quest_deploy.model.conditioning import tokenize
from quest_deploy.model.families import TextPart
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.calibrate import (
    EXTREME_ROWS,
    CalibrationSet,
    collect_inputs,
    join,
    record_trajectories,
)
from quest_deploy.quantize.insert import quantizable_layers

SETTINGS = {"steps": 3, "guidance_scale": 3.0}


def same(a: CalibrationSet, b: CalibrationSet) -> bool:
    other = b.tensors()
    return all(torch.equal(value, other[name]) for name, value in a.tensors().items())


@torch.no_grad()
def test_the_trajectory_is_that_of_the_denoising_loop(float_model: LoadedModel) -> None:
    data = record_trajectories(float_model, ["the moon"], seed=5, batch_size=1, **SETTINGS)
    encoder = TextEncoder(float_model.text_encoder)
    positive, negative = (
        {"encoder_hidden_states": encoder(**tokenize(TextPart(), float_model.tokenizer, [text]))[0]}
        for text in ("the moon", "")
    )
    latents: list[torch.Tensor] = []
    sampling.denoise(
        lambda sample, timestep, text: predict(float_model.denoiser, sample, timestep.float(), text),
        sampling.make_scheduler(None, float_model.scheduler.config),
        sampling.initial_noise([5], (4, 8, 8)),
        positive,
        negative,
        callback=lambda step: latents.append(step.latents[0]),
        **SETTINGS,
    )
    assert torch.equal(data.latents[0], torch.stack(latents))


@torch.no_grad()
def test_the_targets_are_what_the_denoiser_answers(
    float_model: LoadedModel, recorded: CalibrationSet
) -> None:
    sample, timestep, conditioning, target = recorded.batch(torch.tensor([3, 0]), torch.tensor([1, 2]))
    answer = predict(float_model.denoiser, sample, timestep, conditioning)
    torch.testing.assert_close(answer, target, rtol=1e-4, atol=1e-5)


def test_negative_branches_come_first(recorded: CalibrationSet) -> None:
    prompt, step = torch.tensor([1, 2]), torch.tensor([0, 2])
    sample, timestep, conditioning, target = recorded.batch(prompt, step)
    negative, positive = (one["encoder_hidden_states"] for one in (recorded.negative, recorded.positive))
    expected = torch.cat([negative, negative, positive[prompt]])
    assert torch.equal(conditioning["encoder_hidden_states"], expected)
    assert torch.equal(
        target, torch.cat([recorded.targets[prompt, step, 0], recorded.targets[prompt, step, 1]])
    )
    assert torch.equal(timestep, recorded.timesteps[[0, 2, 0, 2]])
    assert torch.equal(sample[:2], sample[2:])


def test_recording_in_parts_gives_the_same_trajectories(float_model: LoadedModel) -> None:
    whole = record_trajectories(float_model, ["a", "b"], seed=7, batch_size=1, **SETTINGS)
    parts = [
        record_trajectories(float_model, [text], seed=7 + i, batch_size=1, **SETTINGS)
        for i, text in enumerate("ab")
    ]
    assert same(join(parts), whole)


@pytest.mark.parametrize("guidance_scale", [0.0, 1.0])
def test_both_branches_are_recorded_without_guidance(float_model: LoadedModel, guidance_scale: float) -> None:
    data = record_trajectories(
        float_model, ["a cat"], steps=2, guidance_scale=guidance_scale, seed=0, batch_size=1
    )
    assert data.targets.shape == (1, 2, 2, 4, 8, 8)
    assert not torch.equal(data.targets[:, :, 0], data.targets[:, :, 1])


def test_boundaries_lie_midway_between_the_calibrated_timesteps() -> None:
    nothing = torch.zeros(1, 1, 1)
    data = CalibrationSet(
        timesteps=torch.tensor([900.0, 500.0, 1.0]),
        latents=nothing,
        targets=nothing,
        positive={},
        negative={},
    )
    assert data.boundaries().tolist() == [250.5, 700.0]


def test_a_model_that_answers_nan_is_refused(float_model: LoadedModel) -> None:
    broken = copy.deepcopy(float_model.denoiser)
    broken.conv_out.bias.fill_(torch.nan)
    with pytest.raises(CalibrationError, match="calibration (latents|targets) hold NaN or infinity"):
        record_trajectories(
            dataclasses.replace(float_model, denoiser=broken), ["a"], seed=0, batch_size=1, **SETTINGS
        )


def test_every_layer_is_sampled_at_every_timestep(float_model: LoadedModel, inputs: dict) -> None:
    layers = quantizable_layers(float_model.denoiser)
    assert inputs.keys() == layers.keys()
    for name, layer in layers.items():
        assert inputs[name].shape == (3, 8 + EXTREME_ROWS, layer.weight.shape[1])


def test_the_last_rows_bound_the_others(inputs: dict) -> None:
    for name, rows in inputs.items():
        low, high = rows[:, -2:-1], rows[:, -1:]
        assert ((rows >= low) & (rows <= high)).all(), name


def test_groups_ascend_with_the_timestep(
    float_model: LoadedModel, recorded: CalibrationSet, inputs: dict
) -> None:
    embedding = float_model.denoiser.time_proj(recorded.timesteps.flip(0))
    for group in range(3):
        assert torch.equal(
            inputs["time_embedding.linear_1"][group], embedding[group].expand(8 + EXTREME_ROWS, -1)
        )


def test_collecting_leaves_no_hook_behind(float_model: LoadedModel, inputs: dict) -> None:
    assert not any(layer._forward_pre_hooks for layer in quantizable_layers(float_model.denoiser).values())


class Unusual(nn.Module):
    """Runs one layer as often as it is told."""

    def __init__(self, runs: int) -> None:
        super().__init__()
        self.runs, self.layer = runs, nn.Conv2d(4, 4, 1)

    def forward(self, sample: torch.Tensor, **others: object) -> tuple[torch.Tensor]:
        for _ in range(self.runs):
            sample = self.layer(sample)
        return (sample,)


def test_a_layer_that_does_not_run_is_refused(recorded: CalibrationSet) -> None:
    with pytest.raises(CalibrationError, match="'layer': got 0 runs in 3 calls"):
        collect_inputs(Unusual(0), recorded, prompts_per_step=1, positions=2, seed=0)


def test_every_run_of_a_layer_that_runs_twice_is_sampled(recorded: CalibrationSet) -> None:
    denoiser = Unusual(2).requires_grad_(False)
    denoiser.layer.weight.zero_()
    denoiser.layer.bias.fill_(50.0)
    rows = collect_inputs(denoiser, recorded, prompts_per_step=1, positions=2, seed=0)["layer"]
    # The second run is given the first one's output, 50 everywhere.
    assert rows.shape == (3, 2 + EXTREME_ROWS, 4)
    assert (rows[:, 0] < 50).all() and (rows[:, 1] == 50).all()
    assert (rows[:, -2] < 50).all() and (rows[:, -1] == 50).all()

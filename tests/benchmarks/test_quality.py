from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from benchmarks import quality
from benchmarks.settings import Settings
from benchmarks.trajectories import extremes, summary, teacher_forced
from quest_deploy.metrics import IDENTICAL_DB, paired_interval
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.recipe import PACKAGED, load_recipe


@pytest.mark.parametrize("name", PACKAGED)
def test_start_is_the_recipe_without_steps(name: str) -> None:
    recipe = load_recipe(name)
    start = quality.variant(recipe, "start")
    assert (start.temporal.steps, start.sensitive.steps) == (0, 0)
    same = (
        "weight_bits",
        "activation_bits",
        "initializer",
        "time_aware",
        "channel_wise",
        "calibration_prompts",
    )
    assert all(getattr(start, field) == getattr(recipe, field) for field in same)


def test_calibrated_has_nothing_of_the_method() -> None:
    plain = quality.variant(load_recipe("w4a4"), "calibrated")
    assert (plain.initializer, plain.time_aware, plain.channel_wise) == ("nearest", False, False)
    assert (plain.temporal.steps, plain.sensitive.steps) == (0, 0)


def test_rows_have_names_of_their_own() -> None:
    names = {quality.variant(load_recipe("w4a4"), row).name for row in ("start", "calibrated")}
    assert len(names | {"w4a4"}) == 3


def test_differences_are_paired_by_prompt() -> None:
    """Prompts differ by far more than rows do: only pairing sees the gain."""
    base = [10.0, 50.0, 90.0]
    per_prompt = {
        "minmax": base,
        "calibrated": [x + 1.0 for x in base],
        "start": [x + 1.5 for x in base],
        "quest": [x + d for x, d in zip(base, (2.0, 3.0, 4.0), strict=True)],
    }
    rows = {
        row: {figure: {"per_prompt": values} for figure in quality.FIGURES}
        for row, values in per_prompt.items()
    }
    found = quality.differences(rows)
    low, mean, high = paired_interval([1.0, 2.0, 3.0])
    assert found["quest - calibrated"]["raw_snr_db"] == {"low": low, "mean": mean, "high": high}
    assert found["start - calibrated"]["psnr_db"] == {"low": 0.5, "mean": 0.5, "high": 0.5}
    assert found["quest - minmax"]["ssim"]["mean"] == pytest.approx(3.0, abs=1e-12)


def test_summary_averages_over_the_right_axes() -> None:
    figures = summary(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
    assert figures == {"mean": 3.0, "per_prompt": [2.0, 4.0], "per_step": [1.5, 4.5]}
    assert "per_step" not in summary(torch.tensor([[1.0, 2.0]]))


class OneLayer(nn.Module):
    """A denoiser whose only layer reads the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(2, 2, 1)

    def forward(
        self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, return_dict: bool
    ) -> tuple[Tensor]:
        return (self.layer(sample),)


@pytest.fixture
def data() -> CalibrationSet:
    """Five prompts, three steps."""
    return CalibrationSet(
        timesteps=torch.tensor([900.0, 500.0, 100.0]),
        latents=torch.randn(5, 3, 2, 4, 4),
        targets=torch.randn(5, 3, 2, 2, 4, 4),
        positive={"encoder_hidden_states": torch.randn(5, 6, 8)},
        negative={"encoder_hidden_states": torch.randn(1, 6, 8)},
    )


def test_extremes_cover_every_position(data: CalibrationSet) -> None:
    data.latents[4, 1, 1, 3, 2] = 77.0
    data.latents[0, 2, 0, 0, 0] = -99.0
    assert extremes(OneLayer(), data, 2)["layer"].tolist() == [-99.0, 77.0]


def test_extremes_leave_no_hook_behind(data: CalibrationSet) -> None:
    denoiser = OneLayer()
    extremes(denoiser, data, 2)
    assert not denoiser.layer._forward_pre_hooks


def known_error(data: CalibrationSet, positive: float, negative: float) -> SimpleNamespace:
    """A pipeline whose denoiser answers the targets scaled by 1 + error, one error for each branch."""

    def denoiser(*, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> dict[str, Tensor]:
        step = int((data.timesteps == timestep).nonzero())
        n = len(sample) // 2
        prompts = [
            next(i for i in range(5) if torch.equal(data.positive["encoder_hidden_states"][i], text))
            for text in encoder_hidden_states[n:]
        ]
        target = data.targets[prompts, step]
        return {"out_sample": torch.cat([target[:, 0] * (1 + negative), target[:, 1] * (1 + positive)])}

    return SimpleNamespace(engines={"unet": denoiser})


def test_noise_snr_is_the_mean_of_both_branches_in_decibel(data: CalibrationSet) -> None:
    settings = Settings(batch_size=2, guidance_scale=3.0)
    raw, _ = teacher_forced(known_error(data, 0.1, 0.01), data, settings)
    assert raw.shape == (3, 5)
    # 10 % of the signal is 20 dB, 1 % is 40 dB. The scaled targets are rounded to float32.
    assert torch.allclose(raw, torch.full_like(raw, 30.0), atol=1e-3)


def test_guided_snr_weighs_the_branches_by_the_guidance_scale(data: CalibrationSet) -> None:
    data.targets[:, :, 0] = data.targets[:, :, 1]
    settings = Settings(batch_size=2, guidance_scale=3.0)
    _, guided = teacher_forced(known_error(data, 0.1, 0.0), data, settings)
    assert torch.allclose(guided, torch.full_like(guided, -20 * math.log10(0.3)), atol=1e-3)


def test_an_exact_denoiser_counts_as_identical(data: CalibrationSet) -> None:
    raw, guided = teacher_forced(known_error(data, 0.0, 0.0), data, Settings(batch_size=4))
    assert bool((raw == IDENTICAL_DB).all() and (guided == IDENTICAL_DB).all())

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from benchmarks.families import ModelSettings
from benchmarks.trajectories import teacher_forced
from quest_deploy.config import HELD_OUT_SEED
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.recipe import PACKAGED, load_recipe


@pytest.fixture
def data() -> CalibrationSet:
    """Five samples of an unconditional model, three steps."""
    return CalibrationSet(
        timesteps=torch.tensor([900.0, 500.0, 100.0]),
        latents=torch.randn(5, 3, 1, 4, 4),
        targets=torch.randn(5, 3, 1, 1, 4, 4),
        positive={},
        negative={},
    )


def test_without_branches_the_output_is_what_the_sampler_follows(data: CalibrationSet) -> None:
    def denoiser(*, sample: Tensor, timestep: Tensor) -> dict[str, Tensor]:
        step = int((data.timesteps == timestep).nonzero())
        samples = [next(i for i in range(5) if torch.equal(data.latents[i, step], one)) for one in sample]
        return {"out_sample": data.targets[samples, step, 0] * 1.1}

    settings = ModelSettings(model=Path("unused"), batch_size=2)
    raw, followed = teacher_forced(SimpleNamespace(engines={"unet": denoiser}), data, settings)
    assert raw.shape == (3, 5)
    # A tenth of the signal is 20 dB. The scaled targets are rounded to float32.
    assert torch.allclose(raw, torch.full_like(raw, 20.0), atol=1e-3)
    assert torch.equal(raw, followed)


def test_classes_are_measured_in_turn(repository: Path) -> None:
    prompts = ModelSettings(model=repository / "reference-model" / "digits-class").prompts
    assert len(prompts) == 64 and prompts[:3] == prompts[10:13] == ("zero", "one", "two")


@pytest.mark.parametrize("recipe", PACKAGED)
def test_no_seed_is_held_out_that_calibration_draws_from(recipe: str) -> None:
    held_out = min(HELD_OUT_SEED, *ModelSettings.noise_seeds)
    assert ModelSettings.seed + load_recipe(recipe).calibration_prompts <= held_out

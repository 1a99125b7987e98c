"""Training of every kind of model: what phase 1 asks the layers that carry time."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quest_deploy.config import FinetuneConfig, PhaseConfig
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import losses, train
from quest_deploy.quantize.finetune import finetune
from tests.families.conftest import RECIPE

NONE = PhaseConfig(layers="none", steps=0)
LOCAL = PhaseConfig(layers="temporal", steps=1, batch_size=1, walks=0)
# The scheduler counts to 999 in each; FLUX is told thousandths of that.
LAST_TIMES = {"ddpm": 999.0, "dit": 999.0, "sd3": 999.0, "flux-dev": 0.999}


@pytest.mark.parametrize("kind", LAST_TIMES)
def test_phase_1_draws_timesteps_as_the_denoiser_is_told_them(
    kind: str,
    model_of: Callable[[str], Path],
    loaded: Callable[[str], LoadedModel],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[Tensor] = []
    temporal_loss = losses.temporal_loss

    def watched(*args: object) -> Tensor:
        drawn.extend(arg for arg in args if isinstance(arg, Tensor))
        return temporal_loss(*args)

    monkeypatch.setattr(losses, "temporal_loss", watched)
    recipe = dataclasses.replace(RECIPE, walk_share=0.0, temporal=LOCAL, sensitive=NONE)
    finetune(model_of(kind), tmp_path / "out", FinetuneConfig(recipe=recipe))
    count = loaded(kind).scheduler.config.num_train_timesteps
    told = loaded(kind).denoiser_time(torch.tensor([0, count - 1]))
    assert told.tolist() == pytest.approx([0.0, LAST_TIMES[kind]])
    (timestep,) = drawn
    # 256 draws cover the whole range.
    assert told[0] <= timestep.min() < 0.05 * told[1] and 0.95 * told[1] < timestep.max() <= told[1]


@pytest.mark.parametrize("kind", ["sd35", "sana"])
def test_a_rate_of_floats_lets_norms_of_root_mean_squares_learn(
    kind: str, loaded: Callable[[str], LoadedModel]
) -> None:
    denoiser = copy.deepcopy(loaded(kind).denoiser)
    floats = PhaseConfig(layers="none", steps=1, learning_rate_floats=0.01)
    learned = train.learned(train.trainable(denoiser, floats, {}, temporal=False))
    norms = [name for name, module in denoiser.named_modules() if type(module).__name__ == "RMSNorm"]
    assert norms and {f"{name}.weight" for name in norms} <= set(learned)

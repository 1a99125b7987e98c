"""A batch that is larger than an engine's profile runs in parts; any other runs at once."""

from __future__ import annotations

import pytest
import torch

from quest_deploy.pipeline import Pipeline
from quest_deploy.pipeline.parts import run_in_parts


def unet_inputs(batch: int, steps: int) -> dict[str, torch.Tensor]:
    return {
        "sample": torch.randn(batch, 4, 8, 8),
        "timestep": torch.linspace(100, 900, steps),
        "encoder_hidden_states": torch.randn(batch, 24, 16),
    }


@pytest.mark.parametrize(("largest", "batches"), [(5, [5]), (4, [3, 2]), (2, [2, 2, 1]), (1, [1] * 5)])
@pytest.mark.parametrize("steps", [1, 5])
def test_parts_fit_the_profile_and_give_the_whole(
    pipeline: Pipeline, largest: int, batches: list[int], steps: int
) -> None:
    engine = pipeline.engines["unet"]
    inputs = unet_inputs(5, steps)
    whole = engine(**inputs)["out_sample"]
    engine.batches.clear()
    engine.limits = {"batch": (1, largest)}
    parts = run_in_parts(engine, **inputs)["out_sample"]
    assert engine.batches == batches
    # The batch size may change the last bits of a convolution.
    assert torch.allclose(parts, whole, rtol=0, atol=1e-5)


def test_an_engine_without_limits_runs_at_once(pipeline: Pipeline) -> None:
    run_in_parts(pipeline.engines["unet"], **unet_inputs(16, 1))
    assert pipeline.engines["unet"].batches == [16]

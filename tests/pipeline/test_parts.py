"""A batch larger than an engine's profile runs in parts, a smaller one is filled; any other runs at once."""

from __future__ import annotations

from typing import ClassVar

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


@pytest.mark.parametrize(
    ("limits", "batches"), [((8, 8), [8]), ((4, 4), [4, 4]), ((3, 4), [3, 3]), ((2, 3), [3, 2])]
)
@pytest.mark.parametrize("steps", [1, 5])
def test_parts_smaller_than_the_profile_are_filled_and_cut(
    pipeline: Pipeline, limits: tuple[int, int], batches: list[int], steps: int
) -> None:
    engine = pipeline.engines["unet"]
    inputs = unet_inputs(5, steps)
    whole = engine(**inputs)["out_sample"]
    engine.batches.clear()
    engine.limits = {"batch": limits}
    parts = run_in_parts(engine, **inputs)["out_sample"]
    assert engine.batches == batches
    assert parts.shape == whole.shape
    assert torch.allclose(parts, whole, rtol=0, atol=1e-5)


def test_a_single_sample_is_filled_and_its_one_timestep_is_not(pipeline: Pipeline) -> None:
    engine = pipeline.engines["unet"]
    inputs = unet_inputs(1, 1)
    given: list[tuple[int, ...]] = []

    class Fixed:
        spec = engine.spec
        limits: ClassVar = {"batch": (4, 4), "steps": (1, 1)}

        def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            given.extend(inputs[name].shape[:1] for name in ("sample", "timestep", "encoder_hidden_states"))
            return engine(**inputs)

    part = run_in_parts(Fixed(), **inputs)["out_sample"]
    assert given == [(4,), (1,), (4,)]
    assert torch.allclose(part, engine(**inputs)["out_sample"], rtol=0, atol=1e-5)


def test_an_engine_without_limits_runs_at_once(pipeline: Pipeline) -> None:
    run_in_parts(pipeline.engines["unet"], **unet_inputs(16, 1))
    assert pipeline.engines["unet"].batches == [16]

"""A batch larger than an engine's profile runs in parts, a smaller one is filled; any other runs at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from quest_deploy.bench.worker import TimedEngine
from quest_deploy.config import ProfileConfig, ShapeRange
from quest_deploy.engines.base import Batched, check_inputs
from quest_deploy.engines.profiles import (
    Profile,
    Shape,
    batch_ranges,
    component_profiles,
    limits_of,
    select_profile,
)
from quest_deploy.errors import EngineInputError
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
    engine.batch_ranges = lambda shapes: [(1, largest)]
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
    engine.batch_ranges = lambda shapes: [limits]
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

        def batch_ranges(self, shapes: Mapping[str, Shape]) -> list[tuple[int, int]]:
            return [(4, 4)]

        def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
            given.extend(inputs[name].shape[:1] for name in ("sample", "timestep", "encoder_hidden_states"))
            return engine(**inputs)

    part = run_in_parts(Fixed(), **inputs)["out_sample"]
    assert given == [(4,), (1,), (4,)]
    assert torch.allclose(part, engine(**inputs)["out_sample"], rtol=0, atol=1e-5)


def test_an_engine_without_limits_runs_at_once(pipeline: Pipeline) -> None:
    run_in_parts(pipeline.engines["unet"], **unet_inputs(16, 1))
    assert pipeline.engines["unet"].batches == [16]


class Profiled:
    """Takes what an engine with these profiles takes, and draws with another."""

    def __init__(self, engine: Any, profiles: Sequence[Profile]) -> None:
        self.engine, self.profiles, self.spec = engine, profiles, engine.spec

    def batch_ranges(self, shapes: Mapping[str, Shape]) -> list[tuple[int, int]]:
        return batch_ranges(self.spec, self.profiles, shapes)

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        check_inputs(self.spec, inputs, limits_of(self.spec, self.profiles))
        select_profile("unet", self.profiles, {name: tuple(value.shape) for name, value in inputs.items()})
        return self.engine(**inputs)


@pytest.fixture
def profiled(pipeline: Pipeline, tiny_model: Path) -> Callable[..., Profiled]:
    def make(*configs: ProfileConfig) -> Profiled:
        profiles = [component_profiles(tiny_model, config)["unet"] for config in configs]
        return Profiled(pipeline.engines["unet"], profiles)

    return make


@pytest.mark.parametrize(
    ("batch", "batches"),
    [
        (1, [2]),
        (2, [2]),
        (3, [2, 2]),
        (4, [2, 2]),
        (6, [2] * 3),
        (7, [8]),
        (8, [8]),
        (15, [8, 8]),
        (16, [8, 8]),
    ],
)
def test_a_batch_between_two_profiles_takes_the_one_that_repeats_least(
    profiled: Callable[..., Profiled], batch: int, batches: list[int]
) -> None:
    engine = profiled(*(ProfileConfig(batch=fixed(images), static=True) for images in (1, 4)))
    inputs = unet_inputs(batch, 1)
    parts = run_in_parts(engine, **inputs)["out_sample"]
    assert engine.engine.batches == batches
    assert torch.allclose(parts, engine.engine(**inputs)["out_sample"], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("side", "batches"), [(8, [6]), (16, [3, 3])])
@pytest.mark.parametrize("steps", [1, 6])
def test_parts_fit_the_profile_of_their_size(
    profiled: Callable[..., Profiled], side: int, batches: list[int], steps: int
) -> None:
    large = ProfileConfig(batch=ShapeRange(min=1, opt=1, max=2), height=fixed(32), width=fixed(32))
    engine = profiled(ProfileConfig(), large)
    inputs = unet_inputs(6, steps) | {"sample": torch.randn(6, 4, side, side)}
    assert run_in_parts(engine, **inputs)["out_sample"].shape == (6, 4, side, side)
    assert engine.engine.batches == batches


def test_sizes_that_no_profile_holds_are_told_by_the_engine(profiled: Callable[..., Profiled]) -> None:
    inputs = unet_inputs(1, 1) | {"sample": torch.randn(1, 4, 8, 16)}
    with pytest.raises(EngineInputError, match="rebuild it with a profile that covers 16"):
        run_in_parts(profiled(ProfileConfig()), **inputs)


def fixed(size: int) -> ShapeRange:
    return ShapeRange(min=size, opt=size, max=size)


def test_an_engine_that_is_timed_runs_in_parts(pipeline: Pipeline) -> None:
    """By its methods: from Python 3.12 on `isinstance` overlooks, for a protocol, what a wrapper passes on."""
    engine = pipeline.engines["unet"]
    engine.batch_ranges = lambda shapes: [(1, 2)]
    with pytest.raises(TypeError):
        isinstance(engine, Batched)
    run_in_parts(TimedEngine(engine, lambda: None), **unet_inputs(3, 1))
    assert engine.batches == [2, 1]

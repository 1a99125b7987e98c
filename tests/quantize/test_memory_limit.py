"""A memory limit: less is in memory at once, and what is recorded and rounded stays the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from quest_deploy.config import FinetuneConfig, PhaseConfig, Recipe
from quest_deploy.errors import ConfigError
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import adaround, blocks, calibrate, gptq, parts
from quest_deploy.quantize.calibrate import CalibrationSet, collect_inputs
from quest_deploy.quantize.estimate import estimate
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.memory import (
    GIGABYTE,
    PeakMemory,
    forward_memory,
    held_bytes,
    limit_count,
    placeholder,
    prompts_at_once,
)
from quest_deploy.quantize.operands import collect_operands
from quest_deploy.quantize.resume import WorkDirectory
from quest_deploy.quantize.rows import RowChoice

NONE = PhaseConfig(layers="none", steps=0)
RECIPE = Recipe(
    name="limited",
    weight_bits=4,
    activation_bits=8,
    calibration_prompts=8,
    validation_prompts=1,
    calibration_steps=2,
    adaround_iterations=20,
    temporal=NONE,
    sensitive=NONE,
)
CONFIG = FinetuneConfig(recipe=RECIPE, prompts=tuple("abcdefgh"))


def limited(model: LoadedModel, prompts: float, recipe: Recipe = RECIPE) -> Recipe:
    """`recipe` with a limit that has room for a pass of so many prompts beside the model and what was recorded."""
    data = placeholder(model, CONFIG)
    each = forward_memory(model.denoiser, data)
    needed = held_bytes(model, data, recipe) + each.fixed + each.each * prompts
    return dataclasses.replace(recipe, memory_limit_gb=needed / GIGABYTE)


@pytest.mark.parametrize("at_once", [1, 2, 3, 4, 5])
def test_rows_of_a_batch_do_not_depend_on_its_chunks(at_once: int) -> None:
    # Branches, prompts, rows of each sample.
    batch = torch.arange(2 * 5 * 3).reshape(2, 5, 3)
    whole = RowChoice(torch.Generator().manual_seed(3), 2)
    list(whole.chunks(torch.arange(5), 5))
    whole = RowChoice(torch.Generator().manual_seed(3), 2)
    for _ in whole.chunks(torch.arange(5), 5):
        runs = [batch.flatten()[whole.of("layer", 30, 12)[2]] for _ in range(2)]
    choice = RowChoice(torch.Generator().manual_seed(3), 2)
    found = torch.full((2, 12), -1)
    for chunk in choice.chunks(torch.arange(5), at_once):
        own = batch[:, chunk].flatten()
        for _ in range(2):
            run, places, rows = choice.of("layer", own.numel(), 12)
            found[run, places] = own[rows]
    assert torch.equal(found, torch.stack(runs))


@pytest.mark.parametrize("at_once", [1, 2])
def test_activations_are_the_same_in_chunks(
    float_model: LoadedModel, recorded: CalibrationSet, at_once: int
) -> None:
    options: dict[str, Any] = {"prompts_per_step": 3, "positions": 8, "seed": 0}
    whole = collect_inputs(float_model.denoiser, recorded, **options)
    chunked = collect_inputs(float_model.denoiser, recorded, at_once=at_once, **options)
    for name, rows in whole.items():
        torch.testing.assert_close(chunked[name], rows, rtol=1e-4, atol=1e-5)


def test_attention_operands_are_the_same_in_chunks(
    float_model: LoadedModel, recorded: CalibrationSet
) -> None:
    options: dict[str, Any] = {"prompts_per_step": 3, "values": 64, "seed": 0}
    whole = collect_operands(float_model.denoiser, recorded, **options)
    chunked = collect_operands(float_model.denoiser, recorded, at_once=2, **options)
    for name, values in whole.items():
        torch.testing.assert_close(chunked[name], values, rtol=1e-4, atol=1e-5)


@pytest.fixture
def hessians(monkeypatch: pytest.MonkeyPatch) -> dict[int, list[Tensor]]:
    """The Hessians that layers are rounded with, by their size, in order."""
    found: dict[int, list[Tensor]] = {}
    rounded = gptq.round_with_compensation

    def keep(weight: Tensor, scale: Tensor, hessian: Tensor, bits: int) -> Tensor:
        found.setdefault(len(hessian), []).append(hessian.clone())
        return rounded(weight, scale, hessian, bits)

    monkeypatch.setattr(gptq, "round_with_compensation", keep)
    return found


def test_hessians_are_the_same_in_chunks_of_prompts_and_of_layers(
    float_model: LoadedModel,
    recorded: CalibrationSet,
    qparams: Callable,
    hessians: dict[int, list[Tensor]],
) -> None:
    (names,) = gptq.chunks(float_model.denoiser, list(qparams(4, 8)))
    options: dict[str, Any] = {"prompts_per_step": 3, "rows_per_step": 16, "seed": 0}
    given = (float_model.denoiser, recorded, qparams(4, 8))
    gptq.compensate(*given, names, **options)
    whole = {size: list(some) for size, some in hessians.items()}
    hessians.clear()
    some_at_a_time = list(gptq.chunks(float_model.denoiser, names, 40_000))
    assert len(some_at_a_time) > 2
    for own in some_at_a_time:
        gptq.compensate(*given, own, beside=names, at_once=2, **options)
    for size, found in hessians.items():
        for one, other in zip(found, whole[size], strict=True):
            # An input at a tie of its grid may fall to either side.
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def test_samples_of_a_block_are_the_same_in_chunks(
    float_model: LoadedModel, recorded: CalibrationSet, quantize_tiny: Callable
) -> None:
    student, _ = quantize_tiny(4, 8)
    pairs = blocks.chosen_pairs(recorded, 3, 0)
    name = "mid_block.resnets.0"
    whole, chunked = (
        blocks.collect(student, float_model.denoiser, name, recorded, pairs, at_once) for at_once in (None, 2)
    )
    assert torch.equal(chunked.timestep, whole.timestep)
    for got, wanted in zip((*chunked.args, *chunked.targets), (*whole.args, *whole.targets), strict=True):
        if isinstance(wanted, Tensor):
            assert float((got - wanted).square().mean() / wanted.square().mean()) < 1e-3


@pytest.fixture
def samples(
    float_model: LoadedModel, recorded: CalibrationSet, quantize_tiny: Callable
) -> tuple[nn.Module, blocks.Samples, TimestepContext]:
    student, context = quantize_tiny(4, 8)
    name = "mid_block.resnets.0"
    pairs = blocks.chosen_pairs(recorded, 4, 0)
    return (
        student.get_submodule(name),
        blocks.collect(student, float_model.denoiser, name, recorded, pairs),
        context,
    )


def test_gradients_of_a_block_s_rounding_are_the_same_in_chunks(
    samples: tuple[nn.Module, blocks.Samples, TimestepContext],
) -> None:
    part, given, context = samples
    rounding = [adaround.start_rounding(layer) for layer in adaround.quantized_layers(part).values()]
    for layer, one in zip(adaround.quantized_layers(part).values(), rounding, strict=True):
        layer.rounding = one.soft
    chosen = torch.arange(20)
    found = []
    for at_once in (32, 7):
        for one in rounding:
            one.logits.grad = None
        adaround._update(part, given, context, rounding, 0.5, at_once, chosen, 10.0)
        found.append([one.logits.grad.clone() for one in rounding])
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()))


def test_the_memory_of_a_block_s_rounding_is_what_it_takes(
    samples: tuple[nn.Module, blocks.Samples, TimestepContext],
) -> None:
    part, given, context = samples
    told = adaround.part_memory(part, given, context)
    rounding = [adaround.start_rounding(layer) for layer in adaround.quantized_layers(part).values()]
    for layer, one in zip(adaround.quantized_layers(part).values(), rounding, strict=True):
        layer.rounding = one.soft
    for count in (1, 12, 24):
        with PeakMemory() as memory:
            adaround._update(part, given, context, rounding, 1.0, count, torch.arange(count), 10.0)
        for one in rounding:
            one.logits.grad = None
        assert memory.peak <= told.fixed + count * told.each <= 1.25 * memory.peak


def test_a_pass_without_gradients_takes_what_was_told(
    float_model: LoadedModel, recorded: CalibrationSet
) -> None:
    told = forward_memory(float_model.denoiser, recorded)
    at = torch.arange(4)
    # Attention without values is not fused, which takes more.
    with sdpa_kernel(SDPBackend.MATH), PeakMemory() as memory, torch.no_grad():
        calibrate.predict(float_model.denoiser, *recorded.inputs(at, torch.zeros(4, dtype=torch.int64)))
    assert told.fixed + 4 * told.each == pytest.approx(memory.peak, rel=0.1)


@pytest.mark.parametrize(("room", "expected"), [(8.5, 8), (3.5, 3), (1.5, 1)])
def test_a_limit_makes_chunks_smaller(float_model: LoadedModel, room: float, expected: int) -> None:
    data = placeholder(float_model, CONFIG)
    assert prompts_at_once(float_model, data, RECIPE, 8) == 8
    assert prompts_at_once(float_model, data, limited(float_model, room), 8) == expected


def test_a_limit_that_has_room_for_none_says_what_is_needed(float_model: LoadedModel) -> None:
    recipe = limited(float_model, 0.5)
    with pytest.raises(ConfigError, match=r"memory_limit_gb is .*, expected at least .*; raise it"):
        prompts_at_once(float_model, placeholder(float_model, CONFIG), recipe, 8)
    each = forward_memory(float_model.denoiser, placeholder(float_model, CONFIG))
    assert limit_count(8, 0, None, each) == 8


def test_recording_keeps_the_limit_and_its_result(
    float_model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    record = calibrate.record_trajectories

    def watched(*args: Any, batch_size: int, **options: Any) -> CalibrationSet:
        sizes.append(batch_size)
        return record(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(calibrate, "record_trajectories", watched)
    found = []
    for name, recipe in (("whole", RECIPE), ("limited", limited(float_model, 2.5))):
        work = WorkDirectory(tmp_path / name)
        work.open({}, resume=False, overwrite=False)
        config = dataclasses.replace(CONFIG, recipe=recipe)
        found.append(parts.record(float_model, config, work, lambda event: None))
    assert sizes == [8, 2]
    torch.testing.assert_close(found[1].latents, found[0].latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].targets, found[0].targets, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("initializer", "room"), [("gptq", 4.5), ("adaround", 7.5)])
def test_the_estimate_keeps_the_limit(float_model: LoadedModel, initializer: str, room: float) -> None:
    recipe = dataclasses.replace(RECIPE, initializer=initializer)
    limit = limited(float_model, room, recipe).memory_limit_gb
    free, _ = estimate(float_model.path, dataclasses.replace(CONFIG, recipe=recipe))
    recipe = dataclasses.replace(recipe, memory_limit_gb=limit)
    bound, _ = estimate(float_model.path, dataclasses.replace(CONFIG, recipe=recipe))
    before, after = ({part.part: part.memory_bytes for part in found} for found in (free, bound))
    for part in ("record trajectories", "collect activations", "round weights"):
        assert after[part] < before[part], part
        assert after[part] <= limit * GIGABYTE, part

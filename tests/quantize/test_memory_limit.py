"""A memory limit: less is in memory at once, and what is recorded and rounded stays the same."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from quest_deploy.errors import ConfigError
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import adaround, blocks, calibrate, gptq, parts, recording
from quest_deploy.quantize.auto_layers import measure_damages
from quest_deploy.quantize.calibrate import CalibrationSet, collect_inputs
from quest_deploy.quantize.collapse import collapse_groups
from quest_deploy.quantize.estimate import estimate
from quest_deploy.quantize.insert import quantizable_layers, quantized_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.memory import (
    GIGABYTE,
    PeakMemory,
    forward_memory,
    held_bytes,
    limit_count,
    placeholder,
    prompts_at_once,
    size_bytes,
)
from quest_deploy.quantize.operands import collect_operands
from quest_deploy.quantize.resume import WorkDirectory
from quest_deploy.quantize.rows import RowChoice
from quest_deploy.quantize.sensitivity import choose_pairs
from tests.quantize.limited_run import CONFIG, RECIPE, limited


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


@pytest.mark.thorough
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


@pytest.mark.parametrize("name", ["up_blocks.1.resnets.0", "up_blocks.1.attentions.0.transformer_blocks.0"])
def test_the_plan_of_a_block_s_rounding_holds_all_of_it(
    float_model: LoadedModel, recorded: CalibrationSet, quantize_tiny: Callable, name: str
) -> None:
    student, context = quantize_tiny(4, 8)
    part, pairs = student.get_submodule(name), blocks.chosen_pairs(recorded, adaround.PROMPTS_PER_STEP, 0)
    told = adaround.plan(
        part,
        blocks.shapes_of(student, recorded, context)[name],
        recorded,
        context,
        # What layers keep of their weights.
        held_bytes=size_bytes([layer.weight for layer in quantized_layers(student).values()]),
        forward=forward_memory(student, recorded, context),
        limit_gb=None,
    )
    # Attention without values is not fused, which takes more.
    with sdpa_kernel(SDPBackend.MATH), PeakMemory() as memory:
        given = blocks.collect(student, float_model.denoiser, name, recorded, pairs, told.prompts)
        options = {"iterations": 6, "generator": torch.Generator(), "at_once": told.at_once}
        adaround.learn_rounding(part, given, context, **options)
    assert told.memory_bytes == pytest.approx(memory.peak, rel=0.15)


@pytest.mark.parametrize("quantized", [False, True])
def test_a_pass_without_gradients_takes_what_was_told(
    float_model: LoadedModel, recorded: CalibrationSet, quantize_tiny: Callable, quantized: bool
) -> None:
    denoiser, context = quantize_tiny(8, 8) if quantized else (float_model.denoiser, None)
    told = forward_memory(denoiser, recorded, context)
    at = torch.arange(4)
    # Layers keep their rounded weights from the first.
    for _ in range(2):
        # Attention without values is not fused, which takes more.
        with sdpa_kernel(SDPBackend.MATH), PeakMemory() as memory, torch.no_grad():
            calibrate.predict(denoiser, *recorded.inputs(at, torch.zeros(4, dtype=torch.int64)))
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
    drawn = calibrate.record_trajectories

    def watched(*args: Any, batch_size: int, **options: Any) -> CalibrationSet:
        sizes.append(batch_size)
        return drawn(*args, batch_size=batch_size, **options)

    monkeypatch.setattr(calibrate, "record_trajectories", watched)
    found = []
    for name, recipe in (("whole", RECIPE), ("limited", limited(float_model, 2.5))):
        work = WorkDirectory(tmp_path / name)
        work.open({}, resume=False, overwrite=False)
        config = dataclasses.replace(CONFIG, recipe=recipe)
        found.append(recording.record(float_model, config, work, lambda event: None))
    assert sizes == [8, 2]
    torch.testing.assert_close(found[1].latents, found[0].latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1].targets, found[0].targets, rtol=1e-4, atol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize(("initializer", "room"), [("gptq", 12.5), ("adaround", 7.5)])
def test_the_estimate_keeps_the_limit(float_model: LoadedModel, initializer: str, room: float) -> None:
    recipe = dataclasses.replace(RECIPE, initializer=initializer)
    limit = limited(float_model, room, recipe).memory_limit_gb
    free, _ = estimate(float_model.path, dataclasses.replace(CONFIG, recipe=recipe))
    recipe = dataclasses.replace(recipe, memory_limit_gb=limit)
    bound, _ = estimate(float_model.path, dataclasses.replace(CONFIG, recipe=recipe))
    before, after = ({part.part: part.memory_bytes for part in found} for found in (free, bound))
    # Rounding the largest layer takes more than recording all prompts.
    passes = ("record trajectories", "collect activations")
    for part in ("round weights",) if initializer == "gptq" else (*passes, "round weights"):
        assert after[part] < before[part], part
    assert all(after[part] <= limit * GIGABYTE for part in (*passes, "round weights"))


@pytest.mark.parametrize(("rows", "columns"), [(8, 300), (300, 300), (300, 64)])
def test_rounding_a_layer_takes_no_more_than_was_told(rows: int, columns: int) -> None:
    layer = nn.Linear(columns, rows)
    inputs = torch.randn(2 * columns, columns)
    hessian, scale = inputs.T @ inputs, torch.full([rows], 0.01)
    with PeakMemory() as memory, torch.no_grad():
        gptq.round_with_compensation(layer.weight, scale, hessian, 4)
    assert memory.peak <= gptq.rounding_bytes(layer) <= 1.4 * memory.peak


@pytest.mark.parametrize("room", [1.0, 1.3])
def test_rounding_keeps_a_limit_that_hardly_has_room_for_the_largest_layer(
    float_model: LoadedModel,
    recorded: CalibrationSet,
    qparams: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    room: float,
) -> None:
    every = qparams(4, 8)
    (names,) = gptq.chunks(float_model.denoiser, list(every))
    layers = [layer for name, layer in quantizable_layers(float_model.denoiser).items() if name in names]
    beside = size_bytes([layer.weight for layer in layers])
    held = held_bytes(float_model, recorded, RECIPE) + beside
    largest = max(gptq.hessian_bytes(layer) + gptq.rounding_bytes(layer) for layer in layers)
    limit = held + room * largest
    config = dataclasses.replace(CONFIG, recipe=dataclasses.replace(RECIPE, memory_limit_gb=limit / GIGABYTE))
    peaks = []
    compensate = gptq.compensate

    def watched(*args: Any, **options: Any) -> dict[str, Tensor]:
        with PeakMemory() as memory:
            found = compensate(*args, **options)
        peaks.append(memory.peak)
        return found

    monkeypatch.setattr(gptq, "compensate", watched)
    work = WorkDirectory(tmp_path / "work")
    work.open({}, resume=False, overwrite=False)
    parts.round_weights(float_model, recorded, every, config, work, lambda event: None)
    assert len(peaks) > 1
    assert held + max(peaks) <= limit
    too_little = dataclasses.replace(RECIPE, memory_limit_gb=(held + 0.9 * largest) / GIGABYTE)
    with pytest.raises(ConfigError, match=r"memory_limit_gb is .*, expected at least .*; raise it"):
        parts.plan_rounding(float_model, recorded, list(every), too_little)


def batch_sizes(module: nn.Module, run: Callable[[], object]) -> set[int]:
    """How many samples `module` was given in each of its calls."""
    sizes: set[int] = set()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        sizes.add(next(x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)).shape[0])

    handle = module.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run()
    finally:
        handle.remove()
    return sizes


def test_layers_are_chosen_by_the_same_damages_in_chunks(
    float_model: LoadedModel, recorded: CalibrationSet, qparams: Callable
) -> None:
    pairs = choose_pairs(recorded, steps=3, prompts=2)
    found: list[dict[str, Tensor]] = []
    sizes = []
    some = {name: qparams(4, 8)[name] for name in ("conv_in", "mid_block.resnets.0.conv1")}
    for at_once in (16, 2):
        damages: dict[str, Tensor] = {}
        measure = functools.partial(
            measure_damages, float_model.denoiser, recorded, some, {}, pairs, 3.0, damages, print
        )
        sizes.append(batch_sizes(float_model.denoiser, functools.partial(measure, at_once=at_once)))
        found.append(damages)
    # Two branches of six pairs, and of two.
    assert sizes == [{12}, {4}]
    for name, damage in found[0].items():
        torch.testing.assert_close(found[1][name], damage, rtol=1e-3, atol=0)


def test_groups_collapse_alike_in_chunks(
    float_model: LoadedModel, recorded: CalibrationSet, quantize_tiny: Callable
) -> None:
    found, sizes = [], []
    for at_once in (16, 1):
        student, _ = quantize_tiny(8, 8)

        def run(student: nn.Module = student, at_once: int = at_once) -> None:
            teacher, prompts = float_model.denoiser, torch.tensor([1, 3])
            found.append(collapse_groups(student, teacher, recorded, prompts, limit_db=0.5, at_once=at_once))

        sizes.append(batch_sizes(student, run))
    assert sizes == [{12}, {2}]
    assert found[0].collapsed == found[1].collapsed
    assert found[1].snr_db == pytest.approx(found[0].snr_db, abs=0.01)

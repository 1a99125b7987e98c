"""Memory: what a pass takes, slices that give the same gradients, and blocks that are computed twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from quest_deploy.errors import ConfigError
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import losses
from quest_deploy.quantize.calibrate import CalibrationSet, from_tensors
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.learned import quantized_once
from quest_deploy.quantize.losses import Draw, Objective
from quest_deploy.quantize.memory import (
    PassMemory,
    PeakMemory,
    cached_bytes,
    enable_checkpointing,
    limit_slices,
    pass_memory,
    size_bytes,
    temporal_memory,
    without_values,
)
from quest_deploy.quantize.trace import Trace
from quest_deploy.quantize.train import autocast
from quest_deploy.quantize.walk import fit_steps

GUIDANCE = 3.0
Make = Callable[[int, int], tuple[nn.Module, TimestepContext]]


@pytest.fixture
def student(quantize_tiny: Make) -> tuple[nn.Module, TimestepContext]:
    """The tiny model at W4A4, all of which learns."""
    denoiser, context = quantize_tiny(4, 4)
    return denoiser.requires_grad_(True), context


@pytest.fixture
def objective(recorded: CalibrationSet) -> Objective:
    steps = fit_steps(recorded, GUIDANCE)
    assert steps is not None
    return Objective(
        raw=torch.tensor([1.0, 2.0, 3.0]),
        walks=torch.tensor([0.5]),
        steps=steps,
        walk_length=2,
        walk_share=1.0,
        guidance_scale=GUIDANCE,
    )


@pytest.fixture
def drawn(recorded: CalibrationSet, objective: Objective) -> Draw:
    """Four pairs and three walks."""
    generator = torch.Generator().manual_seed(1)
    return losses.draw(recorded, torch.arange(4), objective, batch_size=4, num_walks=3, generator=generator)


def gradients(
    denoiser: nn.Module, data: CalibrationSet, objective: Objective, parts: list[Draw]
) -> dict[str, Tensor]:
    denoiser.zero_grad(set_to_none=True)
    for part in parts:
        losses.network_loss(denoiser, data, objective, part).backward()
    return {n: p.grad.clone() for n, p in denoiser.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # Codes may flip where sums are taken in another order; the tiny model has none that do.
        torch.testing.assert_close(got[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max() + 1e-6))


def test_slices_have_the_gradients_of_the_whole(student, recorded, objective, drawn) -> None:  # type: ignore[no-untyped-def]
    small = dataclasses.replace(objective, max_pairs=3, max_walks=2)
    parts = drawn.slices(small)
    assert [(p.prompt.numel(), p.walk_prompt.numel()) for p in parts] == [(3, 0), (1, 0), (0, 2), (0, 1)]
    whole = gradients(student[0], recorded, objective, [drawn])
    assert_same(gradients(student[0], recorded, small, parts), whole)


def test_shares_of_processes_have_the_gradients_of_the_whole(student, recorded, objective, drawn) -> None:  # type: ignore[no-untyped-def]
    whole = gradients(student[0], recorded, objective, [drawn])
    shares = [drawn.share(index, 3) for index in range(3)]
    assert_same(gradients(student[0], recorded, objective, shares), whole)


def test_what_fits_is_not_cut(drawn: Draw, objective: Objective) -> None:
    assert drawn.slices(dataclasses.replace(objective, max_pairs=8, max_walks=6)) == [drawn]


def test_a_pass_that_keeps_less_has_the_same_gradients_at_every_timestep(
    student, recorded, objective, drawn
) -> None:  # type: ignore[no-untyped-def]
    denoiser, context = student
    whole = gradients(denoiser, recorded, objective, [drawn])
    enable_checkpointing(denoiser, context)
    # Walks run it in one timestep group after the other before they go back.
    assert_same(gradients(denoiser, recorded, objective, [drawn]), whole)


@pytest.mark.thorough
def test_a_pass_that_keeps_less_takes_less(student, recorded, objective) -> None:  # type: ignore[no-untyped-def]
    denoiser, context = student
    before = pass_memory(denoiser, recorded, context, objective, walks=True)
    enable_checkpointing(denoiser, context)
    after = pass_memory(denoiser, recorded, context, objective, walks=True)
    assert after.each < 0.7 * before.each


@pytest.mark.parametrize(
    "walks",
    [pytest.param(False, id="pairs"), pytest.param(True, id="walks", marks=pytest.mark.thorough)],
)
def test_the_memory_of_a_pass_is_found_without_computing_it(student, recorded, objective, walks) -> None:  # type: ignore[no-untyped-def]
    denoiser, context = student
    found = pass_memory(denoiser, recorded, context, objective, walks=walks)
    none, two, start = torch.arange(0), torch.tensor([0, 1]), torch.tensor([0, 0])
    drawn = Draw(none, none, two, start, 1, 2) if walks else Draw(two, two, none, none, 2, 0)
    # Where nothing is computed, attention is its products, of which the CPU's own kernel keeps less.
    with PeakMemory() as memory, sdpa_kernel(SDPBackend.MATH):
        losses.network_loss(denoiser, recorded, objective, drawn).backward()
    assert 0.9 * memory.peak <= found.fixed + 2 * found.each <= 1.2 * memory.peak


@pytest.mark.thorough
def test_the_memory_of_an_update_has_the_weights_that_its_passes_share(student, recorded, objective) -> None:  # type: ignore[no-untyped-def]
    """Blocks that are computed twice keep little else."""
    denoiser, context = student
    enable_checkpointing(denoiser, context)
    found = pass_memory(denoiser, recorded, context, objective, walks=False, most=2, passes=2)
    none, two = torch.arange(0), torch.arange(2)
    drawn = Draw(two, two, none, none, 2, 0)
    layers = quantized_layers(denoiser).values()
    with PeakMemory() as memory, sdpa_kernel(SDPBackend.MATH), quantized_once(layers):
        for _ in range(2):
            losses.network_loss(denoiser, recorded, objective, drawn).backward()
    assert found.fixed + 2 * found.each == pytest.approx(memory.peak, rel=0.1)


def test_weights_that_do_not_learn_are_kept_beside_a_pass(student, recorded, objective) -> None:  # type: ignore[no-untyped-def]
    denoiser, context = student
    denoiser.requires_grad_(False)
    quantized_layers(denoiser)["conv_in"].weight.requires_grad_(True)
    found = pass_memory(denoiser, recorded, context, objective, walks=False, most=2)
    none, few = torch.arange(0), torch.arange(4)
    for _ in range(2):
        with PeakMemory() as memory, sdpa_kernel(SDPBackend.MATH):
            losses.network_loss(
                denoiser, recorded, objective, Draw(few, few % 3, none, none, 4, 0)
            ).backward()
    assert found.fixed + 4 * found.each == pytest.approx(memory.peak, rel=0.1)
    kept = [layer._cached for layer in quantized_layers(denoiser).values()]
    assert kept.count(None) == 1
    assert cached_bytes(denoiser) == size_bytes([cached[1] for cached in kept if cached is not None])


@pytest.mark.parametrize("count", [16, 256])
def test_the_memory_of_the_temporal_loss_is_found_without_computing_it(  # type: ignore[no-untyped-def]
    student, float_model: LoadedModel, recorded: CalibrationSet, traced: Trace, count: int
) -> None:
    denoiser, context = student
    found = temporal_memory(denoiser, float_model.denoiser, traced, recorded, context, count)
    timestep = torch.linspace(0, 999, count)
    conditioning = losses.temporal_conditioning(traced, recorded, count, torch.Generator())
    with PeakMemory() as memory:
        losses.temporal_loss(
            denoiser, float_model.denoiser, traced, timestep, conditioning, context
        ).backward()
    assert 0.9 * memory.peak <= found <= 1.1 * memory.peak
    assert all(p.grad is not None for n, p in denoiser.named_parameters() if n.startswith("time_embedding"))


def test_measuring_leaves_the_student_alone(student, recorded, objective) -> None:  # type: ignore[no-untyped-def]
    denoiser, context = student
    before = {name: value.clone() for name, value in denoiser.state_dict().items()}
    group = context.group
    pass_memory(denoiser, recorded, context, objective, walks=False)
    assert context.group is group
    assert all(torch.equal(value, before[name]) for name, value in denoiser.state_dict().items())
    assert all(p.grad is None for p in denoiser.parameters())


def test_peak_memory_forgets_what_is_gone() -> None:
    with PeakMemory() as memory:
        for _ in range(3):
            a = torch.ones(1000)
            b = a + 1
            del a, b
    assert (memory.live, memory.peak) == (0, 8000)


def test_slices_fill_the_limit() -> None:
    gb = 10**9
    pairs, walks = PassMemory(fixed=gb, each=gb), PassMemory(fixed=2 * gb, each=3 * gb)
    assert limit_slices(gb, 10.0, pairs, walks) == (8, 2)


def test_a_limit_below_one_pair_is_refused_with_what_is_needed() -> None:
    gb = 10**9
    pairs, walks = PassMemory(fixed=gb, each=gb), PassMemory(fixed=2 * gb, each=3 * gb)
    with pytest.raises(ConfigError, match=r"memory_limit_gb is 5, expected at least 6 for .* raise it"):
        limit_slices(gb, 5.0, pairs, walks)


@pytest.mark.parametrize(
    ("needed_bytes", "told"), [(4_215_001, "0.00422"), (1_000_000_000, "1"), (23_456_789_012, "23.5")]
)
def test_what_is_needed_is_told_however_little(needed_bytes: int, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"memory_limit_gb is 1e-05, expected at least {told} for"):
        limit_slices(needed_bytes - 1, 1e-5, PassMemory(fixed=0, each=1), None)


def test_codes_are_the_same_in_bfloat16(student, recorded) -> None:  # type: ignore[no-untyped-def]
    denoiser, context = student
    layer = quantized_layers(denoiser)["conv_in"]
    x = recorded.latents[:, 0]
    context.set_timestep(torch.tensor([500.0]))
    exact = layer(x)
    with autocast(torch.device("cpu"), "bfloat16"):
        rounded = layer(x)
    # Eight bits of each sum; a value on another code would be off by a step of the grid.
    torch.testing.assert_close(rounded, exact, rtol=2**-8, atol=2**-8 * float(exact.detach().abs().max()))


@pytest.mark.parametrize("groups", ["each", "one"])
def test_a_layer_learns_nearly_the_same_in_bfloat16(student, recorded, groups: str) -> None:  # type: ignore[no-untyped-def]
    denoiser, context = student
    layer = quantized_layers(denoiser)["conv_in"]
    if groups == "one":
        layer.quantizer.set_group_scale(layer.quantizer.group_scale()[:1])
    context.set_timestep(torch.tensor([500.0]))
    found = []
    for precision in ("float32", "bfloat16"):
        layer.zero_grad(set_to_none=True)
        with autocast(torch.device("cpu"), precision):
            loss = layer(recorded.latents[:, 0]).square().mean()
        loss.backward()
        found.append({name: p.grad.clone() for name, p in layer.named_parameters()})
    scale = found[0].pop("quantizer.log_scale")
    # Two sums, each of the loss's size, cancel in a scale's gradient: their rounding is what is left.
    assert float((found[1]["quantizer.log_scale"] - scale).abs().max()) < 2**-8 * float(loss.detach())
    for name, value in found[0].items():
        assert float((found[1][name] - value).norm()) < 0.03 * float(value.norm()), name


def test_recomputed_targets_are_the_recorded_ones(float_model, recorded: CalibrationSet) -> None:  # type: ignore[no-untyped-def]
    tensors = recorded.tensors()
    del tensors["targets"]
    again = from_tensors(tensors, teacher=float_model.denoiser)
    at = torch.tensor([0, 2]), torch.tensor([1, 2])
    assert tuple(again.targets.shape) == tuple(recorded.targets.shape)
    torch.testing.assert_close(again.targets[at], recorded.targets[at], rtol=1e-4, atol=1e-5)


def test_a_copy_without_values_shares_nothing_but_the_context(student) -> None:  # type: ignore[no-untyped-def]
    denoiser, context = student
    bare = without_values(denoiser, context)
    assert {p.device.type for p in bare.parameters()} == {"meta"}
    assert quantized_layers(bare)["conv_in"].context is context

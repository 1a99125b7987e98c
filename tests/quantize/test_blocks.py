"""Parts of a denoiser: that they are all of it, in order, and given what the quantized network gives them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import blocks
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.layers import TimestepContext

Make = Callable[[int, int], tuple[nn.Module, TimestepContext]]
RESNET = "mid_block.resnets.0"
TRANSFORMER = "mid_block.attentions.0.transformer_blocks.0"


@pytest.fixture
def student(quantize_tiny: Make) -> nn.Module:
    return quantize_tiny(4, 4)[0]


@pytest.fixture
def run(student: nn.Module, recorded: CalibrationSet) -> Callable[[], object]:
    run, _ = next(blocks.passes(student, recorded, blocks.chosen_pairs(recorded, 2, 0)))
    return run


def test_every_quantized_layer_is_in_exactly_one_part(student: nn.Module) -> None:
    names = blocks.parts(student)
    for layer in quantized_layers(student):
        assert sum(layer == name or layer.startswith(f"{name}.") for name in names) == 1


def test_residual_and_transformer_blocks_are_parts_and_what_is_left_is_single(student: nn.Module) -> None:
    names = blocks.parts(student)
    assert {
        RESNET,
        TRANSFORMER,
        "conv_in",
        "time_embedding.linear_1",
        "mid_block.attentions.0.proj_in",
    } <= set(names)
    assert not any(".attn1" in name or ".conv1" in name for name in names)


def test_parts_come_in_the_order_in_which_the_network_runs(
    quantize_tiny: Make, recorded: CalibrationSet
) -> None:
    student, context = quantize_tiny(4, 4)
    names = list(blocks.shapes_of(student, recorded, context))
    assert set(names) == set(blocks.parts(student))
    assert names[0] == "time_embedding.linear_1"
    assert names[-1] == "conv_out"
    assert names.index("conv_in") < names.index("down_blocks.0.resnets.0") < names.index(RESNET)


def test_parts_that_are_not_run_are_left_out(quantize_tiny: Make, recorded: CalibrationSet) -> None:
    student, context = quantize_tiny(4, 4)
    student.idle = copy.deepcopy(student.get_submodule("conv_out"))
    assert "idle" in blocks.parts(student)
    assert "idle" not in blocks.shapes_of(student, recorded, context)


@pytest.mark.parametrize("name", [RESNET, TRANSFORMER, "conv_out"])
def test_shapes_are_those_of_the_samples(
    quantize_tiny: Make, float_model: LoadedModel, recorded: CalibrationSet, name: str
) -> None:
    student, context = quantize_tiny(4, 4)
    shapes = blocks.shapes_of(student, recorded, context)[name]
    pairs = blocks.chosen_pairs(recorded, 4, 0)
    samples = blocks.collect(student, float_model.denoiser, name, recorded, pairs)
    per_sample = samples.size_bytes / samples.timestep.numel()
    assert shapes.size_bytes / shapes.timestep.numel() == pytest.approx(per_sample)


@pytest.mark.parametrize("name", [RESNET, TRANSFORMER, "conv_out"])
@torch.no_grad()
def test_a_part_is_given_what_the_quantized_network_gives_it(
    student: nn.Module, float_model: LoadedModel, recorded: CalibrationSet, name: str
) -> None:
    pairs = blocks.chosen_pairs(recorded, 2, 0)
    samples = blocks.collect(student, float_model.denoiser, name, recorded, pairs)
    expected: list[Tensor] = []
    handle = student.get_submodule(name).register_forward_hook(
        lambda module, args, output: expected.append(output)
    )
    for run, _ in blocks.passes(student, recorded, pairs):
        run()
    handle.remove()
    contexts = {id(layer.context): layer.context for layer in quantized_layers(student).values()}
    (context,) = contexts.values()
    context.set_timestep(samples.timestep)
    again = student.get_submodule(name)(*samples.args, **samples.kwargs)
    torch.testing.assert_close(again, torch.cat(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_targets_are_of_full_precision(
    student: nn.Module, float_model: LoadedModel, recorded: CalibrationSet
) -> None:
    pairs = blocks.chosen_pairs(recorded, 2, 0)
    samples = blocks.collect(student, float_model.denoiser, "conv_out", recorded, pairs)
    expected = [recorded.batch(prompt, torch.full_like(prompt, step))[-1] for prompt, step in pairs]
    torch.testing.assert_close(samples.targets[0], torch.cat(expected), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_pass_ends_where_the_part_is_reached_and_leaves_no_hook(
    student: nn.Module, run: Callable[[], object]
) -> None:
    late: list[int] = []
    handle = student.get_submodule("conv_out").register_forward_pre_hook(lambda *_: late.append(1))
    blocks.given(student, "conv_in", run)
    blocks.answered(student, "conv_in", run)
    handle.remove()
    assert late == []
    module = student.get_submodule("conv_in")
    assert not module._forward_pre_hooks and not module._forward_hooks


def test_a_batch_takes_samples_and_leaves_what_all_of_them_share() -> None:
    shared = torch.arange(5.0)
    samples = blocks.Samples((torch.arange(3.0), shared), {"mask": None}, torch.arange(3.0), (torch.eye(3),))
    taken = samples.batch(torch.tensor([2, 0]))
    assert taken.args[0].tolist() == taken.timestep.tolist() == [2.0, 0.0]
    assert taken.args[1] is shared and taken.kwargs == {"mask": None}
    assert torch.equal(taken.targets[0], torch.eye(3)[[2, 0]])


def test_a_batch_takes_all_rows_of_a_sample_and_leaves_what_all_of_them_share() -> None:
    rows, tokens = torch.arange(6.0), torch.arange(12.0)
    samples = blocks.Samples((rows, tokens), {}, torch.arange(3.0), (10 * rows,))
    taken = samples.batch(torch.tensor([2, 0]))
    assert taken.args[0].tolist() == [4.0, 5.0, 0.0, 1.0]
    assert taken.targets[0].tolist() == [40.0, 50.0, 0.0, 10.0]
    assert taken.args[1] is tokens

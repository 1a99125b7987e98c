"""Finetuning: what learns, what stays, and that nothing ends worse than it began."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from quest_deploy.config import PhaseConfig
from quest_deploy.model.components import predict
from quest_deploy.quantize import learned, losses, train
from quest_deploy.quantize.insert import quantized_layers
from tests.quantize.conftest import GUIDANCE


def phase(**changes: Any) -> PhaseConfig:
    base = {"layers": "all", "steps": 4, "batch_size": 2, "learning_rate_floats": 1e-4}
    return PhaseConfig(**(base | changes))


def run(
    task: train.Task,
    phase: PhaseConfig,
    *,
    temporal: bool = False,
    after_step: Callable[[train.TrainState, torch.optim.Adam], None] = lambda state, optimizer: None,
    resumed: tuple[dict[str, Tensor], dict[str, Any]] | None = None,
) -> train.TrainState:
    optimizer = train.make_optimizer(
        train.trainable(task.student, phase, task.trace.roles, temporal=temporal)
    )
    state = train.TrainState()
    if resumed is not None:
        train.restore(state, optimizer, *resumed)
    train.run_phase(
        task,
        phase,
        state,
        optimizer,
        temporal=temporal,
        after_step=lambda state, loss: after_step(state, optimizer),
    )
    return state


def parameters(task: train.Task) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in task.student.named_parameters()}


def test_the_start_costs_one(task: train.Task) -> None:
    assert task.validation_loss() == pytest.approx(1.0, rel=1e-4)


def test_a_validation_quantizes_each_weight_that_learns_once(
    task: train.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    train.trainable(task.student, phase(), task.trace.roles, temporal=False)
    expected, quantized = task.validation_loss(), []
    original = learned.weight
    monkeypatch.setattr(learned, "weight", lambda *args: quantized.append(1) or original(*args))
    assert task.validation_loss() == expected
    learning = [layer for layer in quantized_layers(task.student).values() if layer.weight_learns()]
    assert len(quantized) == len(learning) > 0
    assert all(layer.shared is None for layer in learning)


def test_the_start_costs_one_in_the_geometric_mean_too(task: train.Task) -> None:
    objective = losses.make_objective(
        task.student,
        task.data,
        task.validation,
        task.objective.steps,
        walk_length=2,
        walk_share=1.0,
        guidance_scale=GUIDANCE,
        geometric=True,
    )
    geometric = dataclasses.replace(task, objective=objective)
    # Steps count alike in both terms, but walks of a whole trajectory are fewer than those that were averaged.
    assert geometric.validation_loss() == pytest.approx(1.0, rel=1e-4)
    run(geometric, phase(steps=3))
    assert geometric.validation_loss() < 1.0


def test_one_bad_error_decides_the_arithmetic_mean_alone() -> None:
    errors = torch.tensor([[1.0], [1.0], [1.0], [1e4]])
    assert float(1 / losses.one_over(errors, geometric=False)) == pytest.approx(2500.75)
    assert float(1 / losses.one_over(errors, geometric=True)) == pytest.approx(10.0)


@pytest.mark.parametrize(
    ("temporal", "low_rank"),
    [(True, None), (False, None), (False, 2)],
    ids=["temporal", "sensitive", "low rank"],
)
def test_an_absurd_learning_rate_never_ends_worse_than_the_start(
    task: train.Task, temporal: bool, low_rank: int | None
) -> None:
    before, loss = parameters(task), task.validation_loss()
    absurd = {"learning_rate_weights": 1e4, "learning_rate_scales": 50.0, "learning_rate_floats": 1e3}
    state = run(task, phase(**absurd, low_rank=low_rank), temporal=temporal)
    assert task.validation_loss() == loss
    assert state.best_loss == loss
    assert all(torch.equal(value, before[name]) for name, value in parameters(task).items())


@pytest.mark.thorough
def test_walks_are_learned_from(task: train.Task) -> None:
    with_walks = phase(steps=1, walks=2)
    first, second = (run_one(task, plan) for plan in (with_walks, dataclasses.replace(with_walks, walks=0)))
    assert any(not torch.equal(value, second[name]) for name, value in first.items())


def run_one(task: train.Task, plan: PhaseConfig) -> dict[str, Tensor]:
    """Gradients of one update."""
    groups = train.trainable(task.student, plan, task.trace.roles, temporal=False)
    gradients: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    drawn = losses.draw(
        task.data,
        task.training,
        task.objective,
        batch_size=plan.batch_size,
        num_walks=plan.walks,
        generator=generator,
    )
    loss = losses.network_loss(task.student, task.data, task.objective, drawn)
    for name, parameter in train.learned(groups).items():
        gradients[name] = torch.autograd.grad(loss, parameter, retain_graph=True)[0]
    return gradients


def test_finetuning_lowers_the_loss_on_prompts_it_was_not_trained_on(task: train.Task) -> None:
    state = run(task, phase(steps=12, batch_size=3, learning_rate_scales=0.01))
    assert task.validation_loss() == state.best_loss < 0.98


def test_the_temporal_phase_lowers_the_error_of_the_temporal_layers(task: train.Task) -> None:
    timestep = torch.linspace(0, 999, 50)

    def local_loss() -> float:
        with torch.no_grad():
            return float(
                losses.temporal_loss(task.student, task.teacher, task.trace, timestep, {}, task.context)
            )

    before = local_loss()
    run(task, phase(layers="temporal", steps=10, learning_rate_scales=0.01, network_every=5), temporal=True)
    assert local_loss() < before


@pytest.mark.parametrize("temporal", [True, False], ids=["temporal", "sensitive"])
def test_each_phase_learns_the_activation_scales_of_its_own_layers(task: train.Task, temporal: bool) -> None:
    still = phase(layers="none", learning_rate_floats=0.0)
    groups = train.trainable(task.student, still, task.trace.roles, temporal=temporal)
    expected = {
        f"{name}.quantizer.log_scale"
        for name in quantized_layers(task.student)
        if (task.trace.roles[name] == "temporal") == temporal
    }
    assert set(train.learned(groups)) == expected


def test_what_a_phase_does_not_name_keeps_its_bits(task: train.Task) -> None:
    before = parameters(task)
    run(
        task,
        phase(layers="paper-sd", steps=12, batch_size=3, learning_rate_scales=0.01, learning_rate_floats=0.0),
    )
    changed = {name for name, value in parameters(task).items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".ff.net." in name or name.endswith("quantizer.log_scale") for name in changed)


def test_in_low_rank_the_weights_move_by_a_product_of_that_rank(task: train.Task) -> None:
    names = {name for name, _ in task.student.named_parameters()}
    layer = quantized_layers(task.student)["mid_block.resnets.0.conv1"]
    before = layer.weight.clone()
    run(task, phase(low_rank=2, learning_rate_scales=0.0, learning_rate_floats=0.0, layers="mid_block.*"))
    moved = (layer.weight - before).flatten(1)
    assert torch.linalg.matrix_rank(moved, rtol=1e-3) == 2
    # The product is merged: what is saved and exported is as without it.
    assert {name for name, _ in task.student.named_parameters()} == names


def test_low_rank_lowers_the_loss_as_well(task: train.Task) -> None:
    state = run(task, phase(steps=12, batch_size=3, learning_rate_scales=0.01, low_rank=4))
    assert task.validation_loss() == pytest.approx(state.best_loss, rel=1e-4)
    assert state.best_loss < 0.98


def test_low_rank_learns_no_other_weights(task: train.Task) -> None:
    whole = set(train.learned(train.trainable(task.student, phase(), task.trace.roles, temporal=False)))
    low = set(
        train.learned(train.trainable(task.student, phase(low_rank=2), task.trace.roles, temporal=False))
    )
    layers = quantized_layers(task.student)
    assert whole - low == {f"{name}.weight" for name in layers}
    assert low - whole == {f"{name}.low_rank_{factor}" for name in layers for factor in "ab"}


def test_a_rate_of_zero_leaves_its_tensors_alone(task: train.Task) -> None:
    still = phase(learning_rate_weights=0.0, learning_rate_scales=0.0)
    names = train.learned(train.trainable(task.student, still, task.trace.roles, temporal=False))
    assert names
    assert all(name.endswith(("bias", "norm1.weight", "norm2.weight")) or "norm" in name for name in names)


@pytest.mark.parametrize(
    ("stop", "temporal", "low_rank"),
    [(1, True, None), (3, True, None), (1, False, None), (3, False, None), (3, False, 2)],
)
def test_going_on_from_a_snapshot_ends_in_the_same_bits(
    task: train.Task, stop: int, temporal: bool, low_rank: int | None
) -> None:
    start, taken = parameters(task), []

    def take(state: train.TrainState, optimizer: torch.optim.Adam) -> None:
        if state.step == stop:
            tensors, facts = train.snapshot(state, optimizer)
            copies = {name: tensor.detach().clone() for name, tensor in tensors.items()}
            taken.append((copies, json.loads(json.dumps(facts))))

    whole = run(task, phase(low_rank=low_rank), temporal=temporal, after_step=take)
    expected = parameters(task)
    with torch.no_grad():
        for name, value in task.student.named_parameters():
            value.copy_(start[name])
    resumed = run(task, phase(low_rank=low_rank), temporal=temporal, resumed=taken[0])
    assert resumed.losses == whole.losses
    assert all(torch.equal(value, expected[name]) for name, value in parameters(task).items())


@torch.no_grad()
def test_the_temporal_path_alone_gives_what_the_whole_network_computes(task: train.Task) -> None:
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: seen.append(output))
        for name, module in task.student.named_modules()
        if name == "time_embedding" or name.endswith("time_emb_proj")
    ]
    sample, timestep, conditioning, _ = task.data.batch(torch.tensor([0, 1]), torch.tensor([0, 2]))
    predict(task.student, sample, timestep, conditioning)
    for hook in hooks:
        hook.remove()
    alone = task.trace.temporal_outputs(task.student, timestep, {}, task.context)
    # The network computes them in the order in which it runs, not in that of its modules.
    assert len(alone) == len(seen) > 1
    for output in alone:
        assert any(output.shape == other.shape and torch.equal(output, other) for other in seen)


def test_a_denoiser_has_no_temporal_error_against_itself(task: train.Task) -> None:
    timestep = torch.linspace(0, 999, 20)
    loss = losses.temporal_loss(task.teacher, task.teacher, task.trace, timestep, {}, task.context)
    assert float(loss) == 0.0


def test_default_settings_give_the_bits_of_the_plain_path(
    task: train.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, start = phase(steps=3, walks=1), parameters(task)
    better = iter([0.0, -1.0, -2.0, -3.0])
    monkeypatch.setattr(train.Task, "validation_loss", lambda task: next(better))
    run(task, plan)
    got = parameters(task)
    with torch.no_grad():
        for name, value in task.student.named_parameters():
            value.copy_(start[name])
    plain(task, plan)
    assert all(torch.equal(value, got[name]) for name, value in parameters(task).items())


def test_walks_and_pairs_share_the_first_answer_and_their_loss_is_that_of_each(task: train.Task) -> None:
    """Asked together or apart, the network gives the same loss and gradients but for rounding."""
    known, generator = (task.data, task.training, task.objective), torch.Generator().manual_seed(0)
    drawn = losses.draw(*known, batch_size=3, num_walks=2, generator=generator)
    train.trainable(task.student, phase(), task.trace.roles, temporal=False)
    none = drawn.prompt[:0]
    apart = [
        dataclasses.replace(drawn, walk_prompt=none, walk_start=none),
        dataclasses.replace(drawn, prompt=none, step=none),
    ]
    found = []
    for parts in ([drawn], apart):
        task.student.zero_grad(set_to_none=True)
        loss = sum(losses.network_loss(task.student, task.data, task.objective, part) for part in parts)
        assert isinstance(loss, Tensor)
        loss.backward()
        grads = [p.grad.flatten() for p in task.student.parameters() if p.grad is not None]
        found.append((loss.detach(), torch.cat(grads)))
    (together, gradient), (sum_of_parts, sum_of_gradients) = found
    torch.testing.assert_close(together, sum_of_parts, rtol=1e-4, atol=0)
    assert (gradient - sum_of_gradients).norm() <= 1e-2 * sum_of_gradients.norm() > 0


def plain(task: train.Task, plan: PhaseConfig) -> None:
    """The updates of the sensitive phase as one loop, without slices, processes or precisions."""
    optimizer = train.make_optimizer(train.trainable(task.student, plan, task.trace.roles, temporal=False))
    data, objective = task.data, task.objective
    for update in range(plan.steps):
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * update / plan.steps))
            group["lr"] = group["base_lr"] * (0.05 + 0.95 * cosine)
        optimizer.zero_grad(set_to_none=True)
        generator = torch.Generator().manual_seed((task.seed << 24) + update)
        with learned.quantized_once(quantized_layers(task.student).values()):
            prompt, step = losses.draw_pairs(
                task.training, data.timesteps.numel(), plan.batch_size, generator
            )
            starting, start = losses.draw_pairs(task.training, objective.walks.numel(), plan.walks, generator)
            # The network is asked once for the pairs and for where the walks start.
            inputs = data.inputs(torch.cat([prompt, starting]), torch.cat([step, start]))
            output = predict(task.student, *inputs)
            negative, positive = output.split(plan.batch_size + plan.walks)
            of_pairs = torch.cat([negative[: plan.batch_size], positive[: plan.batch_size]])
            of_walks = torch.cat([negative[plan.batch_size :], positive[plan.batch_size :]])
            errors = losses.raw_errors(task.student, data, prompt, step, of_pairs)
            raw = (objective.raw[step] * errors).mean()
            ends = losses.walks(task.student, data, objective, starting, start, of_walks)
            walked = (objective.walks[start] * ends).mean()
            loss = (raw + objective.walk_share * walked) / (1 + objective.walk_share)
            loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("temporal", "answered"), [(True, 1), (False, 3)])
def test_the_sensitive_phase_uses_the_networks_output_at_every_update(
    task: train.Task, monkeypatch: pytest.MonkeyPatch, temporal: bool, answered: int
) -> None:
    asked: list[int] = []
    original = losses.network_loss
    monkeypatch.setattr(train.Task, "validation_loss", lambda task: 1.0)
    monkeypatch.setattr(losses, "network_loss", lambda *given: asked.append(1) or original(*given))
    run(task, phase(steps=3, walks=0, network_every=3), temporal=temporal)
    assert len(asked) == answered


@pytest.mark.parametrize(
    ("patience", "found", "ends"),
    [
        (0, [1.0, 2.0, 3.0, 4.0], False),
        (2, [1.0, 0.5, 2.0], False),
        (2, [1.0, 0.5, 2.0, 0.6], True),
        (1, [1.0], False),
    ],
)
def test_a_phase_ends_where_validations_find_nothing_better(
    patience: int, found: list[float], ends: bool
) -> None:
    state = train.TrainState(step=3, losses=list(enumerate(found)))
    assert train.finished(phase(steps=9, patience=patience), state) is ends

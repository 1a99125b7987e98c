"""Numbers that are not finite: where they would come from, and that they are told."""

from __future__ import annotations

import copy

import pytest
import torch

from quest_deploy.config import PhaseConfig
from quest_deploy.quantize import losses, train
from quest_deploy.quantize.insert import quantized_layers

PLAN = PhaseConfig(layers="all", steps=8)


def test_layers_of_time_that_answer_zero_leave_the_others_their_loss(task: train.Task) -> None:
    """As those of blocks that were never trained do."""
    teacher, timestep = copy.deepcopy(task.teacher), torch.linspace(0, 999, 5)
    name = next(end for end in task.trace.ends if end.endswith("time_emb_proj"))
    with torch.no_grad():
        for module in (teacher, task.student):
            for parameter in (module.get_submodule(name).weight, module.get_submodule(name).bias):
                parameter.zero_()
    groups = train.trainable(task.student, PLAN, task.trace.roles, temporal=True)
    loss = losses.temporal_loss(task.student, teacher, task.trace, timestep, {}, task.context)
    loss.backward()
    assert 0 < loss < 1
    assert all(
        tensor.grad is None or tensor.grad.isfinite().all() for tensor in train.learned(groups).values()
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_broken_scale_is_found(task: train.Task, value: float) -> None:
    assert train.quantizers_are_finite(task.student)
    with torch.no_grad():
        quantized_layers(task.student)["conv_out"].quantizer.log_scale[1] = value
    assert not train.quantizers_are_finite(task.student)


@pytest.mark.parametrize("temporal", [True, False], ids=["temporal", "sensitive"])
def test_a_loss_that_is_not_finite_is_told_and_ends_the_phase_with_its_best(
    task: train.Task, temporal: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found, judged = iter([0.5, 0.4, float("nan")]), iter([1.0, 0.9, 0.8])
    monkeypatch.setattr(train, "_backpropagate", lambda *args, **options: next(found))
    monkeypatch.setattr(train.Task, "validation_loss", lambda task: next(judged))
    groups = train.trainable(task.student, PLAN, task.trace.roles, temporal=temporal)
    state = train.TrainState()
    train.run_phase(
        task,
        PLAN,
        state,
        train.make_optimizer(groups),
        temporal=temporal,
        after_step=lambda state, loss: None,
    )
    assert (state.step, state.best_loss, state.broken_at) == (2, 0.8, 3)
    name = "temporal" if temporal else "sensitive"
    assert f"the training loss of the {name} phase is nan at update 3 of 8" in caplog.text
    assert "lower its learning rates" in caplog.text

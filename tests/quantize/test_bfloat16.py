"""Finetuning in bfloat16: what stays exact."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.config import PhaseConfig
from quest_deploy.quantize import losses, train
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.trace import Trace


def test_layers_of_time_are_held_to_full_precision(task: train.Task, monkeypatch: pytest.MonkeyPatch) -> None:
    timestep = torch.linspace(0, 999, 20)
    expected = task.trace.temporal_outputs(task.teacher, timestep, {}, None)
    answered: list[list[Tensor]] = []
    original = Trace.temporal_outputs

    def watched(trace: Trace, denoiser: nn.Module, *args: object) -> list[Tensor]:
        answered.append(original(trace, denoiser, *args))  # type: ignore[arg-type]
        return answered[-1]

    monkeypatch.setattr(Trace, "temporal_outputs", watched)
    with train.autocast(torch.device("cpu"), "bfloat16"):
        losses.temporal_loss(task.student, task.teacher, task.trace, timestep, {}, task.context)
    for target, exact in zip(answered[0], expected, strict=True):
        assert torch.equal(target, exact) and target.dtype == torch.float32


def test_validations_judge_the_low_rank_weights_that_are_kept(
    task: train.Task, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, generator = PhaseConfig(layers="all", steps=1, low_rank=4), torch.Generator().manual_seed(0)
    train.trainable(task.student, plan, task.trace.roles, temporal=False)
    layers = {name: layer for name, layer in quantized_layers(task.student).items() if layer.weight_learns()}
    judged: dict[str, Tensor] = {}
    with torch.no_grad():
        for layer in layers.values():
            far = 3 * float(layer.weight_scale().mean())
            layer.low_rank_b.copy_(far * torch.randn(layer.low_rank_b.shape, generator=generator))

    def judge(*args: object) -> float:
        judged.update({name: layer.quantized_weight() for name, layer in layers.items()})
        return 1.0

    monkeypatch.setattr(losses, "total_loss", judge)
    dataclasses.replace(task, precision="bfloat16").validation_loss()
    for layer in layers.values():
        layer.merge_low_rank()
    assert judged and all(
        torch.equal(judged[name], layer.quantized_weight()) for name, layer in layers.items()
    )

"""What the losses of finetuning are given."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from quest_deploy.quantize import losses, train
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.parallel import ALONE
from quest_deploy.quantize.trace import Trace


def test_of_what_networks_are_told_only_what_layers_of_time_read_is_gathered(
    traced: Trace, recorded: CalibrationSet
) -> None:
    read, unread = torch.arange(6.0).reshape(3, 2), torch.zeros(3, 77, 8, device="meta")
    trace = dataclasses.replace(traced, conditions=frozenset({"pooled"}))
    told = {"pooled": read, "tokens": unread}
    nothing = {"pooled": torch.full((1, 2), -1.0), "tokens": unread[:1]}
    data = dataclasses.replace(recorded, latents=recorded.latents[:3], positive=told, negative=nothing)
    rows = losses.temporal_conditioning(trace, data, 64, torch.Generator().manual_seed(0))
    assert rows.keys() == {"pooled"} and rows["pooled"].shape == (64, 2)
    assert {tuple(row) for row in rows["pooled"].tolist()} == {
        (0.0, 1.0),
        (2.0, 3.0),
        (4.0, 5.0),
        (-1.0, -1.0),
    }


def test_layers_of_time_learn_from_training_prompts_alone(
    traced: Trace, recorded: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = dataclasses.replace(traced, conditions=frozenset({"pooled"}))
    data = dataclasses.replace(recorded, positive={"pooled": torch.arange(4.0)[:, None]}, negative={})
    seen: list[Tensor] = []

    def keep(
        student: object, teacher: object, trace: Trace, timestep: Tensor, told: dict, context: object
    ) -> Tensor:
        seen.append(told["pooled"])
        return torch.zeros(())

    monkeypatch.setattr(losses, "temporal_loss", keep)
    task = SimpleNamespace(
        student=None,
        teacher=None,
        trace=trace,
        data=data,
        training=torch.tensor([0, 2]),
        context=None,
        last_time=999.0,
        workers=ALONE,
    )
    train._temporal_term(task, torch.Generator().manual_seed(0))()  # type: ignore[arg-type]
    assert set(seen[0].flatten().tolist()) == {0.0, 2.0}

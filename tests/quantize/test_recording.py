"""What is recorded of the quantized network's own trajectories, and what finetuning takes from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from quest_deploy.config import FinetuneConfig, PhaseConfig
from quest_deploy.errors import ConfigError
from quest_deploy.model.components import predict
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import calibrate, losses, recording, train
from quest_deploy.quantize.calibrate import CalibrationSet, record_trajectories
from quest_deploy.quantize.estimate import estimate
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.resume import WorkDirectory
from tests.quantize.limited_run import RECIPE

Quantize = Callable[[int, int], tuple[nn.Module, TimestepContext]]
PHASE = PhaseConfig(layers="all", steps=1, batch_size=4, walks=1)
OWN = dataclasses.replace(
    RECIPE,
    calibration_prompts=4,
    validation_prompts=2,
    calibration_steps=3,
    on_policy_prompts=2,
    sensitive=PHASE,
)
SETTINGS: dict[str, Any] = {"steps": 3, "guidance_scale": 3.0, "batch_size": 2}


def config_of(**changes: Any) -> FinetuneConfig:
    return FinetuneConfig(recipe=dataclasses.replace(OWN, **changes), prompts=("a", "b", "c", "d"), seed=5)


def recorded_with(model: LoadedModel, config: FinetuneConfig, work: WorkDirectory) -> CalibrationSet:
    return recording.record(model, config, work, lambda event: None)


@torch.no_grad()
def test_the_sampler_follows_one_denoiser_and_the_answers_are_the_others(
    float_model: LoadedModel, quantize_tiny: Quantize
) -> None:
    student, _ = quantize_tiny(4, 4)
    plain = record_trajectories(float_model, ["a", "b"], seed=0, **SETTINGS)
    own = record_trajectories(float_model, ["a", "b"], seed=0, follow=student, **SETTINGS)
    assert torch.equal(own.latents[:, 0], plain.latents[:, 0])
    assert torch.equal(own.targets[:, 0], plain.targets[:, 0])
    assert not torch.allclose(own.latents[:, 1], plain.latents[:, 1], atol=1e-3)
    sample, timestep, told, target = own.batch(torch.tensor([0, 1]), torch.tensor([2, 2]))
    assert torch.equal(predict(float_model.denoiser, sample, timestep, told), target)
    # Where the answers are followed that are kept, nothing changes.
    teacher = record_trajectories(float_model, ["a", "b"], seed=0, follow=float_model.denoiser, **SETTINGS)
    assert torch.equal(teacher.latents, plain.latents)


@pytest.mark.parametrize("targets", ["memory", "disk", "recompute"])
def test_own_trajectories_come_after_the_recorded_ones_and_are_drawn_once(
    float_model: LoadedModel,
    quantize_tiny: Quantize,
    work: WorkDirectory,
    monkeypatch: pytest.MonkeyPatch,
    targets: str,
) -> None:
    student, context = quantize_tiny(4, 4)
    config = config_of(targets=targets)
    data = recorded_with(float_model, config, work)
    found = recording.record_own(float_model, student, context, data, config, work, lambda event: None)
    assert found.num_prompts == 6
    everything = torch.arange(6)[:, None].expand(6, 3).flatten(), torch.arange(3).repeat(6)
    of_data = everything[0] < 4
    before = data.batch(*(index[of_data] for index in everything))
    after = found.batch(*everything)
    for index in (0, 3):
        kept = after[index].unflatten(0, (2, 18))[:, of_data].flatten(0, 1)
        torch.testing.assert_close(kept, before[index], rtol=1e-4, atol=1e-5)
    # Another noise than any that was recorded, and the prompts from the first on.
    own = record_trajectories(float_model, ["a", "b"], seed=5 + 4, follow=student, **SETTINGS)
    torch.testing.assert_close(found.latents[4:], own.latents, rtol=1e-4, atol=1e-5)
    for name, value in found.positive.items():
        assert torch.equal(value[4:], data.positive[name][:2])

    def refuse(*args: object, **options: object) -> CalibrationSet:
        raise AssertionError

    monkeypatch.setattr(calibrate, "record_trajectories", refuse)
    data = recorded_with(float_model, config, work)
    again = recording.record_own(float_model, student, context, data, config, work, lambda event: None)
    assert torch.equal(again.latents, found.latents)


def test_half_of_the_pairs_are_of_own_trajectories(recorded: CalibrationSet, task: train.Task) -> None:
    def drawn(own: torch.Tensor | None, batch_size: int) -> losses.Draw:
        generator = torch.Generator().manual_seed(0)
        training = torch.tensor([0, 1])
        return losses.draw(
            recorded,
            training,
            task.objective,
            batch_size=batch_size,
            num_walks=2,
            generator=generator,
            own=own,
        )

    plain, with_own = drawn(None, 5), drawn(torch.tensor([7, 8]), 5)
    assert torch.equal(with_own.step, plain.step)
    assert torch.equal(with_own.prompt[:3], plain.prompt[:3])
    assert set(with_own.prompt[3:].tolist()) <= {7, 8}
    assert set(with_own.walk_prompt.tolist()) <= {0, 1}
    # Each of two processes has as many.
    shares = [drawn(torch.tensor([7, 8]), 8).share(index, 2) for index in range(2)]
    assert [int((share.prompt > 6).sum()) for share in shares] == [2, 2]


def test_the_sensitive_phase_alone_learns_from_own_trajectories(
    float_model: LoadedModel, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[bool, Any] = {}
    run_phase = train.run_phase

    def watched(task: train.Task, *args: Any, temporal: bool, **options: Any) -> None:
        seen[temporal] = (task.own, task.data.num_prompts, task.training.tolist(), task.validation.tolist())
        run_phase(task, *args, temporal=temporal, **options)

    monkeypatch.setattr(train, "run_phase", watched)
    stages: dict[str, int] = {}
    config = config_of(temporal=PHASE)
    finetune(
        tiny_model,
        tmp_path / "checkpoint",
        config,
        progress=lambda event: stages.update({event.stage: event.total}),
    )
    assert seen[True] == (None, 4, [0, 1], [2, 3])
    assert seen[False][0].tolist() == [4, 5]
    assert seen[False][1:] == (6, [0, 1], [2, 3])
    assert stages["record own trajectories"] == 2


@pytest.mark.parametrize(
    "targets", ["disk", *(pytest.param(kept, marks=pytest.mark.thorough) for kept in ("memory", "recompute"))]
)
def test_the_estimate_has_what_own_trajectories_take_on_disk(
    float_model: LoadedModel, tiny_model: Path, quantize_tiny: Quantize, work: WorkDirectory, targets: str
) -> None:
    student, context = quantize_tiny(4, 4)
    config = config_of(targets=targets)
    data = recorded_with(float_model, config, work)
    before = set(work.path.glob("*.safetensors"))
    recording.record_own(float_model, student, context, data, config, work, lambda event: None)
    written = sum(file.stat().st_size for file in set(work.path.glob("*.safetensors")) - before)
    found = {part.part: part for part in estimate(tiny_model, config)[0]}
    assert written * 0.8 < found["record own trajectories"].disk_bytes < written * 1.1


def test_own_trajectories_are_of_prompts_to_train_on() -> None:
    with pytest.raises(
        ConfigError, match="on_policy_prompts is 3, expected at most .* validation_prompts, 2"
    ):
        config_of(on_policy_prompts=3)
    with pytest.raises(ConfigError, match="on_policy_prompts is -1"):
        config_of(on_policy_prompts=-1)
    with pytest.raises(ConfigError, match=r"sensitive\.batch_size is 1, expected 2 or more"):
        config_of(sensitive=dataclasses.replace(PHASE, batch_size=1))

"""What a part keeps while it runs: interrupted in the middle, it goes on to the same bits; whole, it is used again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quest_deploy.config import FinetuneConfig
from quest_deploy.errors import ArtifactError
from quest_deploy.model.load import LoadedModel, load_model
from quest_deploy.quantize import finetune as stage
from quest_deploy.quantize.calibrate import CalibrationSet, collect_inputs
from quest_deploy.quantize.gptq import compensate
from quest_deploy.quantize.insert import LayerQParams
from quest_deploy.quantize.resume import WorkDirectory
from tests.quantize.limited_run import RECIPE

LAYERS = ("time_embedding.linear_1", "conv_in", "conv_out")


class Stop(Exception):
    """Ends a part from outside."""


def stop_at(wanted: int) -> Callable[[int, int], None]:
    def report(completed: int, total: int) -> None:
        if completed == wanted:
            raise Stop

    return report


@pytest.mark.parametrize("stop", [1, 2])
def test_collecting_goes_on_to_the_same_bits(
    float_model: LoadedModel,
    recorded: CalibrationSet,
    inputs: dict[str, Tensor],
    work: WorkDirectory,
    stop: int,
) -> None:
    options = {"prompts_per_step": 2, "positions": 8, "seed": 0, "work": work}
    with pytest.raises(Stop):
        collect_inputs(float_model.denoiser, recorded, report=stop_at(stop), **options)
    done: list[int] = []
    again = collect_inputs(
        float_model.denoiser, recorded, report=lambda completed, total: done.append(completed), **options
    )
    assert done == list(range(stop + 1, 4))
    assert all(torch.equal(again[name], value) for name, value in inputs.items())


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_rounding_goes_on_to_the_same_bits(
    float_model: LoadedModel,
    recorded: CalibrationSet,
    qparams: Callable[[int, int], dict[str, LayerQParams]],
    work: WorkDirectory,
    stop: int,
) -> None:
    options = {"prompts_per_step": 2, "rows_per_step": 16, "seed": 0}
    arguments = (float_model.denoiser, recorded, qparams(4, 4), LAYERS)
    whole = compensate(*arguments, **options)
    with pytest.raises(Stop):
        compensate(*arguments, report=stop_at(stop), work=work, key="rounded-0000", **options)
    done: list[int] = []
    again = compensate(
        *arguments,
        report=lambda completed, total: done.append(completed),
        work=work,
        key="rounded-0000",
        **options,
    )
    assert done == list(range(stop + 1, 7))
    assert all(torch.equal(again[name], value) for name, value in whole.items())


def test_a_finished_checkpoint_of_what_is_no_directory_is_used_again(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hub id or a single file it was refused: what such a model draws is known when it is loaded."""
    monkeypatch.setattr(stage, "load_model", lambda model: load_model(tiny_model))
    config = FinetuneConfig(recipe=dataclasses.replace(RECIPE, calibration_prompts=2, initializer="nearest"))
    output = tmp_path / "out"
    first = stage.finetune("somebody/a-model", output, config)
    monkeypatch.setattr(stage, "_quantize", None)
    assert stage.finetune("somebody/a-model", output, config, resume=True).digest == first.digest
    with pytest.raises(ArtifactError, match="exists already; add --overwrite"):
        stage.finetune("somebody/a-model", output, dataclasses.replace(config, seed=1), resume=True)

"""Layers that carry time are calibrated on every timestep, in each family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quest_deploy.config import FinetuneConfig
from quest_deploy.model.components import predict
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import parts
from quest_deploy.quantize.calibrate import CalibrationSet, collect_inputs, record_trajectories
from quest_deploy.quantize.insert import channel_axis, quantizable_layers
from quest_deploy.quantize.recipe import load_recipe
from quest_deploy.quantize.resume import WorkDirectory
from quest_deploy.quantize.time_inputs import inputs_over_time
from quest_deploy.quantize.trace import trace

KINDS = ["dit", "class-unet", "ddpm", "sdxl", "pixart-alpha", "sd3", "flux-dev"]
POSITIONS = 65
Inputs = dict[str, Tensor]


def recorded(model: LoadedModel) -> CalibrationSet:
    prompts = ("0", "1") if model.classes is not None else ("a cat", "a dog")
    return record_trajectories(model, prompts, steps=3, guidance_scale=2.0, seed=0, batch_size=2)


def over_time(model: LoadedModel, data: CalibrationSet, positions: int = POSITIONS) -> Inputs:
    names = quantizable_layers(model.denoiser)
    return inputs_over_time(
        model.denoiser,
        trace(model),
        data,
        names,
        last_time=model.last_time,
        positions=positions,
        seed=0,
    )


def given_at(model: LoadedModel, data: CalibrationSet, time: float, names: Inputs) -> Inputs:
    """The input rows of layers in a pass of the whole network at `time`."""
    layers, seen = quantizable_layers(model.denoiser), {}
    handles = [
        layers[name].register_forward_pre_hook(
            lambda module, args, name=name: seen.update(
                {name: args[0].movedim(channel_axis(module), -1).flatten(0, -2)}
            )
        )
        for name in names
    ]
    sample, _, told = data.inputs(
        torch.arange(data.num_prompts), torch.zeros(data.num_prompts, dtype=torch.int64)
    )
    with torch.no_grad():
        predict(model.denoiser, sample, torch.full((sample.shape[0],), time), told)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("kind", KINDS)
def test_the_rows_of_a_group_reach_from_its_first_timestep_to_its_last(
    loaded: Callable[[str], LoadedModel], kind: str
) -> None:
    model = loaded(kind)
    data = recorded(model)
    found, roles = over_time(model, data), trace(model).roles
    assert found.keys() == {name for name, role in roles.items() if role == "temporal"}
    layers = quantizable_layers(model.denoiser)
    edges = [0.0, *data.boundaries().tolist(), model.last_time]
    for name, rows in found.items():
        assert rows.shape == (3, POSITIONS + 2, layers[name].weight.shape[1])
        assert torch.equal(rows[:, -2], rows[:, :-2].amin(dim=1))
        assert torch.equal(rows[:, -1], rows[:, :-2].amax(dim=1))
    if trace(model).conditions:
        return
    for group in range(3):
        for position in (0, POSITIONS // 2, POSITIONS - 1):
            time = torch.linspace(edges[group], edges[group + 1], POSITIONS)[position]
            for name, rows in given_at(model, data, float(time), found).items():
                torch.testing.assert_close(found[name][group, position], rows[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_recorded_and_what_lies_between_is_covered(
    loaded: Callable[[str], LoadedModel], kind: str
) -> None:
    model = loaded(kind)
    data = recorded(model)
    between = over_time(model, data)
    alone = collect_inputs(model.denoiser, data, prompts_per_step=2, positions=POSITIONS, seed=0)
    found = parts.layer_inputs(model, trace(model), data, seed=0, prompts_per_step=2, positions=POSITIONS)
    # A flow draws its first picture from a timestep that lies beyond the last but one of its schedule.
    assert model.last_time >= float(data.timesteps.max())
    for name, rows in between.items():
        assert found[name].shape == rows.shape == alone[name].shape
        for inputs in (rows, alone[name]):
            assert (found[name][:, -2] <= inputs[:, -2]).all()
            assert (found[name][:, -1] >= inputs[:, -1]).all()
        half = POSITIONS - POSITIONS // 2
        assert torch.equal(found[name][:, :half], alone[name][:, :half])
        assert torch.equal(found[name][:, half:-2], rows[:, 1:-2:2])
    for group, time in enumerate(data.boundaries().tolist()):
        for name, rows in given_at(model, data, time - 1e-3 * model.last_time, between).items():
            if not trace(model).conditions:
                assert rows.max() <= found[name][group, -1].max() + 1e-3
                assert rows.min() >= found[name][group, -2].min() - 1e-3


def test_one_timestep_a_group_leaves_others_outside(loaded: Callable[[str], LoadedModel]) -> None:
    """What this is for."""
    model = loaded("ddpm")
    data = recorded(model)
    between = over_time(model, data)
    alone = collect_inputs(model.denoiser, data, prompts_per_step=2, positions=8, seed=0, names=between)
    assert any((rows[:, -1] > alone[name][:, -1] + 1e-3).any() for name, rows in between.items())


def test_scales_are_those_of_every_timestep(loaded: Callable[[str], LoadedModel], tmp_path: Path) -> None:
    model = loaded("ddpm")
    data, traced = recorded(model), trace(model)
    bits = {name: (8, 8) for name, role in traced.roles.items() if role == "temporal"}
    config = FinetuneConfig(recipe=load_recipe("w8a8"))
    work = WorkDirectory(tmp_path / "checkpoint")
    with work.lock():
        work.open({}, resume=False, overwrite=False)
        scales = parts.find_scales(model, data, bits, config, work, lambda event: None, trace=traced)
    rows = parts.layer_inputs(model, traced, data, seed=config.seed)
    for name, layer in quantizable_layers(model.denoiser).items():
        if name in bits:
            expected = parts.initialize_one(layer, rows[name], (8, 8), config.recipe)
            assert torch.equal(scales[name].group_scale, expected.group_scale)

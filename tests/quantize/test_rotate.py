"""Rotated feed-forwards: the same function in float, the same names, and less lost to rounding."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from quest_deploy.artifacts import write_artifact
from quest_deploy.errors import CalibrationError
from quest_deploy.model.components import predict
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import affine
from quest_deploy.quantize.calibrate import CalibrationSet, collect_inputs
from quest_deploy.quantize.checkpoint import freeze, load_checkpoint, save_checkpoint
from quest_deploy.quantize.initialize import initialize
from quest_deploy.quantize.insert import insert, quantizable_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.recipe import load_recipe
from quest_deploy.quantize.rotate import (
    Rotation,
    find_feed_forwards,
    hadamard,
    rotate_layers,
    rotated_blocks,
)
from quest_deploy.quantize.structure import restructure, structure

ROTATED = dataclasses.replace(load_recipe("w4a4"), rotation="feed-forward")


@pytest.fixture
def rotated(float_model: LoadedModel) -> LoadedModel:
    """The tiny model with its feed-forwards rotated."""
    model = dataclasses.replace(float_model, denoiser=copy.deepcopy(float_model.denoiser))
    restructure(model, ROTATED)
    return model


@pytest.mark.parametrize("size", [1, 2, 16, 64])
def test_the_matrix_is_symmetric_and_its_own_inverse(size: int) -> None:
    matrix = hadamard(size)
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size), rtol=0, atol=1e-6)
    # Every value goes everywhere, by the same amount.
    torch.testing.assert_close(matrix.abs(), torch.full((size, size), size**-0.5), rtol=1e-6, atol=0)


def test_blocks_are_rotated_by_themselves() -> None:
    x = torch.zeros(2, 3, 12)
    x[..., 5] = 1.0
    found = Rotation(4)(x)
    assert found.shape == x.shape and bool((found[..., 4:8].abs() == 0.5).all())
    assert not found[..., :4].any() and not found[..., 8:].any()


def test_a_heavy_tail_loses_less_when_rotated() -> None:
    torch.manual_seed(0)
    x = torch.randn(4096, 64) * torch.randn(4096, 64)
    rotation = Rotation(64)

    def lost(given: torch.Tensor) -> float:
        grid = affine.search_grid(given, 4)
        return float((affine.fake_quantize(given, grid.scale, grid.qmin, grid.qmax) - given).square().mean())

    assert lost(rotation(x)) < lost(x) / 2


def test_a_rotated_denoiser_has_the_same_layers_and_predicts_what_it_predicted(
    float_model: LoadedModel, rotated: LoadedModel, recorded: CalibrationSet
) -> None:
    sample, timestep, conditioning, target = recorded.batch(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with torch.no_grad():
        found = predict(rotated.denoiser, sample, timestep, conditioning)
    torch.testing.assert_close(found, target, rtol=1e-4, atol=1e-4)
    before, after = (quantizable_layers(model.denoiser) for model in (float_model, rotated))
    assert list(before) == list(after)
    other = {name for name in before if not torch.equal(before[name].weight, after[name].weight)}
    assert other == {f"{name}.net.2" for name in rotated_blocks(rotated.denoiser)} != set()


def test_feed_forwards_are_found_by_their_class(float_model: LoadedModel) -> None:
    found = find_feed_forwards(float_model.denoiser)
    modules = dict(float_model.denoiser.named_modules())
    assert set(found) == {name for name in modules if name.endswith(".ff")}
    assert all(modules[f"{name}.net.2"].in_features % block == 0 for name, block in found.items())


def test_only_powers_of_two_are_blocks() -> None:
    from diffusers.models.attention import FeedForward

    model = nn.ModuleDict({"odd": FeedForward(5, inner_dim=15), "wide": FeedForward(4, inner_dim=24 * 16)})
    model["long"] = FeedForward(4, inner_dim=40)
    assert find_feed_forwards(model) == {"wide": 64, "long": 8}


@pytest.mark.parametrize(
    ("name", "block"),
    [("nothing", 4), ("time_embedding", 4), ("ff", 3), ("ff", 2), ("ff", 1 << 20)],
)
def test_impossible_rotations_are_refused(float_model: LoadedModel, name: str, block: int) -> None:
    denoiser = copy.deepcopy(float_model.denoiser)
    if name == "ff":
        name = next(iter(find_feed_forwards(denoiser)))
    with pytest.raises(CalibrationError, match="quantize the model again"):
        rotate_layers(denoiser, {name: block})


def test_nothing_is_rotated_twice(rotated: LoadedModel) -> None:
    assert not find_feed_forwards(rotated.denoiser)
    with pytest.raises(CalibrationError, match="quantize the model again"):
        rotate_layers(rotated.denoiser, rotated_blocks(rotated.denoiser))


def test_a_model_without_feed_forwards_stays_as_it_is(float_model: LoadedModel) -> None:
    plain = dataclasses.replace(float_model, denoiser=nn.Sequential(nn.Conv2d(4, 4, 3)))
    restructure(plain, ROTATED)
    assert structure(plain.denoiser) == {"splits": {}, "rotations": {}}


@pytest.mark.parametrize("deferred", [False, True])
def test_a_checkpoint_holds_rotated_layers(
    tmp_path: Path, float_model: LoadedModel, rotated: LoadedModel, recorded: CalibrationSet, deferred: bool
) -> None:
    denoiser, context = rotated.denoiser, TimestepContext(recorded.boundaries())
    inputs = collect_inputs(denoiser, recorded, prompts_per_step=1, positions=8, seed=0)
    insert(denoiser, initialize(denoiser, inputs, dict.fromkeys(inputs, (4, 4)), method="minmax"), context)
    freeze(denoiser.requires_grad_(False))
    path = tmp_path / "checkpoint"
    with write_artifact(path, stage="checkpoint", config={}) as writer:
        save_checkpoint(
            writer.path,
            float_model,
            denoiser,
            recipe=ROTATED,
            activation_bits=dict.fromkeys(inputs, 4),
            context=context,
            history={},
        )
    loaded = load_checkpoint(path, deferred=deferred).denoiser
    sample, timestep, conditioning, _ = recorded.batch(torch.tensor([0, 1]), torch.tensor([0, 1]))
    with torch.no_grad():
        got, expected = (predict(each, sample, timestep, conditioning) for each in (loaded, denoiser))
    assert torch.equal(got, expected) and rotated_blocks(loaded) == rotated_blocks(denoiser) != {}

"""Time-embedding tables: exact at the knots, linear between them, and nothing of the time path beside them."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.config import FinetuneConfig, PhaseConfig, Recipe
from quest_deploy.errors import ConfigError
from quest_deploy.model.components import predict
from quest_deploy.model.load import LoadedModel, load_model
from quest_deploy.quantize import losses, train
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.checkpoint import load_checkpoint
from quest_deploy.quantize.context import Knots, TimestepContext
from quest_deploy.quantize.estimate import estimate
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.memory import enable_checkpointing
from quest_deploy.quantize.select import layer_bits
from quest_deploy.quantize.student import make_student
from quest_deploy.quantize.tables import (
    TimeTable,
    check_tables,
    insert_tables,
    make_context,
    outlet_outputs,
    time_tables,
    unused_layers,
)
from quest_deploy.quantize.trace import Trace
from quest_deploy.quantize.walk import fit_steps, walk_errors

NONE = PhaseConfig(layers="none", steps=0)
RECIPE = Recipe(
    name="table",
    weight_bits=8,
    activation_bits=8,
    calibration_prompts=2,
    validation_prompts=1,
    calibration_steps=3,
    initializer="nearest",
    temporal_path="table",
    temporal=PhaseConfig(layers="temporal", steps=2, batch_size=2),
    sensitive=PhaseConfig(layers="all", steps=1, batch_size=1),
)
CONFIG = FinetuneConfig(recipe=RECIPE, prompts=("a", "b"))
KNOTS = torch.tensor([100.0, 300.0, 700.0])


@pytest.fixture
def student(
    float_model: LoadedModel, traced: Trace, recorded: CalibrationSet
) -> tuple[nn.Module, TimestepContext, Trace]:
    """The tiny U-Net with tables and nothing quantized."""
    context = make_context(recorded.boundaries(), recorded.timesteps, RECIPE)
    unet = make_student(float_model, {}, {}, context)
    return unet, context, insert_tables(unet, float_model.denoiser, traced, context, recorded.device)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """The tiny model, finetuned with a loss that falls all the time, so that what was learned is the result."""
    path, losses = tmp_path_factory.mktemp("table") / "checkpoint", itertools.count(0, -1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Task, "validation_loss", lambda task: float(next(losses)))
        finetune(tiny_model, path, CONFIG)
    return path


@pytest.mark.parametrize(
    ("timestep", "expected"),
    [
        (100.0, [1.0, 0.0, 0.0]),
        (300.0, [0.0, 1.0, 0.0]),
        (700.0, [0.0, 0.0, 1.0]),
        (150.0, [0.75, 0.25, 0.0]),
        (600.0, [0.0, 0.25, 0.75]),
        (0.0, [1.0, 0.0, 0.0]),
        (999.0, [0.0, 0.0, 1.0]),
    ],
    ids=str,
)
def test_a_table_is_linear_between_knots_and_constant_outside(timestep: float, expected: list[float]) -> None:
    context = TimestepContext(torch.empty(0), Knots(KNOTS))
    context.set_timestep(torch.tensor([timestep]))
    # The rows of the identity show the share of each knot.
    assert TimeTable(torch.eye(3), context)(torch.empty(1, 9)).tolist() == [expected]


def test_each_sample_of_a_batch_has_its_own_place_in_time() -> None:
    context = TimestepContext(torch.empty(0), Knots(KNOTS[:2]))
    context.set_timestep(torch.tensor([100.0, 200.0, 350.0]))
    table = torch.arange(12.0).reshape(2, 2, 3)
    got = TimeTable(table, context)(torch.empty(3, 9))
    torch.testing.assert_close(got, torch.stack([table[0], table.mean(dim=0), table[1]]), rtol=0, atol=0)


def test_the_outlets_are_the_layers_whose_output_meets_the_latents(traced: Trace) -> None:
    assert traced.outlets and all(name.endswith(".time_emb_proj") for name in traced.outlets)
    assert traced.roles.keys() & {"time_embedding.linear_2"} - traced.outlets.keys()


def test_a_table_starts_as_the_layer_that_it_replaces(
    float_model: LoadedModel, traced: Trace, recorded: CalibrationSet, student: tuple
) -> None:
    unet, _, _ = student
    expected = outlet_outputs(float_model.denoiser, traced, recorded.timesteps.flip(0))
    assert expected.keys() == time_tables(unet).keys()
    for name, table in time_tables(unet).items():
        assert torch.equal(table.table, expected[name])


@torch.no_grad()
def test_the_network_is_that_of_full_precision_at_the_knots(
    float_model: LoadedModel, recorded: CalibrationSet, student: tuple
) -> None:
    given = recorded.inputs(torch.tensor([0, 1, 2]), torch.tensor([2, 0, 1]))
    expected = predict(float_model.denoiser, *given)
    torch.testing.assert_close(predict(student[0], *given), expected, rtol=1e-5, atol=1e-6)


def test_no_other_layer_that_carries_time_is_left(student: tuple, traced: Trace) -> None:
    unet, _, trace = student
    temporal = {name for name, role in traced.roles.items() if role == "temporal"}
    assert {*time_tables(unet), *unused_layers(unet)} == temporal
    assert trace.ends == tuple(time_tables(unet))


def test_layers_that_carry_time_have_no_bits(traced: Trace) -> None:
    bits = layer_bits(traced.roles, RECIPE)
    assert bits.keys() == {name for name, role in traced.roles.items() if role != "temporal"}


def test_tables_learn_in_the_temporal_phase_alone(student: tuple, traced: Trace) -> None:
    unet, _, _ = student
    phase = PhaseConfig(layers="temporal", steps=1, learning_rate_scales=0.01)
    learned = {
        group["name"]: group["lr"] for group in train.trainable(unet, phase, traced.roles, temporal=True)
    }
    assert learned == {
        f"{name}.table": pytest.approx(0.01 * float(table.table.detach().square().mean().sqrt()))
        for name, table in time_tables(unet).items()
    }
    assert not train.trainable(unet, phase, traced.roles, temporal=False)


def test_the_temporal_loss_of_tables_is_nothing_at_the_knots_and_falls_between(
    float_model: LoadedModel, recorded: CalibrationSet, student: tuple
) -> None:
    unet, context, trace = student

    def loss(timestep: Tensor) -> Tensor:
        return losses.temporal_loss(unet, float_model.denoiser, trace, timestep, {}, context)

    assert float(loss(recorded.timesteps).detach()) < 1e-10
    between = torch.linspace(0.0, 999.0, 64)
    train.trainable(unet, PhaseConfig(layers="none", steps=1), trace.roles, temporal=True)
    optimizer = torch.optim.Adam([table.table for table in time_tables(unet).values()], lr=1e-3)
    before = float(loss(between).detach())
    for _ in range(10):
        optimizer.zero_grad()
        loss(between).backward()
        optimizer.step()
    assert float(loss(between).detach()) < before


def test_a_checkpoint_holds_the_tables_and_nothing_of_the_time_path(
    checkpoint: Path, traced: Trace, recorded: CalibrationSet
) -> None:
    loaded = load_checkpoint(checkpoint).denoiser
    tables = time_tables(loaded)
    assert tables.keys() == traced.outlets.keys() and set(unused_layers(loaded)).isdisjoint(tables)
    assert all(table.table.shape[0] == RECIPE.calibration_steps for table in tables.values())
    assert not [name for name in loaded.state_dict() if "time_embedding" in name]
    assert not [name for name in quantized_layers(loaded) if traced.roles[name] == "temporal"]


def test_tables_were_learned(checkpoint: Path, float_model: LoadedModel, traced: Trace) -> None:
    tables = time_tables(load_checkpoint(checkpoint).denoiser)
    (context,) = {id(table.context): table.context for table in tables.values()}.values()
    assert context.knots is not None
    start = outlet_outputs(float_model.denoiser, traced, context.knots.timesteps)
    assert not any(torch.equal(table.table, start[name]) for name, table in tables.items())


def test_without_a_temporal_phase_tables_stay_those_of_full_precision(
    tiny_model: Path, tmp_path: Path, float_model: LoadedModel, traced: Trace
) -> None:
    recipe = dataclasses.replace(RECIPE, temporal=NONE, sensitive=NONE)
    finetune(tiny_model, tmp_path / "out", dataclasses.replace(CONFIG, recipe=recipe))
    tables = time_tables(load_checkpoint(tmp_path / "out").denoiser)
    knots = next(iter(tables.values())).context.knots
    assert knots is not None
    for name, expected in outlet_outputs(float_model.denoiser, traced, knots.timesteps).items():
        assert torch.equal(tables[name].table, expected)


def test_a_walk_with_gradient_checkpointing_runs_each_step_again_at_its_own_timestep(
    float_model: LoadedModel, traced: Trace, recorded: CalibrationSet
) -> None:
    steps = fit_steps(recorded, 3.0)
    assert steps is not None
    found = []
    for checkpointing in (False, True):
        context = make_context(recorded.boundaries(), recorded.timesteps, RECIPE)
        unet = make_student(float_model, {}, {}, context)
        insert_tables(unet, float_model.denoiser, traced, context, recorded.device)
        if checkpointing:
            enable_checkpointing(unet, context)
        first = torch.tensor([0])
        walk_errors(unet, recorded, steps, first, first, length=2, guidance_scale=3.0).sum().backward()
        found.append([table.table.grad for table in time_tables(unet).values()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


def test_other_inputs_of_the_time_path_are_refused(traced: Trace) -> None:
    conditional = dataclasses.replace(traced, conditions=frozenset({"class_labels"}))
    with pytest.raises(
        ConfigError, match="carry time depend on class_labels as well, .* leave temporal_path out"
    ):
        check_tables(conditional, RECIPE)
    check_tables(conditional, dataclasses.replace(RECIPE, temporal_path="quantized"))


def test_a_model_without_layers_that_carry_time_is_refused(traced: Trace) -> None:
    with pytest.raises(ConfigError, match="no layer of this model carries time"):
        check_tables(dataclasses.replace(traced, outlets={}), RECIPE)


@pytest.mark.thorough
def test_the_size_of_a_checkpoint_with_tables_is_told(checkpoint: Path, tiny_model: Path) -> None:
    parts, _ = estimate(tiny_model, CONFIG)
    size = sum(path.stat().st_size for path in checkpoint.rglob("*.safetensors"))
    # A model this small is mostly the headers of its files.
    assert parts[-1].disk_bytes == pytest.approx(size, rel=0.25)


def test_an_older_checkpoint_has_no_tables(tiny_model: Path, tiny_checkpoint: Path) -> None:
    assert not time_tables(load_checkpoint(tiny_checkpoint).denoiser)
    assert not time_tables(load_model(tiny_model).denoiser)

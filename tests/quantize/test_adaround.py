"""AdaRound: measured by what it minimizes, where that can be computed otherwise."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.config import FinetuneConfig, PhaseConfig, Recipe
from quest_deploy.files import read_json
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import adaround
from quest_deploy.quantize.affine import fake_quantize, search_weight_scale
from quest_deploy.quantize.blocks import Samples
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.grid import channel_shape, weight_bounds
from quest_deploy.quantize.insert import LayerQParams, quantizable_layers
from quest_deploy.quantize.layers import (
    ActivationQuantizer,
    QuantizedLayer,
    TimestepContext,
    quantized_layer,
)
from quest_deploy.quantize.resume import WorkDirectory

CONTEXT = TimestepContext(torch.empty(0))
NONE = PhaseConfig(layers="none", steps=0)
CONFIG = FinetuneConfig(
    recipe=Recipe(
        name="tiny",
        weight_bits=4,
        activation_bits=8,
        initializer="adaround",
        adaround_iterations=2,
        calibration_prompts=2,
        validation_prompts=1,
        calibration_steps=2,
        temporal=NONE,
        sensitive=NONE,
    ),
    prompts=("a", "b"),
)


def correlated(seed: int, columns: int, samples: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    return torch.randn(samples, columns, generator=generator) @ mixing


def linear(seed: int, columns: int, rows: int = 6, *, row: Tensor | None = None) -> QuantizedLayer:
    layer = nn.Linear(columns, rows)
    generator = torch.Generator().manual_seed(seed)
    layer.weight.data = torch.randn(rows, columns, generator=generator)
    weight = layer.weight if row is None else layer.weight * row
    quantizer = None if row is None else ActivationQuantizer(torch.tensor([1e-3]), -128, 127, row=row)
    scale = search_weight_scale(weight.detach(), 4)
    return quantized_layer(layer, scale, 4, quantizer, CONTEXT).requires_grad_(False)


def of_layer(layer: QuantizedLayer, x: Tensor) -> Samples:
    """Samples whose targets the layer's float weight gives."""
    with torch.no_grad():
        target = layer.operation(x, layer.weight) + layer.bias.reshape(layer.bias_shape())
    return Samples((x,), {}, torch.zeros(len(x)), (target,))


def learn(
    layer: QuantizedLayer, x: Tensor, iterations: int = 300, seed: int = 0
) -> tuple[Tensor, float, float]:
    generator = torch.Generator().manual_seed(seed)
    weights, before, after = adaround.learn_rounding(
        layer, of_layer(layer, x), CONTEXT, iterations=iterations, generator=generator
    )
    return weights[""], before, after


def nearest(weight: Tensor, scale: Tensor) -> Tensor:
    return fake_quantize(weight, channel_shape(scale, weight.ndim, 0), *weight_bounds(4))


def test_the_soft_weight_is_the_float_weight_at_first() -> None:
    layer = linear(0, 20)
    rounding = adaround.start_rounding(layer)
    low, high = (bound * layer.weight_scale()[:, None] for bound in weight_bounds(4))
    torch.testing.assert_close(rounding.soft(), layer.weight.clamp(low, high))


def test_the_rectified_sigmoid_reaches_its_ends() -> None:
    h = adaround.rectified_sigmoid(torch.tensor([-3.0, 0.0, 3.0]))
    assert h.tolist() == [0.0, 0.5, 1.0]


def test_the_regulariser_is_none_where_all_is_decided_and_one_where_nothing_is() -> None:
    def of(logit: float) -> adaround.Rounding:
        return adaround.Rounding(torch.zeros(4), torch.ones(1), torch.full((4,), logit), (-8, 7))

    assert float(adaround.regulariser([of(-5.0), of(5.0)], 2.0)) == 0.0
    assert float(adaround.regulariser([of(0.0)], 2.0)) == 1.0
    assert float(adaround.regulariser([of(0.0), of(5.0)], 2.0)) == 0.5


def test_beta_falls_from_20_to_2_after_a_fifth() -> None:
    assert adaround.beta_at(0.0) is adaround.beta_at(0.199) is None
    assert adaround.beta_at(0.2) == pytest.approx(20.0)
    assert adaround.beta_at(0.6) == pytest.approx(11.0)
    assert adaround.beta_at(1.0) == pytest.approx(2.0)


@pytest.mark.parametrize("iterations", [1, 5, 200])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_never_worse_than_nearest_in_the_hessian_norm(seed: int, iterations: int) -> None:
    layer, x = linear(seed, 16), correlated(seed, 16)
    weight, hessian = layer.weight.clone(), x.T @ x

    def error(rounded: Tensor) -> float:
        return float(((weight - rounded) @ hessian * (weight - rounded)).sum())

    rounded, _, _ = learn(layer, x, iterations)
    # The choice between the two is made from outputs in float32.
    assert error(rounded) <= error(nearest(weight, layer.weight_scale())) * (1 + 1e-4)


def test_the_errors_told_are_those_of_the_hessian() -> None:
    layer, x = linear(0, 12), correlated(0, 12)
    weight = layer.weight.clone()
    rounded, before, after = learn(layer, x)
    for told, candidate in ((before, nearest(weight, layer.weight_scale())), (after, rounded)):
        difference = (weight - candidate).double()
        expected = (difference @ (x.T @ x).double() * difference).sum() / (len(x) * len(weight))
        assert told == pytest.approx(float(expected), rel=1e-4)


def test_it_takes_a_quarter_off_the_error_of_correlated_inputs() -> None:
    _, before, after = learn(linear(0, 60), correlated(0, 60))
    assert after < 0.75 * before


def test_it_finds_a_choice_near_the_best_of_all() -> None:
    """Of the 256 ways to round eight weights down or up, for each output channel."""
    layer, x = linear(3, 8), correlated(3, 8)
    weight, scale, hessian = layer.weight.clone(), layer.weight_scale()[:, None], x.T @ x
    floor = (weight / scale).floor()
    ways = torch.tensor(list(itertools.product((0.0, 1.0), repeat=8)))
    candidates = (floor[:, None] + ways).clamp(*weight_bounds(4)) * scale[:, None]
    difference = candidates - weight[:, None]
    best = ((difference @ hessian) * difference).sum(-1).amin(1).sum() / (len(x) * len(weight))
    _, before, after = learn(layer, x, 600)
    assert float(best) * 0.999 <= after <= float(best) + 0.25 * (before - float(best))


def test_every_weight_goes_to_its_floor_or_ceiling_on_the_grid() -> None:
    layer, x = linear(1, 30), correlated(1, 30)
    place = (layer.weight / layer.weight_scale()[:, None]).clamp(*weight_bounds(4))
    rounded, before, after = learn(layer, x)
    codes = rounded / layer.weight_scale()[:, None]
    assert after < before
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
    assert (codes.round() >= place.floor()).all() and (codes.round() <= place.ceil()).all()


def test_a_channel_row_is_taken_out_of_the_weights_again() -> None:
    row = torch.rand(10) + 0.5
    layer, x = linear(2, 10, row=row), correlated(2, 10)
    rounded, before, after = learn(layer, x)
    codes = rounded * row / layer.weight_scale()[:, None]
    assert after < before
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-5)
    assert torch.equal(layer.weight_codes().float(), codes.round())


def test_convolutions_learn_as_well() -> None:
    conv = nn.Conv2d(3, 4, 3, padding=1)
    layer = quantized_layer(conv, search_weight_scale(conv.weight.detach(), 4), 4, None, CONTEXT)
    _, before, after = learn(layer.requires_grad_(False), torch.randn(40, 3, 5, 5).cumsum(2), 100)
    assert after < 0.9 * before


def test_the_seed_decides_the_result() -> None:
    x = correlated(0, 40)
    made = [learn(linear(0, 40), x, 100, seed)[0] for seed in (0, 0, 1)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_a_layer_that_nothing_is_lost_in_stays_as_it_is() -> None:
    layer = linear(0, 6)
    layer.weight.copy_(layer.quantized_weight())
    before = layer.weight_codes()
    _, nearest_error, learned = learn(layer, correlated(0, 6))
    assert nearest_error == learned == 0.0
    assert torch.equal(layer.weight_codes(), before)


def run(
    model: LoadedModel,
    data: CalibrationSet,
    qparams: dict[str, LayerQParams],
    work: WorkDirectory | None = None,
    report: Callable[[int, int], None] = lambda completed, total: None,
) -> tuple[dict[str, Tensor], dict[str, tuple[float, float]]]:
    return adaround.reconstruct(
        model.denoiser, data, qparams, TimestepContext(data.boundaries()), CONFIG, work, report
    )


class Stop(Exception):
    """Ends a run from outside."""


@pytest.mark.thorough
def test_an_interrupted_run_goes_on_from_the_parts_that_are_done(
    float_model: LoadedModel,
    recorded: CalibrationSet,
    qparams: Callable,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scales, done = qparams(4, 4), 5
    whole = run(float_model, recorded, scales)

    def stop(completed: int, total: int) -> None:
        if completed == done:
            raise Stop

    work = WorkDirectory(tmp_path / "out")
    work.open({}, resume=False, overwrite=False)
    with pytest.raises(Stop):
        run(float_model, recorded, scales, work, stop)
    learned: list[int] = []
    collect = adaround.collect
    monkeypatch.setattr(adaround, "collect", lambda *args: learned.append(1) or collect(*args))
    weights, errors = run(float_model, recorded, scales, work)
    assert len(learned) == len(whole[1]) - done
    assert {name: tuple(pair) for name, pair in errors.items()} == whole[1]
    assert weights.keys() == whole[0].keys() == quantizable_layers(float_model.denoiser).keys()
    assert all(torch.equal(weights[name], whole[0][name]) for name in weights)


def test_a_recipe_can_start_from_it_and_the_errors_are_kept(tiny_model: Path, tmp_path: Path) -> None:
    finetune(tiny_model, tmp_path / "out", CONFIG)
    errors = read_json(tmp_path / "out" / "quest.json")["history"]["adaround"]
    assert "mid_block.resnets.0" in errors
    assert all(after <= before for before, after in errors.values())

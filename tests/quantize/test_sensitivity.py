"""One layer quantized alone: the same numbers as a quantized layer, and nothing left behind."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.config import PhaseConfig, Recipe
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import affine
from quest_deploy.quantize.allocate import Bits
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.initialize import initialize_layer
from quest_deploy.quantize.insert import insert, quantizable_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.sensitivity import (
    Entry,
    choose_pairs,
    count_macs,
    damage_between,
    measure_sensitivity,
    predict,
    quantized_alone,
    quantized_parts,
)

PHASE = PhaseConfig(layers="none", steps=0)
RECIPE = Recipe(name="test", weight_bits=4, activation_bits=4, temporal=PHASE, sensitive=PHASE)
# A convolution, a linear layer on tokens, one that carries time.
LAYERS = (
    "down_blocks.0.resnets.0.conv1",
    "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2",
    "down_blocks.0.resnets.0.time_emb_proj",
)


@pytest.fixture
def denoiser(float_model: LoadedModel) -> nn.Module:
    return copy.deepcopy(float_model.denoiser)


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_layer_alone_gives_what_a_quantized_layer_in_its_place_gives(
    name: str, denoiser: nn.Module, recorded: CalibrationSet, inputs: dict[str, Tensor]
) -> None:
    pairs = choose_pairs(recorded, steps=3, prompts=2)
    replaced = copy.deepcopy(denoiser)
    layer = quantizable_layers(replaced)[name]
    qparams = initialize_layer(layer, inputs[name], 4, 4, method="search", time_aware=True, channel_wise=True)
    insert(replaced, {name: qparams}, TimestepContext(recorded.boundaries()))
    expected = predict(replaced, recorded, pairs, 3.0)

    context = TimestepContext(recorded.boundaries())
    insert(denoiser, {}, context)
    layer = quantizable_layers(denoiser)[name]
    untouched = predict(denoiser, recorded, pairs, 3.0)
    ((_, weight, quantizer),) = quantized_parts(layer, inputs[name], RECIPE, [Bits(4, 4)])
    with quantized_alone(layer, weight, quantizer, context):
        got = predict(denoiser, recorded, pairs, 3.0)

    # The same arithmetic in another order: far below what the quantization itself changes.
    change = float((expected - untouched).norm())
    assert float((got - expected).norm()) < 1e-3 * change


def test_layer_is_restored_even_when_the_body_fails(
    denoiser: nn.Module, recorded: CalibrationSet, inputs: dict[str, Tensor]
) -> None:
    context = TimestepContext(recorded.boundaries())
    insert(denoiser, {}, context)
    pairs = choose_pairs(recorded, steps=2, prompts=1)
    before = predict(denoiser, recorded, pairs, 3.0)
    layer = quantizable_layers(denoiser)[LAYERS[0]]
    ((_, weight, quantizer),) = quantized_parts(layer, inputs[LAYERS[0]], RECIPE, [Bits(4, 4)])
    with pytest.raises(KeyboardInterrupt), quantized_alone(layer, weight, quantizer, context):
        assert not torch.equal(predict(denoiser, recorded, pairs, 3.0), before)
        raise KeyboardInterrupt
    assert torch.equal(predict(denoiser, recorded, pairs, 3.0), before)


def test_what_stays_in_float_is_left_alone(denoiser: nn.Module, inputs: dict[str, Tensor]) -> None:
    layer = quantizable_layers(denoiser)[LAYERS[0]]
    parts = {
        str(bits): (weight is not None, quantizer is not None)
        for bits, weight, quantizer in quantized_parts(
            layer, inputs[LAYERS[0]], RECIPE, [Bits.parse(text) for text in ("w4", "a4", "w4a4")]
        )
    }
    assert parts == {"w4": (True, False), "a4": (False, True), "w4a4": (True, True)}


def test_a_layer_alone_has_the_row_of_the_recipes_exponent(
    denoiser: nn.Module, inputs: dict[str, Tensor]
) -> None:
    layer, x = quantizable_layers(denoiser)[LAYERS[0]], inputs[LAYERS[0]]
    recipe = dataclasses.replace(RECIPE, migration_exponent=0.3)
    ((_, _, quantizer),) = quantized_parts(layer, x, recipe, [Bits(4, 4)])
    assert quantizer is not None and quantizer.row is not None
    assert torch.equal(quantizer.row, affine.migration_row(x, layer.weight.detach(), 0.3))


def measure(
    denoiser: nn.Module,
    recorded: CalibrationSet,
    inputs: dict[str, Tensor],
    finished: dict[str, Entry] | None = None,
) -> tuple[list[Entry], list[str]]:
    """The entries, and the names of the layers in the order in which they were told."""
    told: list[str] = []
    entries = measure_sensitivity(
        denoiser,
        recorded,
        inputs,
        dataclasses.replace(RECIPE, channel_wise=False),
        roles=dict.fromkeys(quantizable_layers(denoiser), "other"),
        bits=[Bits(8, None), Bits(4, None), Bits(None, 8), Bits(None, 4)],
        pairs=choose_pairs(recorded, steps=2, prompts=1),
        finished=finished or {},
        after_layer=lambda entry, done, total: told.append(entry["name"]),
    )
    return entries, told


def test_layers_are_told_in_order_and_four_bits_do_more_damage_than_eight(
    denoiser: nn.Module, recorded: CalibrationSet, inputs: dict[str, Tensor]
) -> None:
    names = list(quantizable_layers(denoiser))
    known = {name: {"name": name} for index, name in enumerate(names) if index % 8}
    entries, told = measure(denoiser, recorded, inputs, known)
    assert told == [entry["name"] for entry in entries] == names
    entries = [entry for entry in entries if entry["name"] not in known]
    for part in ("w", "a"):
        worse = [
            entry["damage"][f"{part}4"]["relative_error"] > entry["damage"][f"{part}8"]["relative_error"]
            for entry in entries
        ]
        assert sum(worse) / len(worse) > 0.9


def test_finished_layers_are_not_measured_again(
    denoiser: nn.Module, recorded: CalibrationSet, inputs: dict[str, Tensor]
) -> None:
    # Any call for a finished layer's missing inputs would fail.
    finished = {name: {"name": name} for name in quantizable_layers(denoiser)}
    entries, _ = measure(denoiser, recorded, {}, finished)
    assert entries == list(finished.values())


def test_damage_is_error_power_over_signal_power() -> None:
    reference = torch.ones(4, 1, 2, 2)
    prediction = reference.clone()
    prediction[:2] += 0.1
    prediction[2:] += 0.2
    got = damage_between(reference, prediction, 2)
    assert got["relative_error_by_step"] == pytest.approx([0.01, 0.04], rel=1e-5)
    assert got["relative_error"] == pytest.approx(0.025, rel=1e-5)
    assert got["snr_db"] == pytest.approx((20 + 10 * math.log10(25)) / 2, rel=1e-5)


def test_no_change_is_no_damage() -> None:
    reference = torch.ones(2, 1, 2, 2)
    assert damage_between(reference, reference.clone(), 1)["relative_error"] == 0.0


def test_pairs_reach_from_the_first_step_to_the_last(recorded: CalibrationSet) -> None:
    pairs = choose_pairs(recorded, steps=2, prompts=3)
    assert pairs.step.tolist() == [0, 0, 0, 2, 2, 2]
    assert pairs.prompt.tolist() == [0, 1, 2, 3, 0, 1]


def test_pairs_are_no_more_than_were_recorded(recorded: CalibrationSet) -> None:
    pairs = choose_pairs(recorded, steps=99, prompts=99)
    assert (pairs.steps, pairs.step.numel()) == (3, 12)


def test_macs_of_a_convolution_and_of_a_layer_on_one_vector(
    denoiser: nn.Module, recorded: CalibrationSet
) -> None:
    macs = count_macs(denoiser, recorded)
    layers = quantizable_layers(denoiser)
    # 8x8 latents, padded: every pixel takes the whole kernel.
    assert macs["conv_in"] == 8 * 8 * layers["conv_in"].weight.numel()
    assert macs[LAYERS[2]] == layers[LAYERS[2]].weight.numel()

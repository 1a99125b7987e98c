"""Mixed precision: the chosen bits are the best ones, and they reach the layers that they were chosen for."""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
import random
import re

import pytest

from quest_deploy.config import BitsOverride, PhaseConfig, Recipe
from quest_deploy.errors import ConfigError
from quest_deploy.quantize import allocate as allocation
from quest_deploy.quantize.allocate import (
    Bits,
    Budget,
    LayerSensitivity,
    allocate,
    layers_to_finetune,
    literal,
    overrides,
    read_table,
    summarize,
)
from quest_deploy.quantize.select import layer_bits

NAMES = ("conv_in", "mid.ff.net.0", "mid.ff.net.1", "up.0.to_q", "up.0.to_k", "conv_out")
PAIRS = [(w, a) for w in (4, 8) for a in (4, 8)]


def make_table(seed: int, timesteps: int = 1) -> list[LayerSensitivity]:
    """Six layers of random sizes and damages, the first and last of which are boundaries."""
    numbers = random.Random(seed)
    table = []
    for name in NAMES:
        weight, activation = ([10 ** numbers.uniform(-4, 0) for _ in range(timesteps)] for _ in range(2))
        damage = {Bits(4, None): tuple(weight), Bits(None, 4): tuple(activation)}
        damage |= {Bits(8, None): tuple(d / 100 for d in weight)}
        damage |= {Bits(None, 8): tuple(d / 100 for d in activation)}
        table.append(
            LayerSensitivity(
                name=name,
                role="boundary" if name.startswith("conv") else "other",
                weights=numbers.randrange(10, 1000),
                macs=numbers.randrange(10, 1000),
                damage=damage,
            )
        )
    return table


def every_choice(table: list[LayerSensitivity]) -> list[dict[str, tuple[int, int]]]:
    """All bits that a budget could choose from."""
    options = [[(8, 8)] if layer.role == "boundary" else PAIRS for layer in table]
    return [dict(zip(NAMES, chosen, strict=True)) for chosen in itertools.product(*options)]


BUDGETS = [
    Budget(average_weight_bits=5.9),
    Budget(average_activation_bits=6.2),
    Budget(average_weight_bits=6.4, average_activation_bits=5.9),
]


@pytest.mark.parametrize("budget", BUDGETS, ids=["weights", "activations", "both"])
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("timesteps", "tolerance_db"), [(1, 0.01), (3, 0.3)])
def test_no_other_choice_within_the_budget_is_better(
    timesteps: int, tolerance_db: float, seed: int, budget: Budget
) -> None:
    """Against all 256 choices. With one timestep the program is exact, with more it is a descent."""
    table = make_table(seed, timesteps)

    def keeps(bits: dict[str, tuple[int, int]]) -> bool:
        got = summarize(table, bits)
        return all(
            getattr(got, name) <= limit + 1e-9
            for name, limit in dataclasses.asdict(budget).items()
            if limit is not None
        )

    possible = [bits for bits in every_choice(table) if keeps(bits)]
    if not possible:
        with pytest.raises(ConfigError, match="the least that this model can have"):
            allocate(table, budget)
        return
    best = max(summarize(table, bits).snr_db for bits in possible)
    chosen = allocate(table, budget)
    assert keeps(dict(chosen.bits))
    assert chosen.snr_db >= best - tolerance_db


def test_bytes_are_those_of_packed_weights() -> None:
    table = make_table(0)
    everything = sum(layer.weights for layer in table)
    assert allocate(table, Budget(weight_bytes=everything)).weight_bytes == everything
    half = allocate(table, Budget(weight_bytes=int(0.7 * everything)))
    assert half.weight_bytes <= 0.7 * everything + len(table)


def test_tiny_damages_are_still_told_apart() -> None:
    """A solver has absolute tolerances, and damages of a good model are small."""
    table = [
        dataclasses.replace(layer, damage={bits: (1e-9 * d[0],) for bits, d in layer.damage.items()})
        for layer in make_table(1)
    ]
    budget = Budget(average_weight_bits=6.4)
    assert allocate(table, budget).bits == allocate(make_table(1), budget).bits


def test_first_and_last_convolution_keep_eight_bits() -> None:
    bits = allocate(make_table(0), Budget(average_weight_bits=6.5, average_activation_bits=6.5)).bits
    assert bits["conv_in"] == bits["conv_out"] == (8, 8)


def test_budget_that_cannot_be_kept_names_the_least_that_can() -> None:
    table = make_table(0)
    lowest = {layer.name: (8, 8) if layer.role == "boundary" else (4, 4) for layer in table}
    least = summarize(table, lowest).average_weight_bits
    with pytest.raises(ConfigError, match=f"below {math.ceil(least * 1e4) / 1e4:g}"):
        allocate(table, Budget(average_weight_bits=least - 0.01))
    assert allocate(table, Budget(average_weight_bits=least + 1e-6)).bits["up.0.to_q"][0] == 4


@pytest.mark.parametrize("what", ["average_weight_bits", "weight_bytes", "average_activation_bits"])
@pytest.mark.parametrize("seed", range(6))
def test_the_least_that_is_told_can_be_had(what: str, seed: int) -> None:
    table = make_table(seed)
    with pytest.raises(ConfigError) as caught:
        allocate(table, Budget(**{what: 1}))
    told = re.search(r"below ([\d.]+),", str(caught.value))
    assert told is not None
    least = int(told[1]) if what == "weight_bytes" else float(told[1])
    assert getattr(allocate(table, Budget(**{what: least})), what) <= least


@pytest.mark.parametrize("seed", range(8))
def test_a_budget_of_bytes_is_kept_to_the_byte(seed: int) -> None:
    table = [
        dataclasses.replace(layer, weights=layer.weights * 100_003 + place)
        for place, layer in enumerate(make_table(seed))
    ]
    least = summarize(table, {x.name: (8, 8) if x.role == "boundary" else (4, 4) for x in table}).weight_bytes
    for extra in (0, 1, 12_345, 2_000_001):
        assert allocate(table, Budget(weight_bytes=least + extra)).weight_bytes <= least + extra


def test_a_choice_beyond_the_budget_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A solver whose tolerance is wide: limits are lowered until its choice keeps what was asked for."""
    table, budget = make_table(0), Budget(average_weight_bits=6.5)
    exact, limits = allocate(table, budget), []

    def careless(
        table: object, choices: object, budget: Budget, slack: float, own: object = allocation._limits
    ) -> object:
        limits.append(slack)
        return [
            (row, limit * (1.2 if slack == 0 else 1.0)) for row, limit in own(table, choices, budget, slack)
        ]

    monkeypatch.setattr(allocation, "_limits", careless)
    found = allocate(table, budget)
    assert found.average_weight_bits <= 6.5
    assert limits[:2] == list(allocation.SLACKS[:2])
    assert found.snr_db == pytest.approx(exact.snr_db, abs=0.1)


def test_total_damage_is_the_mean_of_decibels_over_timesteps() -> None:
    """So that a timestep at which everything is damaged does not decide alone."""
    layer = dataclasses.replace(make_table(0)[1], damage={Bits(4, 4): (0.1, 0.001)})
    assert summarize([layer], {layer.name: (4, 4)}).snr_db == pytest.approx(20.0, abs=1e-9)


def test_budget_without_a_limit_is_refused() -> None:
    with pytest.raises(ConfigError, match="no budget"):
        Budget()


def test_damage_measured_together_goes_before_the_sum_of_both_alone() -> None:
    layer = make_table(0)[1]
    alone = layer.damage[Bits(4, None)][0] + layer.damage[Bits(None, 8)][0]
    assert layer.damage_of(4, 8) == pytest.approx([alone], rel=1e-12)
    together = dataclasses.replace(layer, damage={**layer.damage, Bits(4, 8): (0.25,)})
    assert together.damage_of(4, 8) == (0.25,)


def test_bits_that_were_not_measured_are_named() -> None:
    layer = dataclasses.replace(make_table(0)[1], damage={Bits(4, None): (1.0,)})
    with pytest.raises(ConfigError, match="a8 were not measured"):
        layer.damage_of(4, 8)


@pytest.mark.parametrize("text", ["w4", "a8", "w4a8", "w8a4"])
def test_bits_read_back(text: str) -> None:
    assert str(Bits.parse(text)) == text


@pytest.mark.parametrize("text", ["", "w3", "4", "a4w4", "w4a8b", "int8"])
def test_unknown_bits_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        Bits.parse(text)


@pytest.mark.parametrize("seed", range(4))
def test_no_other_layers_within_the_share_have_more_damage(seed: int) -> None:
    """Against all 64 subsets."""
    table, share = make_table(seed), 0.4
    bits = {layer.name: (4, 4) for layer in table}
    total = sum(layer.weights for layer in table)
    best = max(
        sum(layer.damage_of(4, 4)[0] for layer in subset)
        for count in range(len(table) + 1)
        for subset in itertools.combinations(table, count)
        if sum(layer.weights for layer in subset) <= share * total
    )
    chosen = [layer for layer in table if layer.name in layers_to_finetune(table, bits, share)]
    assert sum(layer.weights for layer in chosen) <= share * total
    assert sum(layer.damage_of(4, 4)[0] for layer in chosen) == pytest.approx(best, rel=2e-3)


@pytest.mark.parametrize(("share", "message"), [(0.0, "expected above 0"), (1e-6, "the smallest layer has")])
def test_share_of_no_layer_is_refused(share: float, message: str) -> None:
    table = make_table(0)
    with pytest.raises(ConfigError, match=message):
        layers_to_finetune(table, {layer.name: (4, 4) for layer in table}, share)


@pytest.mark.parametrize("base", PAIRS, ids=["w4a4", "w4a8", "w8a4", "w8a8"])
def test_overrides_give_a_recipe_the_chosen_bits(base: tuple[int, int]) -> None:
    table = make_table(2)
    bits = allocate(table, Budget(average_weight_bits=6.0, average_activation_bits=6.5)).bits
    phase = PhaseConfig(layers="all", steps=1)
    recipe = Recipe(
        name="mixed",
        weight_bits=base[0],
        activation_bits=base[1],
        overrides=tuple(BitsOverride(**entry) for entry in overrides(table, bits, base)),
        temporal=phase,
        sensitive=phase,
    )
    assert layer_bits({layer.name: layer.role for layer in table}, recipe) == bits


def test_layer_that_has_the_base_bits_needs_no_override() -> None:
    table = make_table(0)
    bits = {layer.name: (4, 8) for layer in table} | {"up.0.to_q": (8, 8)}
    assert overrides(table, bits, (4, 8)) == [{"layers": "up.0.to_q", "weight_bits": 8}]


@pytest.mark.parametrize("name", ["up.0.to_q", "blocks[0].net", "odd*name?"])
def test_pattern_of_a_name_matches_that_name_alone(name: str) -> None:
    assert fnmatch.fnmatchcase(name, literal(name))
    assert not fnmatch.fnmatchcase(
        name.replace("*", "x").replace("?", "y").replace("[0]", "0") + "_", literal(name)
    )


def test_table_reads_what_an_analysis_holds() -> None:
    damage = {"w4": {"relative_error_by_step": [0.5, 0.25]}, "w4a8": {"relative_error_by_step": [0.75, 0.5]}}
    layer = {"name": "up.0.to_q", "role": "other", "weights": 12, "macs": 34, "damage": damage}
    assert read_table({"layers": [layer]}) == [
        LayerSensitivity(
            name="up.0.to_q",
            role="other",
            weights=12,
            macs=34,
            damage={Bits(4, None): (0.5, 0.25), Bits(4, 8): (0.75, 0.5)},
        )
    ]

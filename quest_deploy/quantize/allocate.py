"""Mixed precision from measured sensitivity: bits for each layer under a budget, and which layers to finetune.

At each timestep the damage of layers is taken to add up: what one layer's quantization does to the noise prediction is
small and nearly independent of what another's does. With damage d[l, c, t] of layer l at bits c, the noise SNR in
decibels is the mean over timesteps of -10 log10 D_t, D_t = sum_l d[l, c(l), t]. An integer program chooses the bits::

    min  sum_l sum_t d[l, c(l), t] / D_t    subject to    sum_l weights_l * weight_bits(c(l)) <= budget, and so on

in which D_t is that of the previous choice. The logarithm lies below its tangents, so that no round makes it worse.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quest_deploy.errors import ConfigError

if TYPE_CHECKING:
    from quest_deploy.quantize.insert import Role, Roles

WIDTHS = (4, 8)
"""Bits that a layer can have."""

BOUNDARY = (8, 8)
"""Weight and activation bits of the first and last convolution, whatever the budget."""

RELATIVE_GAP = 1e-3
"""How far from the least damage the solver may stop; the last tenth of a per cent takes longer than all before."""
MAX_ROUNDS = 8
SLACKS = (0.0, 1e-9, 1e-8, 1e-7, 1e-6)
"""By which share limits are lowered, one after the other, until the solver's choice keeps what was asked for."""
LEAST_DAMAGE = 1e-20
"""Stands for no damage at all where its logarithm is taken: 200 dB."""


@dataclass(frozen=True)
class Bits:
    """What of a layer is quantized, and to how many bits; None leaves it in float."""

    weight: int | None
    activation: int | None

    def __str__(self) -> str:
        weight = "" if self.weight is None else f"w{self.weight}"
        return weight + ("" if self.activation is None else f"a{self.activation}")

    @staticmethod
    def parse(text: str) -> Bits:
        """`w4`, `a8` or `w4a8`.

        Raises:
            ConfigError: it is none of these.
        """
        match = re.fullmatch(r"(?:w([48]))?(?:a([48]))?", text.strip().lower())
        if not match or not any(match.groups()):
            raise ConfigError(f"bits {text!r} are unknown, expected for example w4, a8 or w4a8 (of 4 and 8)")
        weight, activation = (None if part is None else int(part) for part in match.groups())
        return Bits(weight, activation)


@dataclass(frozen=True, kw_only=True)
class LayerSensitivity:
    """What one layer costs, and what quantizing it alone does.

    Attributes:
        name: Of the layer in the denoiser.
        role: "boundary" layers keep 8 bits.
        outlet: Whether it carries time, and its output meets a stream.
        weights: How many values its weight has.
        macs: Multiplications and additions for one image's forward pass of one guidance branch.
        damage: Mean squared error of the noise prediction over its mean square, by what was quantized, at each
            timestep.
    """

    name: str
    role: Role
    weights: int
    macs: int
    damage: Mapping[Bits, tuple[float, ...]]
    outlet: bool = False

    def damage_of(self, weight_bits: int, activation_bits: int) -> tuple[float, ...]:
        """As measured together, else the sum of both alone.

        Raises:
            ConfigError: neither was measured.
        """
        both = self.damage.get(Bits(weight_bits, activation_bits))
        if both is not None:
            return both
        alone = (Bits(weight_bits, None), Bits(None, activation_bits))
        missing = [str(bits) for bits in alone if bits not in self.damage]
        if missing:
            raise ConfigError(
                f"layer {self.name!r}: {' and '.join(missing)} were not measured; analyze again with these bits"
            )
        return _add(self.damage[bits] for bits in alone)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of an allocation; None is no limit.

    Attributes:
        average_weight_bits: Over all weights of all quantizable layers.
        weight_bytes: Of all weights of all quantizable layers, two 4-bit codes in a byte.
        average_activation_bits: Over all multiplications, each counted with the bits of its activation.
    """

    average_weight_bits: float | None = None
    weight_bytes: int | None = None
    average_activation_bits: float | None = None

    def __post_init__(self) -> None:
        given = (self.average_weight_bits, self.weight_bytes, self.average_activation_bits)
        if all(value is None for value in given):
            raise ConfigError(
                "no budget was given: limit the bytes, or the average weight or activation bits"
            )


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Bits by layer and what they come to; `snr_db` is what the sum of the layers' damages predicts."""

    bits: Mapping[str, tuple[int, int]]
    snr_db: float
    average_weight_bits: float
    average_activation_bits: float
    weight_bytes: int


def allocate(table: Sequence[LayerSensitivity], budget: Budget) -> Allocation:
    """The bits of least damage that keep the budget.

    Raises:
        ConfigError: no choice of bits keeps it (says which least value can be had), or a damage is missing.
    """
    choices = [
        (index, weight_bits, activation_bits)
        for index, layer in enumerate(table)
        for weight_bits, activation_bits in _allowed(layer)
    ]
    _check_budget(table, budget)
    # The first round takes the timesteps as the worst bits have them.
    scale = _add(max(layer.damage_of(w, a) for w, a in _allowed(layer)) for layer in table)
    best: Allocation | None = None
    for _ in range(MAX_ROUNDS):
        found = _solve(table, choices, budget, scale)
        if best is not None and found.snr_db <= best.snr_db:
            break
        best = found
        scale = total_damage(table, found.bits)
    assert best is not None
    return best


def _solve(
    table: Sequence[LayerSensitivity],
    choices: Sequence[tuple[int, int, int]],
    budget: Budget,
    scale: Sequence[float],
) -> Allocation:
    """One round: the choices of least damage over `scale`, one a layer, that keep the budget to the byte."""
    # The solver keeps limits within a tolerance of its own.
    for slack in SLACKS:
        bits = _chosen(table, choices, _limits(table, choices, budget, slack), scale)
        found = None if bits is None else summarize(table, bits)
        if found is not None and _keeps(found, budget):
            return found
    # Little more than the least: nothing else is left to choose.
    return summarize(table, _fewest_bits(table, budget))


def _keeps(found: Allocation, budget: Budget) -> bool:
    return all(
        limit is None or value <= limit
        for value, limit in (
            (found.weight_bytes, budget.weight_bytes),
            (found.average_weight_bits, budget.average_weight_bits),
            (found.average_activation_bits, budget.average_activation_bits),
        )
    )


def _fewest_bits(table: Sequence[LayerSensitivity], budget: Budget) -> dict[str, tuple[int, int]]:
    """The fewest bits of what the budget limits, and the most of what it does not."""
    limited = (
        budget.weight_bytes is not None or budget.average_weight_bits is not None,
        budget.average_activation_bits is not None,
    )
    weight, activation = (min(WIDTHS) if few else max(WIDTHS) for few in limited)
    return {layer.name: BOUNDARY if layer.role == "boundary" else (weight, activation) for layer in table}


def _check_budget(table: Sequence[LayerSensitivity], budget: Budget) -> None:
    """Raise a ConfigError that says the least that can be had where even that is more than the budget."""
    least = summarize(table, _fewest_bits(table, budget))
    for what, limit, value in (
        ("average_weight_bits", budget.average_weight_bits, least.average_weight_bits),
        ("weight_bytes", budget.weight_bytes, least.weight_bytes),
        ("average_activation_bits", budget.average_activation_bits, least.average_activation_bits),
    ):
        if limit is not None and not limit >= value:
            asked, least_of = (
                (str(limit), str(value))
                if what == "weight_bytes"
                else (f"{limit:g}", f"{math.ceil(value * 1e4) / 1e4:g}")
            )
            raise ConfigError(
                f"{what} is {asked}, below {least_of}, the least that this model can have with first and last "
                "convolution at 8 bits; ask for at least that"
            )


def _chosen(
    table: Sequence[LayerSensitivity],
    choices: Sequence[tuple[int, int, int]],
    limits: Sequence[tuple[list[float], float]],
    scale: Sequence[float],
) -> dict[str, tuple[int, int]] | None:
    """The choices of least damage over `scale`, one a layer; None where the solver finds none within the limits."""
    import numpy
    from scipy.optimize import LinearConstraint

    one_each = numpy.zeros((len(table), len(choices)))
    for column, (index, _, _) in enumerate(choices):
        one_each[index, column] = 1
    constraints = [LinearConstraint(one_each, 1, 1)]
    constraints += [
        LinearConstraint(numpy.array([coefficients]), -numpy.inf, limit) for coefficients, limit in limits
    ]
    costs = [_relative(table[i].damage_of(w, a), scale) for i, w, a in choices]
    taken = _program(costs, constraints)
    if taken is None:
        return None
    return {table[i].name: (w, a) for (i, w, a), chosen in zip(choices, taken, strict=True) if chosen}


def _program(costs: Sequence[float], constraints: Sequence[Any]) -> list[bool] | None:
    """The 0-1 program of least cost; None where the constraints cannot be kept."""
    import numpy
    from scipy.optimize import Bounds, milp

    # The solver's tolerances are absolute, so the largest cost is made 1.
    scaled = numpy.array(costs) / max(map(abs, costs))
    options = {"mip_rel_gap": RELATIVE_GAP}
    result = milp(
        scaled,
        integrality=numpy.ones(len(costs)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options=options,
    )
    return None if result.x is None else [bool(value > 0.5) for value in result.x]


def _relative(damage: Sequence[float], scale: Sequence[float]) -> float:
    """sum_t damage_t / scale_t, and a little more, so that no damage at all still is a cost."""
    return sum(max(d, LEAST_DAMAGE) / max(s, LEAST_DAMAGE) for d, s in zip(damage, scale, strict=True))


def _add(damages: Iterable[Sequence[float]]) -> tuple[float, ...]:
    return tuple(map(sum, zip(*damages, strict=True)))


def total_damage(table: Sequence[LayerSensitivity], bits: Mapping[str, tuple[int, int]]) -> tuple[float, ...]:
    """D_t of the module's equation."""
    return _add(layer.damage_of(*bits[layer.name]) for layer in table)


def _allowed(layer: LayerSensitivity) -> list[tuple[int, int]]:
    return [BOUNDARY] if layer.role == "boundary" else [(w, a) for w in WIDTHS for a in WIDTHS]


def _limits(
    table: Sequence[LayerSensitivity],
    choices: Sequence[tuple[int, int, int]],
    budget: Budget,
    slack: float,
) -> list[tuple[list[float], float]]:
    """A coefficient for each choice and the limit of their sum, as averages so that all numbers are of one size.

    Limits are lowered by the share `slack`.
    """
    weights, macs = sum(layer.weights for layer in table), sum(layer.macs for layer in table)
    by_weights = [table[i].weights * w / weights for i, w, _ in choices]
    by_macs = [table[i].macs * a / macs for i, _, a in choices]
    return [
        (coefficients, limit / unit * (1 - slack))
        for coefficients, limit, unit in (
            (by_weights, budget.average_weight_bits, 1.0),
            (by_weights, budget.weight_bytes, weights / 8),
            (by_macs, budget.average_activation_bits, 1.0),
        )
        if limit is not None
    ]


def summarize(table: Sequence[LayerSensitivity], bits: Mapping[str, tuple[int, int]]) -> Allocation:
    """What `bits` come to."""
    total = total_damage(table, bits)
    weights, macs = sum(layer.weights for layer in table), sum(layer.macs for layer in table)
    return Allocation(
        bits=dict(bits),
        snr_db=sum(-10 * math.log10(max(damage, LEAST_DAMAGE)) for damage in total) / len(total),
        average_weight_bits=sum(layer.weights * bits[layer.name][0] for layer in table) / weights,
        average_activation_bits=sum(layer.macs * bits[layer.name][1] for layer in table) / macs,
        weight_bytes=sum(-(-layer.weights * bits[layer.name][0] // 8) for layer in table),
    )


def layers_to_finetune(
    table: Sequence[LayerSensitivity], bits: Mapping[str, tuple[int, int]], share: float
) -> list[str]:
    """The layers of highest total damage whose weights are at most `share` of all, in the order of the table.

    Args:
        table: Measured sensitivity.
        bits: Weight and activation bits by layer.
        share: Above 0, at most 1.

    Raises:
        ConfigError: `share` is out of range, or every layer is larger than that.
    """
    import numpy
    from scipy.optimize import LinearConstraint

    if not 0 < share <= 1:
        raise ConfigError(f"share of parameters is {share:g}, expected above 0 and at most 1")
    scale = total_damage(table, bits)
    total = sum(layer.weights for layer in table)
    sizes = [layer.weights / total for layer in table]
    taken = _program(
        [-_relative(layer.damage_of(*bits[layer.name]), scale) for layer in table],
        [LinearConstraint(numpy.array([sizes]), -numpy.inf, share)],
    )
    if taken is None or not any(taken):
        raise ConfigError(
            f"share of parameters is {share:g}, the smallest layer has {min(sizes):.2g}; ask for at least that"
        )
    return [layer.name for layer, chosen in zip(table, taken, strict=True) if chosen]


def overrides(
    table: Sequence[LayerSensitivity], bits: Mapping[str, tuple[int, int]], base: tuple[int, int]
) -> list[dict[str, Any]]:
    """Entries of a recipe's `overrides`: one for each layer whose bits are not `base`.

    First and last convolution have their 8 bits in any recipe and need none.
    """
    entries = []
    for layer in table:
        if layer.role == "boundary":
            continue
        chosen = bits[layer.name]
        entry: dict[str, Any] = {"layers": literal(layer.name)}
        if chosen[0] != base[0]:
            entry["weight_bits"] = chosen[0]
        if chosen[1] != base[1]:
            entry["activation_bits"] = chosen[1]
        if len(entry) > 1:
            entries.append(entry)
    return entries


def literal(name: str) -> str:
    """`name` as an fnmatch pattern that only it matches."""
    return re.sub(r"([*?[])", r"[\1]", name)


def roles_of(table: Sequence[LayerSensitivity]) -> Roles:
    """The part that each layer plays."""
    from quest_deploy.quantize.insert import Roles  # which imports torch

    return Roles({layer.name: layer.role for layer in table}, [layer.name for layer in table if layer.outlet])


def read_table(sensitivity: Mapping[str, Any]) -> list[LayerSensitivity]:
    """The table from the `sensitivity` of an ``analysis.json``."""
    return [
        LayerSensitivity(
            name=layer["name"],
            role=layer["role"],
            outlet=layer.get("outlet", False),
            weights=layer["weights"],
            macs=layer["macs"],
            damage={
                Bits.parse(bits): tuple(damage["relative_error_by_step"])
                for bits, damage in layer["damage"].items()
            },
        )
        for layer in sensitivity["layers"]
    ]

"""Where the scales of quantized attention start: samples of its operands in full precision."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.config import Recipe
from quest_deploy.errors import CalibrationError, ConfigError
from quest_deploy.model.components import predict
from quest_deploy.quantize import affine
from quest_deploy.quantize.attention import (
    KEY,
    OPERANDS,
    PROBABILITIES,
    QUERY,
    SOFTMAX_QMAX,
    SOFTMAX_QMIN,
    VALUE,
    OperandQParams,
    QuantizedAttention,
    attentions,
    operand_name,
)
from quest_deploy.quantize.calibrate import CalibrationSet, Report
from quest_deploy.quantize.initialize import activation_grid
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.memory import without_trajectories, without_values
from quest_deploy.quantize.resume import WorkDirectory
from quest_deploy.quantize.rows import RowChoice

LEAST_SOFTMAX_MULTIPLE = 0.02
SOFTMAX_SEARCH_STEPS = 50
KEYS = "keys"
VALUES_PER_STEP = 4096
PROMPTS_PER_STEP = 8


@dataclass(frozen=True, kw_only=True)
class AttentionBits:
    """How operands are quantized.

    Attributes:
        operands: Bits of queries, keys and values, 4 or 8.
        probabilities: Whether they are quantized, to codes 0..127; otherwise they stay in float, and values with them.
        max_keys: Attentions over more keys keep their probabilities and values in float.
    """

    operands: int
    probabilities: bool
    max_keys: int


def check_operands(denoiser: nn.Module, recipe: Recipe) -> None:
    """See that the denoiser has attentions whose operands can be quantized, if the recipe asks for it.

    Raises:
        ConfigError: it has none.
    """
    if recipe.attention_bits is not None and not attentions(denoiser):
        raise ConfigError(
            "the denoiser has no attention of a supported kind; set attention_bits to null in the recipe"
        )


def find_operands(
    denoiser: nn.Module,
    data: CalibrationSet,
    recipe: Recipe,
    work: WorkDirectory,
    *,
    seed: int,
    report: Report = lambda completed, total: None,
    at_once: int | None = None,
) -> dict[str, OperandQParams]:
    """Starting scales of all operands as the recipe wants them; none where it leaves attention in float.

    Args:
        denoiser: Full-precision diffusers module.
        data: Recorded trajectories.
        recipe: Bits, and whether scales are time-aware.
        work: Keeps the samples.
        seed: For the choice of prompts and values.
        report: Called after each timestep.
        at_once: The most prompts that are run together; None means all.

    Raises:
        ConfigError: the denoiser has no attention whose products can be quantized.
    """
    if recipe.attention_bits is None:
        return {}
    check_operands(denoiser, recipe)
    saved = work.load("operands")
    if saved is None:
        samples = collect_operands(
            denoiser,
            data,
            prompts_per_step=PROMPTS_PER_STEP,
            values=VALUES_PER_STEP,
            seed=seed,
            report=report,
            at_once=at_once,
        )
        work.save("operands", samples)
    else:
        samples = saved[0]
    return initialize_operands(samples, _bits(recipe), time_aware=recipe.time_aware)


def _bits(recipe: Recipe) -> AttentionBits:
    assert recipe.attention_bits is not None
    return AttentionBits(
        operands=recipe.attention_bits,
        probabilities=recipe.softmax_bits is not None,
        max_keys=recipe.softmax_max_keys,
    )


def attentions_of(denoiser: nn.Module) -> dict[str, Any]:
    """The attentions whose products are quantized, by name.

    Raises:
        ConfigError: there are none.
    """
    found = attentions(denoiser)
    if not found:
        raise ConfigError(
            "the denoiser has no attention of a supported kind; set attention_bits to null in the recipe"
        )
    return found


def any_operands(denoiser: nn.Module, data: CalibrationSet, recipe: Recipe) -> dict[str, OperandQParams]:
    """As `find_operands` gives them but for their values, none of which is computed: for estimates.

    Raises:
        ConfigError: the denoiser has no attention whose products can be quantized.
    """
    if recipe.attention_bits is None:
        return {}
    keys: dict[str, int] = {}
    bare, shapes = without_values(denoiser, TimestepContext(torch.empty(0))), without_trajectories(data)
    for name, attention in attentions_of(bare).items():

        def hook(module: nn.Module, args: Any, output: Tensor, name: str = name) -> None:
            keys[name] = output.shape[1]

        attention.to_k.register_forward_hook(hook)
    one = torch.zeros(1, dtype=torch.int64)
    with torch.no_grad():
        predict(bare, *shapes.inputs(one, one))
    bits = _bits(recipe)
    scale = torch.full([data.timesteps.numel() if recipe.time_aware else 1], 0.1)
    return {
        operand_name(name, operand): OperandQParams(group_scale=scale, qmin=SOFTMAX_QMIN, qmax=SOFTMAX_QMAX)
        for name, count in keys.items()
        for operand in OPERANDS
        if operand in (QUERY, KEY) or _has_codes(torch.tensor(count), bits)
    }


class Observer(nn.Module):
    """Stands where a quantizer will be, changes nothing, and keeps samples of what passes."""

    def __init__(self, name: str, count: int, choice: RowChoice) -> None:
        super().__init__()
        self.name, self.count, self.choice = name, count, choice
        self.kept: list[Tensor] = []
        self.last_size = 0

    def forward(self, x: Tensor, group: Tensor) -> tuple[Tensor, None]:
        """`x`, any shape, and no factor for the product."""
        run, places, chosen = self.choice.of(self.name, x.numel(), self.count)
        low, high = x.amin(), x.amax()
        if self.choice.first == 0:
            self.kept.append(torch.cat([x.new_empty(self.count), low[None], high[None]]))
        seen = self.kept[self.choice.place(self.name, run)]
        seen[places] = x.flatten()[chosen]
        seen[-2], seen[-1] = torch.minimum(seen[-2], low), torch.maximum(seen[-1], high)
        self.last_size = max(self.last_size, x.shape[-1])
        return x, None


@contextmanager
def _observed(denoiser: nn.Module, count: int, choice: RowChoice) -> Iterator[dict[str, Observer]]:
    """Observers at all operands while the body runs, by the name of the quantizer that will be there."""
    found = attentions(denoiser)
    before = {name: attention.processor for name, attention in found.items()}
    context = TimestepContext(torch.empty(0))
    observers: dict[str, Observer] = {}
    try:
        for name, attention in found.items():
            own = {operand: Observer(operand_name(name, operand), count, choice) for operand in OPERANDS}
            observers |= {observer.name: observer for observer in own.values()}
            attention.processor = QuantizedAttention(own, context)
        yield observers
    finally:
        for name, attention in found.items():
            # torch refuses a plain object where a module is.
            del attention.processor
            attention.processor = before[name]


@torch.no_grad()
def collect_operands(
    denoiser: nn.Module,
    data: CalibrationSet,
    *,
    prompts_per_step: int,
    values: int,
    seed: int,
    report: Report = lambda completed, total: None,
    at_once: int | None = None,
) -> dict[str, Tensor]:
    """What the operands of every attention's products are, timestep by timestep.

    Args:
        denoiser: Full-precision diffusers module.
        data: Recorded trajectories.
        prompts_per_step: How many prompts are run at each timestep.
        values: How many values of each operand are kept per timestep.
        seed: For the choice of prompts and values.
        report: Called after each timestep.
        at_once: The most prompts that are run together; None means all.

    Returns:
        By name of the operand's quantizer float32 [G, values + 2], the last two the least and largest of all values;
        and as ``<quantizer of the probabilities>.keys`` the largest number of keys, int64 [1]. Groups ascend with the
        timestep.

    Raises:
        CalibrationError: an attention was not run exactly once in each call of the denoiser.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = data.timesteps.numel()
    choice = RowChoice(torch.Generator().manual_seed(seed), data.targets.shape[2])
    attentions_of(denoiser)
    with _observed(denoiser, values, choice) as observers:
        for step in range(steps):
            prompt = torch.randperm(data.num_prompts, generator=generator)[:prompts_per_step]
            for chunk in choice.chunks(prompt, at_once or prompts_per_step):
                predict(denoiser, *data.inputs(chunk, torch.full_like(chunk, step)))
            report(step + 1, steps)
    result: dict[str, Tensor] = {}
    for name, observer in observers.items():
        if len(observer.kept) != steps:
            raise CalibrationError(
                f"{name!r}: got {len(observer.kept)} runs in {steps} calls of the denoiser, expected one in each; "
                "set attention_bits to null in the recipe"
            )
        # Timesteps descend, groups ascend with the timestep.
        result[name] = torch.stack(observer.kept[::-1])
        if name.endswith(f".{PROBABILITIES}"):
            result[f"{name}.{KEYS}"] = torch.tensor([observer.last_size])
    return result


def initialize_operands(
    samples: Mapping[str, Tensor], bits: AttentionBits, *, time_aware: bool
) -> dict[str, OperandQParams]:
    """Starting scales of all operands, by the name of their quantizer; `samples` as `collect_operands` gives them."""
    result: dict[str, OperandQParams] = {}
    for name, values in samples.items():
        attention, _, operand = name.rpartition(".")
        if operand not in OPERANDS:
            continue
        # A product has codes on both sides or on none.
        if operand in (VALUE, PROBABILITIES) and not _has_codes(
            samples[f"{attention}.{PROBABILITIES}.{KEYS}"], bits
        ):
            continue
        if operand == PROBABILITIES:
            result[name] = _probabilities(values, time_aware=time_aware)
        else:
            result[name] = _signed(values, bits.operands, time_aware=time_aware)
    return result


def _has_codes(keys: Tensor, bits: AttentionBits) -> bool:
    return bits.probabilities and int(keys) <= bits.max_keys


def _signed(values: Tensor, bits: int, *, time_aware: bool) -> OperandQParams:
    """Queries, keys and values [G, s + 2] are calibrated as the input of a layer of one channel."""
    inputs = values[..., None]
    grid = activation_grid(inputs, bits)
    group_scale = torch.tensor([grid.scale])
    if time_aware and bits == 8:
        group_scale = affine.minmax_group_scale(inputs, grid)
    elif time_aware:
        group_scale = affine.search_group_scale(values[:, :-2], grid)
    return OperandQParams(group_scale=group_scale, qmin=grid.qmin, qmax=grid.qmax)


def _probabilities(values: Tensor, *, time_aware: bool) -> OperandQParams:
    """The scale of least squared error among fractions of the one that holds the largest of the values [G, s + 2]."""
    grid = affine.Grid(max(float(values.max()), 1e-6) / SOFTMAX_QMAX, SOFTMAX_QMIN, SOFTMAX_QMAX)
    group_scale = affine.search_group_scale(
        values if time_aware else values.reshape(1, -1),
        grid,
        low=LEAST_SOFTMAX_MULTIPLE,
        high=1.0,
        steps=SOFTMAX_SEARCH_STEPS,
    )
    return OperandQParams(group_scale=group_scale, qmin=SOFTMAX_QMIN, qmax=SOFTMAX_QMAX)

"""How much memory a pass takes, found without computing anything, and what to do where it is too much."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from quest_deploy.errors import ConfigError
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.losses import Draw, Objective, network_loss
from quest_deploy.quantize.trace import tensors_in
from quest_deploy.quantize.walk import Steps

META = torch.device("meta")
GIGABYTE = 10**9


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made while it is active, and the most that lived at once.

    Attributes:
        live: Bytes that live now.
        peak: The most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_in(result):
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._forget, key, size)
        return result

    def _forget(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.live -= size


def enable_checkpointing(denoiser: nn.Module, context: TimestepContext) -> None:
    """Let `denoiser` keep the inputs of its blocks alone for backpropagation, and compute the rest again.

    A walk runs the denoiser at several timesteps before it goes back, so that each block must be run again in the
    timesteps that it ran at, which are `context`'s at that time.

    Raises:
        ConfigError: the model's class in diffusers does not offer it.
    """

    def in_its_group(block: Callable[..., Any], *args: Any) -> Any:
        then = context.now

        def run(*given: Any) -> Any:
            before, context.now = context.now, then
            try:
                return block(*given)
            finally:
                context.now = before

        return checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False)

    try:
        denoiser.enable_gradient_checkpointing(gradient_checkpointing_func=in_its_group)  # type: ignore[operator]
    except (AttributeError, ValueError) as error:
        raise ConfigError(
            f"{type(denoiser).__name__} of diffusers has no gradient checkpointing; leave gradient_checkpointing out"
        ) from error


def without_values(denoiser: nn.Module, context: TimestepContext) -> nn.Module:
    """A copy of `denoiser` whose tensors have shapes and no values; it shares `context`."""
    memo: dict[int, Any] = {id(context): context}
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        empty = torch.empty_like(tensor, device=META)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    result = copy.deepcopy(denoiser, memo)
    for layer in quantized_layers(result).values():
        layer._cached = None
    return result


def without_trajectories(data: CalibrationSet) -> CalibrationSet:
    """One prompt of `data`, without values."""

    def one(tensor: Tensor) -> Tensor:
        return torch.empty([1, *tensor.shape[1:]], dtype=tensor.dtype, device=META)

    targets = torch.empty([1, *data.targets.shape[1:]], device=META)
    return CalibrationSet(
        timesteps=data.timesteps.to(META),
        latents=one(data.latents),
        targets=targets,
        positive={name: one(value) for name, value in data.positive.items()},
        negative={name: one(value) for name, value in data.negative.items()},
        device=META,
    )


@dataclass(frozen=True, kw_only=True)
class PassMemory:
    """Peak bytes of forward and backward: `fixed` + `each` for every pair or walk.

    Attributes:
        fixed: Whatever the batch.
        each: For one more.
    """

    fixed: int
    each: int

    def most(self, budget: float) -> int:
        """How many fit into `budget` bytes."""
        return int((budget - self.fixed) // max(1, self.each))


def pass_memory(
    denoiser: nn.Module, data: CalibrationSet, context: TimestepContext, objective: Objective, *, walks: bool
) -> PassMemory:
    """What gradients of pairs (or of walks) take, beside the parameters.

    Args:
        denoiser: Its parameters that ask for gradients are the ones that learn. No value is read.
        data: Gives shapes.
        context: The denoiser's.
        objective: Gives the length of walks.
        walks: Which of both.
    """
    before = context.now
    bare, shapes = without_values(denoiser, context), without_trajectories(data)
    timesteps = data.timesteps.numel()
    length = objective.walk_length
    # Where values are missing, which ones they are does not matter.
    steps = None if objective.steps is None else Steps(torch.ones(timesteps), torch.ones(timesteps))
    empty = torch.zeros(0, dtype=torch.int64)
    plain = Objective(
        raw=torch.ones(timesteps),
        walks=torch.ones(timesteps),
        steps=steps,
        walk_length=length,
        walk_share=objective.walk_share,
        guidance_scale=objective.guidance_scale,
    )
    peaks = []
    for count in (1, 2):
        many = torch.zeros(count, dtype=torch.int64)
        drawn = (
            Draw(empty, empty, many, many, 1, count) if walks else Draw(many, many, empty, empty, count, 0)
        )
        with PeakMemory() as memory:
            network_loss(bare, shapes, plain, drawn).backward()
        peaks.append(memory.peak)
        bare.zero_grad(set_to_none=True)
    context.now = before
    each = max(1, peaks[1] - peaks[0])
    return PassMemory(fixed=max(0, peaks[0] - each), each=each)


def size_bytes(tensors: Mapping[str, Tensor] | list[Tensor]) -> int:
    """Of all of them together."""
    values = tensors.values() if isinstance(tensors, Mapping) else tensors
    return sum(tensor.numel() * tensor.element_size() for tensor in values)


def limit_slices(
    held_bytes: int, limit_gb: float, pairs: PassMemory, walks: PassMemory | None
) -> tuple[int, int]:
    """How many pairs and how many walks can go through backpropagation at once.

    Args:
        held_bytes: What is in memory all the time.
        limit_gb: What may be, at most.
        pairs: Of a pass over pairs.
        walks: Of a pass over walks; None where there are none.

    Raises:
        ConfigError: not even one fits.
    """
    budget = limit_gb * GIGABYTE - held_bytes
    found = (pairs.most(budget), 1 if walks is None else walks.most(budget))
    if min(found) < 1:
        largest = max(pair.fixed + pair.each for pair in (pairs, walks) if pair is not None)
        needed = (held_bytes + largest) / GIGABYTE
        raise ConfigError(
            f"memory_limit_gb is {limit_gb:g}, expected at least {needed:.2f} for this model and recipe; raise it, set "
            "gradient_checkpointing, choose fewer layers, or shorten walk_length"
        )
    return found

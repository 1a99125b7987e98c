"""How much memory a pass takes, found without computing anything, and what to do where it is too much."""

from __future__ import annotations

import copy
import dataclasses
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from quest_deploy.config import FinetuneConfig, Recipe, Targets
from quest_deploy.errors import ConfigError
from quest_deploy.model.components import predict
from quest_deploy.model.denoisers import CONTROL
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize import learned
from quest_deploy.quantize.calibrate import CalibrationSet, from_tensors, told_to
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.losses import Draw, Objective, network_loss, temporal_conditioning, temporal_loss
from quest_deploy.quantize.pictures import control_shape, sees_pictures, without_pictures
from quest_deploy.quantize.trace import Trace, tensors_in
from quest_deploy.quantize.walk import Steps

META, CPU = torch.device("meta"), torch.device("cpu")
GIGABYTE = 10**9
PROMPTS = 8
Module = TypeVar("Module", bound=nn.Module)


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


def without_values(denoiser: Module, context: TimestepContext) -> Module:
    """A copy of `denoiser` whose tensors have shapes and no values, as one that ran before; it shares `context`."""
    memo: dict[int, Any] = {id(context): context}
    for tensor in (*denoiser.parameters(), *denoiser.buffers()):
        empty = torch.empty_like(tensor, device=META)
        if isinstance(tensor, nn.Parameter):
            empty = nn.Parameter(empty, requires_grad=tensor.requires_grad)
        memo[id(tensor)] = empty
    result = copy.deepcopy(denoiser, memo)
    for layer in quantized_layers(result).values():
        layer.drop_rounded()
        if not (layer.frozen or layer.weight_learns()):
            layer.quantized_weight()
    return result


def cached_bytes(student: nn.Module) -> int:
    """Of the rounded weights that layers keep whose weights do not learn."""
    layers = quantized_layers(student).values()
    return size_bytes([layer.weight for layer in layers if not layer.weight_learns()])


def without_trajectories(data: CalibrationSet) -> CalibrationSet:
    """One prompt of `data`, without values."""

    def bare(module: Module) -> Module:
        return without_values(module, TimestepContext(torch.empty(0)))

    one = {
        name: torch.empty([1, *value.shape[1:]], dtype=value.dtype, device=META)
        for name, value in data.tensors().items()
    }
    return from_tensors(
        one | {"timesteps": data.timesteps.to(META)},
        teacher=None if isinstance(data.targets, Tensor) else bare(data.targets.teacher),
        device=META,
        control=None if data.control is None else bare(data.control),
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

    @classmethod
    def measured(cls, peak: Callable[[int], int], most: int) -> PassMemory:
        """From the peaks of passes over one and over `most`.

        A peak is the largest of many sums, each linear in the batch, so that between the two it is never underrated.
        """
        one = peak(1)
        each = max(1, -(-(peak(most) - one) // (most - 1)))
        return cls(fixed=max(0, one - each), each=each)

    def most(self, budget: float) -> int:
        """How many fit into `budget` bytes."""
        return int((budget - self.fixed) // max(1, self.each))


def pass_memory(
    denoiser: nn.Module,
    data: CalibrationSet,
    context: TimestepContext,
    objective: Objective,
    *,
    walks: bool,
    most: int = PROMPTS,
    passes: int = 1,
) -> PassMemory:
    """What gradients of pairs (or of walks) take in an update, beside the parameters.

    Args:
        denoiser: Its parameters that ask for gradients are the ones that learn. No value is read.
        data: Gives shapes.
        context: The denoiser's.
        objective: Gives the length of walks.
        walks: Which of both.
        most: That go through a pass.
        passes: Of an update: gradients of the ones before are kept.
    """
    before = context.now
    bare, shapes = without_values(denoiser, context), without_trajectories(data)
    # Where values are missing, which ones they are does not matter.
    ones = torch.ones(data.timesteps.numel())
    steps = None if objective.steps is None else Steps(ones, ones)
    plain = dataclasses.replace(objective, raw=ones, walks=ones, steps=steps)
    empty = torch.zeros(0, dtype=torch.int64)

    def peak(count: int) -> int:
        many = torch.zeros(count, dtype=torch.int64)
        drawn = (
            Draw(empty, empty, many, many, 1, count) if walks else Draw(many, many, empty, empty, count, 0)
        )
        with PeakMemory() as memory, learned.quantized_once(quantized_layers(bare).values()):
            for _ in range(passes):
                network_loss(bare, shapes, plain, drawn).backward()
        bare.zero_grad(set_to_none=True)
        return memory.peak

    found = PassMemory.measured(peak, max(2, most))
    context.now = before
    return found


def temporal_memory(
    student: nn.Module,
    teacher: nn.Module,
    trace: Trace,
    data: CalibrationSet,
    context: TimestepContext,
    count: int,
) -> int:
    """Peak bytes of gradients of the temporal layers' own loss at `count` timesteps, beside the parameters.

    Args:
        student: Its parameters that ask for gradients are the ones that learn. No value is read.
        teacher: Full precision.
        trace: Theirs.
        data: Gives shapes.
        context: The student's.
        count: Timesteps.
    """
    before, shapes = context.now, without_trajectories(data)
    bare, target = without_values(student, context), without_values(teacher, context)
    conditioning = temporal_conditioning(trace, shapes, count, torch.Generator())
    with PeakMemory() as memory:
        loss = temporal_loss(bare, target, trace, torch.empty(count, device=META), conditioning, context)
        if loss.requires_grad:
            loss.backward()
    context.now = before
    return memory.peak


@torch.no_grad()
def forward_memory(
    denoiser: nn.Module, data: CalibrationSet, context: TimestepContext | None = None
) -> PassMemory:
    """What a pass without gradients takes for each prompt, all branches, beside the parameters.

    Args:
        denoiser: Quantized or not. No value is read.
        data: Gives shapes.
        context: The denoiser's, if it is quantized.
    """
    context = context or TimestepContext(torch.empty(0))
    before = context.now
    bare, shapes = without_values(denoiser, context), without_trajectories(data)

    def peak(count: int) -> int:
        at = torch.zeros(count, dtype=torch.int64)
        with PeakMemory() as memory:
            predict(bare, *shapes.inputs(at, at))
        return memory.peak

    found = PassMemory.measured(peak, PROMPTS)
    context.now = before
    return found


def limit_count(most: int, held_bytes: float, limit_gb: float | None, each: PassMemory) -> int:
    """How many prompts or samples go through a pass at once: `most`, or what the limit leaves room for.

    Args:
        most: Without a limit.
        held_bytes: What is in memory all the time.
        limit_gb: What may be, at most; None means no limit.
        each: Of the pass.

    Raises:
        ConfigError: not even one fits.
    """
    if limit_gb is None:
        return most
    found = each.most(limit_gb * GIGABYTE - held_bytes)
    if found < 1:
        raise _too_little(limit_gb, held_bytes + each.fixed + each.each, "")
    return min(most, found)


def _too_little(limit_gb: float, needed_bytes: float, otherwise: str) -> ConfigError:
    return ConfigError(
        f"memory_limit_gb is {limit_gb:g}, expected at least {_rounded_up(needed_bytes)} for this model and recipe; "
        f"raise it{otherwise}"
    )


def _rounded_up(size_bytes: float) -> str:
    """In gigabytes, with three digits, and never less than it is."""
    gigabytes = size_bytes / GIGABYTE
    unit = 10.0 ** (math.floor(math.log10(gigabytes)) - 2)
    return f"{math.ceil(gigabytes / unit) * unit:.6g}"


def placeholder(model: LoadedModel, config: FinetuneConfig, device: torch.device = CPU) -> CalibrationSet:
    """A calibration set of the shapes that recording would give, whose tensors take no memory; for `device`."""
    recipe = config.recipe
    prompts, steps = recipe.calibration_prompts, recipe.calibration_steps
    shape = model.latent_shape
    positive, negative = told_to(model, config.prompts[:1], recipe.guidance_scale)
    if sees_pictures(model):
        negative = None if negative is None else without_pictures(negative)
        if model.controlnet is not None:
            positive[CONTROL] = torch.zeros(1, *control_shape(model, shape[1:]))
    one = torch.zeros(())
    result = CalibrationSet(
        timesteps=model.denoiser_time(
            torch.linspace(model.scheduler.config.num_train_timesteps - 1, 0, steps)
        ),
        latents=one.expand(prompts, steps, *shape),
        targets=one.expand(prompts, steps, 1 if negative is None else 2, *shape),
        positive={name: value.expand(prompts, *value.shape[1:]) for name, value in positive.items()},
        negative=negative or {},
        device=device,
        control=model.control,
    )
    if recipe.targets != "recompute":
        return result
    tensors = {name: value for name, value in result.tensors().items() if name != "targets"}
    return from_tensors(tensors, teacher=model.denoiser, device=device, control=model.control)


def weight_bytes(model: LoadedModel) -> int:
    """Of everything of a model that is in memory."""
    modules = (model.denoiser, *model.text_encoders.values(), model.vae, model.controlnet)
    return sum(
        size_bytes([*module.parameters(), *module.buffers()]) for module in modules if module is not None
    )


def kept_bytes(data: CalibrationSet, targets: Targets) -> int:
    """Of what recording gives that is kept, in memory or on disk."""
    size = size_bytes(data.tensors())
    if targets == "recompute" and isinstance(data.targets, Tensor):
        size -= size_bytes([data.targets])
    return size


def held_bytes(model: LoadedModel, data: CalibrationSet, recipe: Recipe) -> int:
    """Of the model, and of what was recorded unless that is read from disk."""
    return weight_bytes(model) + (0 if recipe.targets == "disk" else kept_bytes(data, recipe.targets))


def prompts_at_once(
    model: LoadedModel, data: CalibrationSet, recipe: Recipe, most: int, beside_bytes: int = 0
) -> int:
    """How many prompts go through the full-precision denoiser at once.

    Args:
        model: Full precision.
        data: Recorded trajectories, or their :func:`placeholder`.
        recipe: Its limit, and where targets are kept.
        most: Without a limit.
        beside_bytes: What else is in memory meanwhile.

    Raises:
        ConfigError: not even one fits.
    """
    if recipe.memory_limit_gb is None:
        return most
    held = held_bytes(model, data, recipe) + beside_bytes
    return limit_count(most, held, recipe.memory_limit_gb, forward_memory(model.denoiser, data))


def size_bytes(tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> int:
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
        raise _too_little(
            limit_gb,
            held_bytes + largest,
            ", set gradient_checkpointing, choose fewer layers, or shorten walk_length",
        )
    return found

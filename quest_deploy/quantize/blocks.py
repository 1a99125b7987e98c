"""Parts of a denoiser that are learned one by one: which there are, and what each is given and should answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.model.components import predict
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.memory import without_trajectories, without_values

SHAPE_PROMPTS = 8
ATTENTION_AND_RESNETS = ("Attention", "ResnetBlock2D", "ResnetBlockCondNorm2D")


@dataclass(frozen=True)
class Samples:
    """What a part of the network is given at n samples, and what it should answer.

    Attributes:
        args: Its positional arguments; tensors whose first axis has n * rows entries hold the samples.
        kwargs: Its keyword arguments, likewise.
        timestep: float32 [n].
        targets: Its output tensors in full precision, [n * rows, ...] each.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    timestep: Tensor
    targets: tuple[Tensor, ...]

    @property
    def rows(self) -> int:
        """Of each sample, one after another: two where a layer is given an image's height and its width, else one."""
        return _rows(self.targets, self.timestep.numel())

    def batch(self, index: Tensor) -> Samples:
        """The samples `index`, int64 [m]."""
        count = self.timestep.numel() * self.rows
        places = (index[:, None] * self.rows + torch.arange(self.rows, device=index.device)).flatten()
        return Samples(
            tuple(_take(value, places, count) for value in self.args),
            {name: _take(value, places, count) for name, value in self.kwargs.items()},
            self.timestep[index],
            tuple(target[places] for target in self.targets),
        )

    def to(self, device: torch.device) -> Samples:
        """The same on another device."""
        return Samples(
            tuple(_put(value, device) for value in self.args),
            {name: _put(value, device) for name, value in self.kwargs.items()},
            self.timestep.to(device),
            tuple(target.to(device) for target in self.targets),
        )

    @property
    def size_bytes(self) -> int:
        """Of all tensors."""
        given = (*self.args, *self.kwargs.values(), *self.targets)
        return sum(x.numel() * x.element_size() for x in given if isinstance(x, Tensor))


def parts(denoiser: nn.Module) -> list[str]:
    """Names of what is reconstructed as one: residual and transformer blocks, and every other quantized layer alone."""
    blocks = [name for name, module in denoiser.named_modules() if _is_block(module)]
    outermost = [name for name in blocks if not any(name.startswith(f"{other}.") for other in blocks)]
    names = list(quantized_layers(denoiser))
    inside = {name for name in names if any(name.startswith(f"{block}.") for block in outermost)}
    used = [block for block in outermost if any(name.startswith(f"{block}.") for name in names)]
    return used + [name for name in names if name not in inside]


def _is_block(module: nn.Module) -> bool:
    # By name: diffusers moves its classes about, and each family of transformers has blocks of its own.
    name = type(module).__name__
    return name in ATTENTION_AND_RESNETS or name.endswith("TransformerBlock")


class _Reached(Exception):
    """Ends a pass through the network at the part that was asked for."""


Call = tuple[tuple[Any, ...], dict[str, Any]]


def given(denoiser: nn.Module, name: str, run: Callable[[], object]) -> Call:
    """The arguments that `run`, one pass of `denoiser`, gives to its submodule `name`."""
    found: list[Call] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append((args, kwargs))
        raise _Reached

    _until_reached(denoiser.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True), run)
    return found[0]


def answered(denoiser: nn.Module, name: str, run: Callable[[], object]) -> tuple[Tensor, ...]:
    """The tensors that submodule `name` of `denoiser` answers in one pass, `run`."""
    found: list[tuple[Tensor, ...]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(tensors(output))
        raise _Reached

    _until_reached(denoiser.get_submodule(name).register_forward_hook(hook), run)
    return found[0]


def _until_reached(handle: Any, run: Callable[[], object]) -> None:
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()


def chosen_pairs(data: CalibrationSet, prompts_per_step: int, seed: int) -> list[tuple[Tensor, int]]:
    """For each step, the prompts [n] whose trajectories are used there."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randperm(data.num_prompts, generator=generator)[:prompts_per_step], step)
        for step in range(data.timesteps.numel())
    ]


def in_chunks(
    pairs: Sequence[tuple[Tensor, int]], branches: int, at_once: int
) -> tuple[list[tuple[Tensor, int]], Tensor]:
    """`pairs` with at most `at_once` prompts each; and, of their samples, which ones those of `pairs` are in order.

    Samples of a pass are all prompts of the negative branch, then all of the positive one.

    Returns:
        Pairs, and int64 [samples].
    """
    chunks: list[tuple[Tensor, int]] = []
    places: list[Tensor] = []
    start = 0
    for prompt, step in pairs:
        samples = torch.arange(branches * prompt.numel()).reshape(branches, -1)
        parts = samples.split(at_once, dim=1)
        # Sample `there[i]` of this pass is the i-th that its chunks give.
        there = torch.cat([part.flatten() for part in parts])
        places.append(start + there.argsort())
        start += there.numel()
        chunks += [(chunk, step) for chunk in prompt.split(at_once)]
    return chunks, torch.cat(places)


def passes(
    denoiser: nn.Module, data: CalibrationSet, pairs: Sequence[tuple[Tensor, int]]
) -> Iterator[tuple[Callable[[], object], Tensor]]:
    """A pass of `denoiser` for each of `pairs`, to be called, and its samples' timesteps [n]."""
    for prompt, step in pairs:
        sample, timestep, conditioning, _ = data.batch(prompt, torch.full_like(prompt, step))
        yield lambda: predict(denoiser, sample, timestep, conditioning), timestep  # noqa: B023


@torch.no_grad()
def collect(
    student: nn.Module,
    teacher: nn.Module,
    name: str,
    data: CalibrationSet,
    pairs: Sequence[tuple[Tensor, int]],
    at_once: int | None = None,
) -> Samples:
    """What the quantized network gives to its part `name`, and what the full-precision one answers there.

    At most `at_once` prompts are run together, which changes nothing about the samples or their order.
    """
    calls, timesteps, targets = [], [], []
    order = None
    if at_once is not None and any(prompt.numel() > at_once for prompt, _ in pairs):
        pairs, order = in_chunks(pairs, data.targets.shape[2], at_once)
    for (run, timestep), (run_teacher, _) in zip(
        passes(student, data, pairs), passes(teacher, data, pairs), strict=True
    ):
        calls.append(given(student, name, run))
        targets.append(answered(teacher, name, run_teacher))
        timesteps.append(timestep)
    # An axis that only happens to be a multiple of the samples' number, as that of tokens, is no axis of samples.
    rows = _rows(targets[0], timesteps[0].numel())
    sizes = [timestep.numel() * rows for timestep in timesteps]
    samples = Samples(
        tuple(_join(values, sizes) for values in zip(*(args for args, _ in calls), strict=True)),
        {key: _join([kwargs[key] for _, kwargs in calls], sizes) for key in calls[0][1]},
        torch.cat(timesteps),
        tuple(torch.cat(parts) for parts in zip(*targets, strict=True)),
    )
    return samples if order is None else samples.batch(order)


@torch.no_grad()
def shapes_of(student: nn.Module, data: CalibrationSet, context: TimestepContext) -> dict[str, Samples]:
    """What every part of `student` is given and answers, in the order in which they run; no value is computed."""
    before = context.now
    bare, shapes = without_values(student, context), without_trajectories(data)
    found: dict[str, Samples] = {}
    # So many that no other axis of a tensor is taken for the samples'.
    at = torch.zeros(SHAPE_PROMPTS, dtype=torch.int64)
    sample, timestep, conditioning, _ = shapes.batch(at, at)

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            found[name] = Samples(args, kwargs, timestep, tensors(output))

        return hook

    for name in parts(bare):
        bare.get_submodule(name).register_forward_hook(note(name), with_kwargs=True)
    predict(bare, sample, timestep, conditioning)
    context.now = before
    return found


def tensors(output: Any) -> tuple[Tensor, ...]:
    """The tensors that a module answered, without what else it did."""
    return (output,) if isinstance(output, Tensor) else tuple(x for x in output if isinstance(x, Tensor))


def _rows(targets: Sequence[Tensor], samples: int) -> int:
    return max(1, targets[0].shape[0] // samples)


def _per_sample(value: object, count: int) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == count


def _take(value: Any, index: Tensor, count: int) -> Any:
    return value[index] if _per_sample(value, count) else value


def _put(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value


def _join(values: Sequence[Any], sizes: Sequence[int]) -> Any:
    """One argument of several passes: joined along the samples, or the first where it is the same for all of them."""
    whole = all(_per_sample(value, size) for value, size in zip(values, sizes, strict=True))
    return torch.cat(list(values)) if whole else values[0]

"""What every runtime offers: named torch tensors in, named torch tensors out, inputs checked once and in one place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor

from quest_deploy.errors import EngineInputError
from quest_deploy.model.spec import ComponentSpec, TensorSpec

Limits = Mapping[str, tuple[int, int]]
"""Smallest and largest value of a symbolic dimension, by its name."""


class Engine(Protocol):
    """One component, ready to run. A context manager that frees what it holds."""

    spec: ComponentSpec

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once. Inputs and outputs are those of `spec`."""

    def close(self) -> None:
        """Free everything; calling it again does nothing."""

    def __enter__(self) -> Engine: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


class Batched(Protocol):
    """An engine with optimization profiles: it takes batches of some sizes alone."""

    def batch_ranges(self, shapes: Mapping[str, tuple[int, ...]]) -> Sequence[tuple[int, int]]:
        """Fewest and most samples at once by each profile that holds all sizes of `shapes` beside the batch."""


def batched(engine: Engine) -> Batched | None:
    """`engine` as one with profiles; None where it has none.

    Not by `isinstance`, which from Python 3.12 on overlooks what a wrapper passes on.
    """
    return cast("Batched", engine) if hasattr(engine, "batch_ranges") else None


def device_of(engine: Engine) -> torch.device:
    """Where an engine's tensors lie: the CPU, unless it says otherwise."""
    device: torch.device = getattr(engine, "device", torch.device("cpu"))
    return device


Closable = TypeVar("Closable", bound="Closing")


class Closing:
    """`with` for whatever holds something until `close`."""

    def close(self) -> None:
        """Free everything; calling it again does nothing."""
        raise TypeError(f"{type(self).__name__} does not define how it is closed")

    def __enter__(self: Closable) -> Closable:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def check_inputs(spec: ComponentSpec, inputs: Mapping[str, Tensor], limits: Limits | None = None) -> None:
    """Check names, types and shapes before anything runs.

    Args:
        spec: The component.
        inputs: Tensors by input name.
        limits: Bounds of symbolic dimensions, where the engine has any.

    Raises:
        EngineInputError: names the tensor, what was got and what is expected.
    """
    expected = {tensor.name for tensor in spec.inputs}
    if inputs.keys() != expected:
        raise EngineInputError(f"{spec.name}: got inputs {sorted(inputs)}, expected {sorted(expected)}")
    bound: dict[str, int] = {}
    for tensor in spec.inputs:
        _check_tensor(spec.name, tensor, inputs[tensor.name], bound, limits or {})
    steps, batch = bound.get("steps"), bound.get("batch")
    if steps is not None and batch is not None and steps not in (1, batch):
        raise EngineInputError(
            f"{spec.name} input 'timestep': got {steps} values, expected 1 or the batch, {batch}"
        )


def as_arrays(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Inputs as NumPy arrays of the CPU, without a copy where a tensor is there and contiguous."""
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in inputs.items()}


def cannot_run(
    spec: ComponentSpec, runtime: str, inputs: Mapping[str, Tensor], cause: str, *, compiling: bool = False
) -> EngineInputError:
    """The error of a runtime that fails on inputs which the specification allows, or makes no kernels for them."""
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
    if compiling:
        does = "compile it for"
        advice = "run the same directory with --backend onnxruntime, or take another image size"
    else:
        does = "run it on"
        advice = "check the values, and that the model can halve the image sizes as often as it does"
    return EngineInputError(f"{spec.name}: {runtime} cannot {does} {shapes}: {cause}; {advice}")


def _check_tensor(
    component: str, spec: TensorSpec, value: Tensor, bound: dict[str, int], limits: Limits
) -> None:
    where = f"{component} input {spec.name!r}"
    if value.dtype != getattr(torch, spec.dtype):
        raise EngineInputError(f"{where}: got {value.dtype}, expected torch.{spec.dtype}")
    got = list(value.shape)
    if len(got) != len(spec.shape):
        raise EngineInputError(f"{where}: got shape {got}, expected {list(spec.shape)}")
    for size, dimension in zip(got, spec.shape, strict=True):
        if isinstance(dimension, int):
            if size != dimension:
                raise EngineInputError(f"{where}: got shape {got}, expected {list(spec.shape)}")
            continue
        if bound.setdefault(dimension, size) != size:
            raise EngineInputError(
                f"{where}: got {dimension} {size}, but another input has {bound[dimension]}"
            )
        low, high = limits.get(dimension, (1, size))
        if not low <= size <= high:
            raise EngineInputError(
                f"{where}: got {got}, engine allows {dimension} {low}..{high}; "
                f"rebuild it with a profile that covers {size}"
            )

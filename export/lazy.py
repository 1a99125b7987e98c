"""Initializers that are computed when they are written: no more than one large weight is in memory at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir
from torch import Tensor

from quest_deploy.model.deferred import Read


def mapped(
    tensor: ir.TensorProtocol,
    function: Callable[[np.ndarray], np.ndarray],
    *,
    shape: tuple[int, ...],
    dtype: ir.DataType | None = None,
    name: str | None = None,
) -> ir.TensorProtocol:
    """`function` of a tensor's values: now, or when it is read if the tensor itself is read then.

    Args:
        tensor: The source.
        function: From its array to the new one, both as numpy has them.
        shape: Of the result.
        dtype: Of the result; None for the source's.
        name: Of the result; None for the source's.
    """
    dtype = tensor.dtype if dtype is None else dtype
    name = tensor.name if name is None else name

    def compute() -> ir.Tensor:
        values = np.ascontiguousarray(function(tensor.numpy()))
        return ir.Tensor(values, dtype=dtype, shape=ir.Shape(shape), name=name)

    if isinstance(tensor, ir.LazyTensor):
        return ir.LazyTensor(compute, dtype=dtype, shape=ir.Shape(shape), name=name)
    return compute()


def sizes_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The dimensions of a tensor, which are all known."""
    return tuple(int(size) for size in tensor.shape.numpy())


def transposed(tensor: ir.TensorProtocol, perm: list[int]) -> ir.TensorProtocol:
    """`tensor` with its axes in the order `perm`."""
    sizes = sizes_of(tensor)
    shape = tuple(sizes[axis] for axis in perm)
    return mapped(tensor, lambda values: values.transpose(perm), shape=shape)


def read_when_written(model: ir.Model, readers: Mapping[int, Read]) -> None:
    """Let the initializers that stand for deferred weights be those weights, in place.

    Args:
        model: As the exporter made it; nothing has computed with its initializers yet.
        readers: By the address of a stand-in, how to read what it stands for.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        raw = getattr(tensor, "raw", None)
        if tensor is None or not isinstance(raw, Tensor) or raw.data_ptr() not in readers:
            continue
        value.const_value = _deferred(readers[raw.data_ptr()], tensor)


def _deferred(read: Read, like: ir.TensorProtocol) -> ir.LazyTensor:
    shape, dtype, name = ir.Shape(like.shape.numpy()), like.dtype, like.name
    return ir.LazyTensor(
        lambda: ir.Tensor(read().numpy(), dtype=dtype, name=name), dtype=dtype, shape=shape, name=name
    )

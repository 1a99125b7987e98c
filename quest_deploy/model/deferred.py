"""Weights that stay in their file until something needs them.

A deferred module has its large tensors on torch's "meta" device, and knows how to read each. Export reads one at a
time, when it writes it (:func:`stood_in`); a forward pass reads those of one layer at a time (:func:`streamed`). Called
otherwise, it raises: torch itself would multiply by whatever lies in memory.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from quest_deploy.errors import ModelLoadError
from quest_deploy.model.weights import weight_files

Read = Callable[[], Tensor]
Owner = tuple[nn.Module, str]

META = torch.device("meta")
# Smaller ones are read at once. Operators on them may be computed while a graph is cleaned; larger ones never are.
DEFERRED_BYTES = 1 << 18

_usable: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_readers: weakref.WeakKeyDictionary[nn.Module, dict[str, Read]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file.

    Attributes:
        file: Where.
        key: Its name there.
        shape: Its dimensions.
    """

    file: Path
    key: str
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """The tensor in the type that it is stored in."""
        with safe_open(self.file, framework="pt") as stored:
            tensor: Tensor = stored.get_tensor(self.key)
            return tensor

    def read_float(self) -> Tensor:
        """The tensor in float32."""
        return self.read().to(torch.float32)


class StoredFile(Mapping[str, Tensor]):
    """The tensors of a safetensors file by name, each read when it is asked for.

    Args:
        file: Stays open as long as this lives.
    """

    def __init__(self, file: Path) -> None:
        self._handle: Any = safe_open(file, framework="pt")
        self._names = dict.fromkeys(self._handle.keys())
        self.file = file

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor: Tensor = self._handle.get_tensor(name)
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def stored(self, name: str) -> StoredTensor:
        """Where the tensor `name` is, without reading it."""
        if name not in self._names:
            raise KeyError(name)
        return StoredTensor(self.file, name, tuple(self._handle.get_slice(name).get_shape()))


def stored_tensors(folder: Path, library: str) -> dict[str, StoredTensor]:
    """What the files hold that a component's library would load, by name.

    Args:
        folder: The component's.
        library: As for :func:`quest_deploy.model.weights.weight_files`.

    Raises:
        ModelLoadError: a file is corrupt.
    """
    files = weight_files(folder, library)
    return {name: stored.stored(name) for stored in map(_opened, files) for name in stored}


def _opened(file: Path) -> StoredFile:
    try:
        return StoredFile(file)
    except SafetensorError as error:
        raise ModelLoadError(f"{file}: is corrupt ({error}); restore it from its source") from error


def defer(module: nn.Module, name: str, shape: tuple[int, ...], dtype: torch.dtype, read: Read) -> None:
    """Let the parameter or buffer `name`, of `module` itself, be what `read` gives, whenever it is needed."""
    empty = torch.empty(shape, dtype=dtype, device=META)
    _put(module, name, empty)
    if module not in _readers:
        module.register_forward_pre_hook(_refuse)
    _readers.setdefault(module, {})[name] = read


def deferred_tensors(root: nn.Module) -> dict[Owner, Read]:
    """What is deferred in `root`: the module that owns it, its name there, and how to read it."""
    return {
        (module, name): read for module in root.modules() for name, read in _readers.get(module, {}).items()
    }


def is_deferred(root: nn.Module) -> bool:
    """Whether `root` has tensors that are still in a file."""
    return any(module in _readers for module in root.modules())


@contextlib.contextmanager
def stood_in(root: nn.Module) -> Iterator[Mapping[int, Read]]:
    """`root` with tensors of the right types for the body's duration, by which it can be traced, but not run.

    Nothing writes to their memory, so that it takes none.

    Yields:
        By the address of each, how to read what it stands for.
    """
    addresses: dict[int, Read] = {}
    places = []
    try:
        for (module, name), read in deferred_tensors(root).items():
            empty = _get(module, name)
            places.append((module, name, empty))
            stand_in = torch.empty(empty.shape, dtype=empty.dtype)
            _put(module, name, stand_in)
            addresses[stand_in.data_ptr()] = read
            _usable.add(module)
        yield addresses
    finally:
        _usable.difference_update([module for module, _, _ in places])
        for module, name, empty in places:
            _put(module, name, empty)


@contextlib.contextmanager
def streamed(*roots: nn.Module) -> Iterator[None]:
    """Modules that can be run for the body's duration: each layer reads its weights as it is called."""
    handles: list[RemovableHandle] = []
    modules = {module for root in roots for module, _ in deferred_tensors(root)}
    try:
        for module in modules:
            handles.append(module.register_forward_pre_hook(_fill))
            handles.append(module.register_forward_hook(_empty, always_call=True))
        _usable.update(modules)
        yield
    finally:
        _usable.difference_update(modules)
        for handle in handles:
            handle.remove()


def _refuse(module: nn.Module, args: Any) -> None:
    if module not in _usable:
        raise RuntimeError(
            f"{type(module).__name__}: its weights are still in a file; run it inside streamed()"
        )


def _fill(module: nn.Module, args: Any) -> None:
    for name, read in _readers[module].items():
        _put(module, name, read())


def _empty(module: nn.Module, args: Any, output: Any) -> None:
    for name in _readers[module]:
        _put(module, name, _get(module, name).to(META))


def _get(module: nn.Module, name: str) -> Tensor:
    tensor = getattr(module, name)
    assert isinstance(tensor, Tensor)
    return tensor.detach()


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


def fill(empty: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Fill a module on "meta" with the small tensors of `stored`, in float32, and defer the large ones.

    Those that another module reads than the one that owns them are not deferred (nn.MultiheadAttention's).

    Args:
        empty: Its parameters are on "meta", its buffers anywhere.
        stored: By the module's names.
    """
    inside = tuple(
        f"{name}." for name, module in empty.named_modules() if isinstance(module, nn.MultiheadAttention)
    )
    state = empty.state_dict(keep_vars=True)
    for name, one in stored.items():
        parent, _, child = name.rpartition(".")
        module, like = empty.get_submodule(parent), state[name]
        large = like.nbytes >= DEFERRED_BYTES and like.dtype == torch.float32
        if large and not name.startswith(inside):
            defer(module, child, one.shape, torch.float32, one.read_float)
        else:
            _put(module, child, one.read().to(like.dtype))


def matching(empty: nn.Module, stored: Mapping[str, StoredTensor]) -> dict[str, StoredTensor] | None:
    """What `stored` has for each tensor of a module's state, by the module's names.

    The names there may all follow one prefix ("text_model."), as in files of older versions of transformers. Tensors
    that the module ties to others may be missing.

    Returns:
        None where one is missing or has another shape: only the library that the module is of knows what that means.
    """
    state = empty.state_dict(keep_vars=True)
    ties = getattr(empty, "_tied_weights_keys", None)
    ties = ties if isinstance(ties, dict) else {}
    names = [name for name in state if name not in ties]
    prefixes = {key.removesuffix(names[0]) for key in stored if f".{key}".endswith(f".{names[0]}")}
    for prefix in sorted(prefixes):
        found = {name: stored.get(prefix + name) for name in names}
        found |= {
            name: stored.get(prefix + name, found.get(source))
            for name, source in ties.items()
            if name in state
        }
        complete = {name: one for name, one in found.items() if one is not None}
        if len(complete) == len(state) and all(
            one.shape == tuple(state[name].shape) for name, one in complete.items()
        ):
            return complete
    return None

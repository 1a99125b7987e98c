"""What each layer of a denoiser is fed by, found by running it once, not by the names of one family.

The denoiser runs on tiny inputs while every torch function is written down (a tape), together with the inputs that each
tensor comes from. A layer carries time if its input comes from the timestep and from no stream (the latents, and text
tokens, which time only modulates); it is a boundary if nothing quantizable lies between it and the latents, or between
it and the output. The part of the tape that leads to the layers that carry time can be played again for any timesteps,
without the rest of the network.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from quest_deploy.model.components import Conditioning, call_denoiser
from quest_deploy.model.load import LoadedModel
from quest_deploy.model.spec import TIMESTEP, ComponentSpec, TensorSpec
from quest_deploy.model.tensors import base_of
from quest_deploy.quantize.example import BATCH, example_inputs
from quest_deploy.quantize.insert import Role, Roles, quantizable_layers
from quest_deploy.quantize.layers import TimestepContext

STREAM_AXES = ("sequence", "image_tokens", "height")


@dataclass(frozen=True)
class Slot:
    """One tensor of the tape: an input of the network, a parameter, a constant, or an output of a step."""

    index: int


@dataclass
class Origin:
    """Where a tensor comes from.

    Attributes:
        slot: Its place on the tape.
        inputs: The network's inputs that it depends on.
        after: The quantizable layers last passed on the way.
    """

    slot: Slot
    inputs: frozenset[str] = frozenset()
    after: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Step:
    """One call of a torch function, or of a layer; tensors among the arguments are slots."""

    call: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]


Source: TypeAlias = "tuple[str, str] | Tensor | tuple[Step, int]"
"""What fills a slot: ("input", name), ("parameter", name), a constant, or an output of a step."""


@dataclass
class Tape:
    """Everything that was computed from parameters, constants and inputs other than the streams."""

    sources: list[Source] = field(default_factory=list)

    def add(self, source: Source) -> Slot:
        """A slot that `source` fills; the same one for the same computation."""
        if isinstance(source, tuple):
            for index, known in enumerate(self.sources):
                if isinstance(known, tuple) and _same(known, source):
                    return Slot(index)
        self.sources.append(source)
        return Slot(len(self.sources) - 1)


def _same(a: tuple[Any, Any], b: tuple[Any, Any]) -> bool:
    if isinstance(a[0], Step) != isinstance(b[0], Step):
        return False
    try:
        return bool(a == b)
    except (RuntimeError, TypeError):
        return False


class Recorder(TorchFunctionMode):
    """Writes the tape while the denoiser runs. Inside a layer nothing is written but the call of the layer."""

    def __init__(self, denoiser: nn.Module, layers: Mapping[str, nn.Module], streams: frozenset[str]) -> None:
        super().__init__()
        self.tape = Tape()
        self.streams = streams
        self.origins: dict[int, Origin] = {}
        self.kept: list[Any] = []  # an identity is reused once its tensor is freed
        self.inside = 0
        self.fed: dict[str, list[Origin]] = {name: [] for name in layers}
        self.names = {id(tensor): name for name, tensor in denoiser.named_parameters()}
        self.names |= {id(tensor): name for name, tensor in denoiser.named_buffers()}
        self.joined: set[str] = set()

    def remember(self, tensor: Tensor, origin: Origin) -> None:
        self.kept.append(tensor)
        self.origins[id(tensor)] = origin

    def origin_of(self, tensor: Tensor) -> Origin:
        known = self.origins.get(id(tensor))
        if known is None:
            name = self.names.get(id(tensor))
            source: Source = tensor if name is None else ("parameter", name)
            known = Origin(self.tape.add(source))
            self.remember(tensor, known)
        return known

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not self.inside:
            self.record(func, args, kwargs, result)
        return result

    def record(self, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        given = [self.origin_of(tensor) for tensor in tensors_in((args, tuple(kwargs.values())))]
        inputs = frozenset[str]().union(*(origin.inputs for origin in given))
        after = frozenset[str]().union(*(origin.after for origin in given))
        if self.streams & inputs or call is Tensor.__setitem__:
            for origin in given:
                if TIMESTEP in origin.inputs and not self.streams & origin.inputs:
                    self.joined |= origin.after
        if call is Tensor.__setitem__:
            self.origins[id(args[0])] = Origin(Slot(-1), inputs | self.streams, after)
            return
        outputs = list(tensors_in(result))
        if not outputs:
            return
        if self.streams & inputs:
            for output in outputs:
                self.remember(output, Origin(Slot(-1), inputs, after))
            return
        step = Step(call, self.frozen(args), tuple((k, self.frozen(v)) for k, v in sorted(kwargs.items())))
        for index, output in enumerate(outputs):
            self.remember(output, Origin(self.tape.add((step, index)), inputs, after))

    def frozen(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.origin_of(value).slot
        if isinstance(value, list | tuple):
            return tuple(self.frozen(item) for item in value)
        return value

    def before_layer(self, name: str, x: Tensor) -> None:
        if not self.inside:
            self.fed[name].append(self.origin_of(x))
        self.inside += 1

    def after_layer(self, name: str, x: Tensor, output: Tensor) -> None:
        self.inside -= 1
        origin = self.origin_of(x)
        slot = Slot(-1)
        if not self.streams & origin.inputs:
            slot = self.tape.add((Step(name, (origin.slot,), ()), 0))
        self.remember(output, Origin(slot, origin.inputs, frozenset({name})))


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and mappings, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(tuple(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


@dataclass(frozen=True)
class Trace:
    """What one run of a denoiser showed.

    Attributes:
        roles: The part that each quantizable layer plays, in module order.
        ends: Layers that carry time, but for those that only feed another one of the same module; in module order.
        conditions: Other inputs of the denoiser that these layers depend on, for example class labels.
        timeless: Layers that neither the timestep nor a stream reaches: what they give depends on conditions alone.
        tape: How their outputs follow from timestep and conditions.
        slots: Where on the tape those outputs are.
        outlets: Layers that carry time and whose output meets a stream, with no other layer between; where on the
            tape their outputs are, by name in module order.
        siblings: Groups of linear layers of one module that read the very same tensor, as those of queries, keys and
            values do; in module order.
    """

    roles: Roles
    ends: tuple[str, ...]
    conditions: frozenset[str]
    timeless: frozenset[str]
    tape: Tape
    slots: tuple[Slot, ...]
    outlets: dict[str, Slot]
    siblings: tuple[tuple[str, ...], ...] = ()

    def at_outlets(self) -> Trace:
        """The same, with the outlets for ends."""
        return dataclasses.replace(self, ends=tuple(self.outlets), slots=tuple(self.outlets.values()))

    def temporal_outputs(
        self,
        denoiser: nn.Module,
        timestep: Tensor,
        conditioning: Conditioning,
        context: TimestepContext | None,
    ) -> list[Tensor]:
        """Outputs of the layers `ends`, without running the rest of the network.

        Args:
            denoiser: The one that was traced, or a quantized copy.
            timestep: float32 [n].
            conditioning: Holds `conditions`, [n, ...].
            context: Told the timesteps, if the layers are quantized.
        """
        if context is not None:
            context.set_timestep(timestep)
        player = _Player(self.tape, denoiser, {TIMESTEP: timestep, **conditioning})
        return [player.value(slot) for slot in self.slots]


class _Player:
    """Plays a tape, as far as is asked for, every step once."""

    def __init__(self, tape: Tape, denoiser: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self.tape, self.denoiser, self.inputs = tape, denoiser, inputs
        self.count, self.device = inputs[TIMESTEP].shape[0], inputs[TIMESTEP].device
        self.values: dict[int, Any] = {}
        self.outputs: dict[int, list[Tensor]] = {}

    def value(self, slot: Slot) -> Tensor:
        if slot.index not in self.values:
            self.values[slot.index] = self.compute(self.tape.sources[slot.index])
        value: Tensor = self.values[slot.index]
        return value

    def compute(self, source: Source) -> Tensor:
        if isinstance(source, Tensor):
            return source.to(self.device)
        what, which = source
        if what == "input":
            return self.inputs[str(which)]
        if what == "parameter":
            return _tensor_named(self.denoiser, str(which))
        assert isinstance(what, Step) and isinstance(which, int)
        if id(what) not in self.outputs:
            self.outputs[id(what)] = list(tensors_in(self.run(what)))
        return self.outputs[id(what)][which]

    def run(self, step: Step) -> Any:
        args = self.filled(step.args)
        if isinstance(step.call, str):
            return self.denoiser.get_submodule(step.call)(*args)
        return step.call(*args, **{name: self.filled(value) for name, value in step.kwargs})

    def filled(self, value: Any) -> Any:
        if isinstance(value, Slot):
            return self.value(value)
        if isinstance(value, tuple):
            return tuple(self.filled(item) for item in value)
        if isinstance(value, torch.device):
            # The tape may have been written elsewhere.
            return self.device
        if isinstance(value, int) and not isinstance(value, bool) and value == BATCH:
            return self.count
        return value


def _tensor_named(module: nn.Module, name: str) -> Tensor:
    parent, _, last = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(parent), last)
    return tensor


def trace(model: LoadedModel) -> Trace:
    """Run the full-precision denoiser of `model` once, on tiny inputs, and see what feeds what."""
    return trace_denoiser(model.denoiser, model.denoiser_spec)


@torch.no_grad()
def trace_denoiser(denoiser: nn.Module, spec: ComponentSpec) -> Trace:
    """As :func:`trace`, for a denoiser of diffusers whose inputs are those of `spec`."""
    layers = quantizable_layers(denoiser)
    inputs = example_inputs(spec, denoiser.config)
    sample, timestep, *rest = (tensor.name for tensor in spec.inputs)
    streams = frozenset({sample, *(tensor.name for tensor in spec.inputs if _is_stream(tensor))})
    recorder = Recorder(denoiser, layers, streams)
    for name in streams:
        recorder.remember(inputs[name], Origin(Slot(-1), frozenset({name})))
    for name in (timestep, *rest):
        if name in streams:
            continue
        recorder.remember(inputs[name], Origin(recorder.tape.add(("input", name)), frozenset({name})))
    with _hooked(layers, recorder), recorder:
        output = call_denoiser(
            denoiser, inputs[sample], inputs[timestep], {name: inputs[name] for name in rest}
        )
        last = recorder.origin_of(output).after
    roles = {name: _role(name, fed, sample, streams, last) for name, fed in recorder.fed.items()}
    temporal = [name for name, role in roles.items() if role == "temporal"]
    fed = {name: recorder.fed[name][0] for name in temporal}
    ends = tuple(name for name in temporal if not _is_inner(name, fed))
    outputs = {name: recorder.tape.add((Step(name, (fed[name].slot,), ()), 0)) for name in temporal}
    outlets = {name: slot for name, slot in outputs.items() if name in recorder.joined}
    conditions = frozenset[str]().union(*(fed[name].inputs for name in ends)) - {timestep}
    return Trace(
        roles=Roles(roles, outlets),
        ends=ends,
        conditions=conditions,
        timeless=frozenset(
            name
            for name, fed in recorder.fed.items()
            if not any((streams | {timestep}) & origin.inputs for origin in fed)
        ),
        tape=recorder.tape,
        slots=tuple(outputs[name] for name in ends),
        outlets=outlets,
        siblings=_siblings(layers, recorder.fed),
    )


def _is_stream(tensor: TensorSpec) -> bool:
    """Whether an input is a sequence of tokens or a map of features."""
    return any(isinstance(size, str) and base_of(size)[0] in STREAM_AXES for size in tensor.shape)


def _role(
    name: str, fed: Iterable[Origin], sample: str, streams: frozenset[str], last: frozenset[str]
) -> Role:
    for origin in fed:
        if sample in origin.inputs and (not origin.after or name in last):
            return "boundary"
        if TIMESTEP in origin.inputs and not streams & origin.inputs:
            return "temporal"
    return "other"


def _siblings(
    layers: Mapping[str, nn.Module], fed: Mapping[str, Sequence[Origin]]
) -> tuple[tuple[str, ...], ...]:
    groups: dict[tuple[str, int], list[str]] = {}
    for name, origins in fed.items():
        if len(origins) == 1 and isinstance(layers[name], nn.Linear):
            groups.setdefault((name.rpartition(".")[0], id(origins[0])), []).append(name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


def _is_inner(name: str, fed: Mapping[str, Origin]) -> bool:
    """Whether `name` feeds other layers that carry time, and all of them are of its own module."""
    followers = [other for other, origin in fed.items() if name in origin.after]
    return bool(followers) and all(other.rpartition(".")[0] == name.rpartition(".")[0] for other in followers)


@contextlib.contextmanager
def _hooked(layers: Mapping[str, nn.Module], recorder: Recorder) -> Iterator[None]:
    def before(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda module, args: recorder.before_layer(name, args[0])

    def after(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, output: recorder.after_layer(name, args[0], output)

    handles = []
    for name, layer in layers.items():
        handles += [
            layer.register_forward_pre_hook(before(name)),
            layer.register_forward_hook(after(name)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""Execution contexts in one block of memory: a plain one for any shapes, and one for each captured CUDA graph.

A captured graph holds addresses, so it needs inputs and outputs that stay where they are. The caller's tensors do not:
each step of a sampling loop makes new ones, and torch's caching allocator places them by what happens to be free, so
that graphs looked up by address would be captured again and again, one for each combination, and a result would be
overwritten by the next replay while its owner still reads it. Therefore a graph has buffers of its own: inputs are
copied into them and outputs out of them, on the GPU; latents and text are small beside what a denoiser reads.

Each graph has an execution context of its own, because setting other shapes in a context invalidates the graphs that
were captured from it (TensorRT's documentation). All of them share one block of activation memory.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from quest_deploy.engines.trt_log import errors_so_far, last_words
from quest_deploy.engines.trt_memory import Block
from quest_deploy.engines.trt_plan import LoadedPlan, Refusal
from quest_deploy.model.spec import ComponentSpec

logger = logging.getLogger(__name__)

Shapes = tuple[tuple[str, torch.dtype, tuple[int, ...]], ...]
"""Name, type and shape of each input, sorted by name."""

MAX_GRAPHS = 4
"""Captured graphs that a lane keeps; beyond it the one that was used longest ago is freed."""

ALIGNMENT_BYTES = 256
"""Of inputs and outputs (`IExecutionContext::setTensorAddress`)."""

_CAPTURING = threading.Lock()


class Graph(Protocol):
    """What was captured."""

    def replay(self) -> None:
        """Enqueue it on torch's current stream."""


def shapes_of(inputs: Mapping[str, Tensor]) -> Shapes:
    """What decides the profile, the outputs' shapes and the graph."""
    return tuple((name, value.dtype, tuple(value.shape)) for name, value in sorted(inputs.items()))


def capture(run: Callable[[int], None], stream: torch.cuda.Stream) -> Graph:
    """Record what `run` enqueues on `stream`, whose handle it is given, without running it.

    Raises:
        RuntimeError: CUDA cannot capture it.
    """
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream()
    try:
        # Torch waits for the whole device before it captures, which fails while another thread does the same.
        with _CAPTURING, torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            run(stream.cuda_stream)
    except BaseException:
        # Where the capture cannot even be ended, torch leaves its stream the current one.
        torch.cuda.set_stream(before)
        raise
    return graph


def aligned(tensor: Tensor) -> Tensor:
    """`tensor`, contiguous and at an address that TensorRT takes; torch aligns what it allocates, views it does not."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT_BYTES else tensor


class ShapedContext:
    """A new execution context in a block of activation memory, which remembers the shapes that are set.

    Args:
        spec: The component.
        plan: Its engine.
        block: What it computes in; it must outlive the context.

    Raises:
        EngineBuildError: too little memory on the GPU.
    """

    def __init__(self, spec: ComponentSpec, plan: LoadedPlan, block: Block) -> None:
        self.spec = spec
        self.library = plan.library
        self.context = plan.create_context()
        self.block = block
        self.shapes: Shapes = ()
        # Engines are built with all that an inspector can tell, and enqueueing a run takes longer with all that in its
        # markers for profilers.
        self.context.nvtx_verbosity = self.library.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.context.set_device_memory(block.memory.data_ptr(), block.memory.numel())

    def set_shapes(self, shapes: Shapes, profile: int, caller: torch.cuda.Stream) -> None:
        """Choose the profile and the inputs' shapes, unless they are set already."""
        if shapes == self.shapes:
            return
        self.shapes = ()  # whatever fails below leaves the context without shapes to rely on
        if profile != self.context.active_optimization_profile:
            with self.block.beside(caller) as stream:
                choose = self.context.set_optimization_profile_async
                self._call(f"profile {profile}", choose, profile, stream.cuda_stream)
        for name, _, shape in shapes:
            self._call(f"{name} {list(shape)}", self.context.set_input_shape, name, shape)
        self.shapes = shapes

    def make_outputs(self, device: torch.device) -> dict[str, Tensor]:
        """Uninitialized outputs for the shapes that are set."""
        return {
            tensor.name: torch.empty(
                tuple(self.context.get_tensor_shape(tensor.name)),
                dtype=getattr(torch, tensor.dtype),
                device=device,
            )
            for tensor in self.spec.outputs
        }

    def bind(self, *groups: Mapping[str, Tensor]) -> None:
        """Give the context the addresses of these tensors."""
        for tensors in groups:
            for name, tensor in tensors.items():
                self._call(f"the address of {name}", self.context.set_tensor_address, name, tensor.data_ptr())

    def run(self, caller: torch.cuda.Stream) -> None:
        """Enqueue one run behind what `caller` has been given.

        Raises:
            Refusal: TensorRT refuses.
        """
        with self.block.beside(caller) as stream:
            self.enqueue(stream.cuda_stream)

    def enqueue(self, stream: int) -> None:
        """Enqueue one run on the stream of this handle.

        Raises:
            Refusal: TensorRT refuses.
        """
        self._call("to run", self.context.execute_async_v3, stream)

    def _call(self, what: str, call: Callable[..., bool], *arguments: Any) -> None:
        """Call TensorRT; where it answers no, the error says `what` it refused and why.

        For a profile, its Python binding raises a RuntimeError in the place of an answer.
        """
        before = errors_so_far(self.library)
        try:
            answer = call(*arguments)
        except torch.AcceleratorError:
            raise
        except RuntimeError:
            answer = False
        if not answer:
            raise Refusal(f"TensorRT refused {what}{last_words(self.library, before)}")


class CapturedShapes:
    """One set of shapes in a context and buffers of its own; captured when it first runs."""

    def __init__(self, shaped: ShapedContext, inputs: Mapping[str, Tensor], device: torch.device) -> None:
        self.shaped = shaped
        # Calls inside and outside of inference mode write into the same buffers.
        with torch.inference_mode(False):
            self.inputs = {
                name: torch.empty(value.shape, dtype=value.dtype, device=device)
                for name, value in inputs.items()
            }
            self.outputs = shaped.make_outputs(device)
        self.graph: Graph | None = None
        shaped.bind(self.inputs, self.outputs)

    def __call__(self, inputs: Mapping[str, Tensor], caller: torch.cuda.Stream) -> dict[str, Tensor]:
        """Run once: outputs are copies, which the next run leaves alone."""
        for name, buffer in self.inputs.items():
            buffer.copy_(inputs[name])
        if self.graph is None:
            self.shaped.run(caller)
        else:
            self.graph.replay()
        return {name: buffer.clone() for name, buffer in self.outputs.items()}

    def capture(self) -> None:
        """Capture the graph, after the context has run once with its shapes, as TensorRT wants it.

        Raises:
            RuntimeError: it cannot be captured.
        """
        # Torch hands out the same 32 streams of a priority again and again, and threads run on those of the usual one:
        # what one of them enqueued meanwhile would become part of the graph, or end both.
        stream = torch.cuda.Stream(priority=-1)
        asks = getattr(self.shaped.context, "is_stream_capturable", None)
        if asks is not None and not asks(stream.cuda_stream):
            raise RuntimeError("TensorRT says that this engine cannot be captured")
        self.graph = capture(self.shaped.enqueue, stream)


class Lane:
    """What runs one component in one block of memory, whichever thread borrows that.

    Args:
        spec: The component.
        plan: Its engine.
        block: Its activation memory.
        graphs: Whether shapes that come again are captured; becomes false where that fails.
    """

    def __init__(self, spec: ComponentSpec, plan: LoadedPlan, block: Block, *, graphs: bool) -> None:
        self.spec = spec
        self.plan = plan
        self.block = block
        self.graphs = graphs
        self.plain: ShapedContext | None = ShapedContext(spec, plan, block)
        self.seen: set[Shapes] = set()
        self.captured: OrderedDict[Shapes, CapturedShapes] = OrderedDict()

    def run(self, inputs: Mapping[str, Tensor], shapes: Shapes, profile: int) -> dict[str, Tensor]:
        """Enqueue one run on torch's current stream.

        Shapes that come for the first time run as they are, in the caller's own tensors; from then on as a graph.

        Raises:
            Refusal: TensorRT refuses.
        """
        caller = torch.cuda.current_stream()
        self.block.take(caller)
        if shapes in self.captured:
            self.captured.move_to_end(shapes)
            return self.captured[shapes](inputs, caller)
        if self.graphs and shapes in self.seen:
            return self._run_and_capture(inputs, shapes, profile, caller)
        self.seen.add(shapes)
        return self._run_plain(inputs, shapes, profile, caller)

    def _run_plain(
        self, inputs: Mapping[str, Tensor], shapes: Shapes, profile: int, caller: torch.cuda.Stream
    ) -> dict[str, Tensor]:
        assert self.plain is not None
        # torch's allocator gives memory back in stream order, so tensors may be freed before the run has ended.
        bound = {name: aligned(tensor) for name, tensor in inputs.items()}
        self.plain.set_shapes(shapes, profile, caller)
        outputs = self.plain.make_outputs(self.block.memory.device)
        self.plain.bind(bound, outputs)
        self.plain.run(caller)
        return outputs

    def _run_and_capture(
        self, inputs: Mapping[str, Tensor], shapes: Shapes, profile: int, caller: torch.cuda.Stream
    ) -> dict[str, Tensor]:
        if len(self.captured) >= MAX_GRAPHS:
            self.block.wait()  # the graph that goes away may still be running
            forgotten, _ = self.captured.popitem(last=False)
            self.seen.discard(forgotten)
        shaped = ShapedContext(self.spec, self.plan, self.block)
        shaped.set_shapes(shapes, profile, caller)
        entry = CapturedShapes(shaped, inputs, self.block.memory.device)
        outputs = entry(inputs, caller)
        try:
            entry.capture()
        except RuntimeError as error:
            self.graphs = False
            self.block.wait()  # so may this run, in the context that goes away
            logger.warning("%s runs without CUDA graphs: %s", self.spec.name, str(error).partition("\n")[0])
        else:
            self.captured[shapes] = entry
        return outputs

    def close(self) -> None:
        """Free all contexts, once nothing runs in them any more."""
        self.block.wait()
        self.captured.clear()
        self.plain = None

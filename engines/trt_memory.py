"""Device memory for the activations of TensorRT engines, shared between the components of a pipeline."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

DEFAULT_STREAM = 0
"""The handle of CUDA's default stream."""


class Block:
    """Activation memory for one run at a time.

    Whoever runs in it takes it first, which orders the run behind the one before it, also where that was enqueued on
    another stream.

    Attributes:
        memory: uint8 [bytes].
        stream: The caller's stream that it was last taken for.
        own: A stream of the block's own, made where the caller's is CUDA's default one.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        # torch's allocator aligns to 512 bytes; TensorRT wants 256.
        self.memory = torch.empty(max(size_bytes, 1), dtype=torch.uint8, device=device)
        self.stream: torch.cuda.Stream | None = None
        self.own: torch.cuda.Stream | None = None

    def take(self, stream: torch.cuda.Stream) -> None:
        """Let what is enqueued on `stream` from now on wait for what ran in this block before."""
        if self.stream is not None and self.stream != stream:
            stream.wait_stream(self.stream)
        self.stream = stream

    @contextmanager
    def beside(self, caller: torch.cuda.Stream) -> Iterator[torch.cuda.Stream]:
        """The stream for TensorRT: the caller's, or where that is CUDA's default one, the block's own.

        On the default stream TensorRT makes the host wait at every run, and that fails while another thread captures.
        What the body enqueues runs after all that `caller` has been given, and before what it is given next. Tensors
        that the body writes are allocated before, since torch's allocator goes by the caller's stream.
        """
        if caller.cuda_stream != DEFAULT_STREAM:
            yield caller
            return
        if self.own is None:
            self.own = torch.cuda.Stream()
        self.own.wait_stream(caller)
        try:
            yield self.own
        finally:
            caller.wait_stream(self.own)

    def is_idle(self) -> bool:
        """Whether nothing runs in this block."""
        return self.stream is None or self.stream.query()

    def wait(self) -> None:
        """Return once nothing runs in this block any more."""
        if self.stream is not None:
            self.stream.synchronize()


class ActivationMemory:
    """Blocks as large as the largest component needs: as many as runs are enqueued, or go on, on several streams.

    The components of a pipeline run one after the other, so they need no memory of their own each; threads may enqueue
    at the same time and do. A block belongs to no thread: servers have more of them than draw at a time, and start
    others all the time. The size is fixed before the first run: captured CUDA graphs hold the block's address.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.size_bytes = size_bytes
        self.device = device
        self._free: list[Block] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrow(self, stream: torch.cuda.Stream) -> Iterator[Block]:
        """A block into which nobody else enqueues meanwhile.

        It was last used on the same stream, or is used no more, so that a run waits for none on another stream.
        """
        with self._lock:
            block = next((one for one in self._free if one.stream == stream), None)
            if block is None:
                block = next((one for one in self._free if one.is_idle()), None)
            if block is not None:
                self._free.remove(block)
        if block is None:
            block = Block(self.size_bytes, self.device)
        try:
            yield block
        finally:
            with self._lock:
                self._free.append(block)

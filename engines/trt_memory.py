"""Device memory for the activations of TensorRT engines, shared between the components of a pipeline."""

from __future__ import annotations

import threading

import torch


class Block:
    """The activation memory of one thread.

    Whoever runs in it takes it first, which orders the run behind the one before it, also where that was enqueued on
    another stream.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        # torch's allocator aligns to 512 bytes; TensorRT wants 256.
        self.memory = torch.empty(max(size_bytes, 1), dtype=torch.uint8, device=device)
        self.stream: torch.cuda.Stream | None = None

    def take(self, stream: torch.cuda.Stream) -> None:
        """Let what is enqueued on `stream` from now on wait for what ran in this block before."""
        if self.stream is not None and self.stream != stream:
            stream.wait_stream(self.stream)
        self.stream = stream

    def wait(self) -> None:
        """Return once nothing runs in this block any more."""
        if self.stream is not None:
            self.stream.synchronize()


class ActivationMemory:
    """One block for each thread, as large as the largest component needs.

    The components of a pipeline run one after the other, so they need no memory of their own each; threads run at the
    same time and do. The size is fixed before the first run: captured CUDA graphs hold the block's address.
    """

    def __init__(self, size_bytes: int, device: torch.device) -> None:
        self.size_bytes = size_bytes
        self.device = device
        self._blocks: dict[int, Block] = {}
        self._lock = threading.Lock()

    def block(self) -> Block:
        """The calling thread's block; a thread that ended leaves its block to the next one of the same identifier."""
        thread = threading.get_ident()
        with self._lock:
            if thread not in self._blocks:
                self._blocks[thread] = Block(self.size_bytes, self.device)
            return self._blocks[thread]

"""Several processes that finetune one model together, by Accelerate.

Each takes its share of every update and of every validation; gradients and losses are added up, so that all processes
stay in the same state. One of them, the main one, does everything else and writes; the others wait for its files.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from quest_deploy.errors import ConfigError, MissingDependencyError
from quest_deploy.model.load import LoadedModel

# The main process may record and round for hours while the others wait.
LONGEST_WAIT = timedelta(days=7)


@dataclass(frozen=True)
class Workers:
    """The processes of a run, seen from one of them.

    Attributes:
        index: Of this process; 0 is the main one.
        count: Of all.
        accelerator: Accelerate's handle on the others; None where there are none.
    """

    index: int = 0
    count: int = 1
    accelerator: Any = None

    @property
    def main(self) -> bool:
        """Whether this process writes."""
        return self.index == 0

    def sum(self, value: float) -> float:
        """The sum of every process's `value`, the same bits in all of them."""
        if self.accelerator is None:
            return value
        total = torch.tensor(value, dtype=torch.float64).to(self.accelerator.device)
        return float(self.accelerator.reduce(total, reduction="sum"))

    def sum_gradients(self, parameters: Sequence[Tensor], loss: float) -> float:
        """Add up the gradients of all processes, in place, and their losses.

        One that no process has stays None: zeros would have Adam go on by its moments.
        """
        if self.accelerator is None:
            return loss
        gradients = [p.new_zeros(p.shape) if p.grad is None else p.grad for p in parameters]
        known = gradients[0].new_tensor([p.grad is not None for p in parameters])
        # One message for all: most of them are a few numbers.
        together = self.accelerator.reduce(
            torch.cat([*(g.flatten() for g in gradients), known]), reduction="sum"
        )
        *summed, counts = together.split([*(p.numel() for p in parameters), len(parameters)])
        for parameter, gradient, count in zip(parameters, summed, counts.tolist(), strict=True):
            parameter.grad = gradient.reshape(parameter.shape) if count else None
        return self.sum(loss)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process runs the body while the others wait; then they do."""
        if not self.main:
            self.accelerator.wait_for_everyone()
        yield
        if self.main and self.accelerator is not None:
            self.accelerator.wait_for_everyone()


ALONE = Workers()


def find_workers(device: str) -> Workers:
    """The processes that `accelerate launch` (or torchrun) started this one with.

    Args:
        device: "cpu" or "cuda".

    Raises:
        MissingDependencyError: there are others, and Accelerate is not installed.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return ALONE
    try:
        from accelerate import Accelerator, InitProcessGroupKwargs
    except ImportError as error:
        raise MissingDependencyError(
            "finetuning with several processes needs Accelerate; pip install 'quest-deploy[multi-gpu]'"
        ) from error
    accelerator = Accelerator(
        cpu=device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
    )
    return Workers(accelerator.process_index, accelerator.num_processes, accelerator)


def device_of(device: str, workers: Workers) -> torch.device:
    """The device of this process.

    Raises:
        ConfigError: there is no such GPU.
    """
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError(
            f"device is {device}, and this PyTorch sees no GPU; leave --device out to run on the CPU"
        )
    # What cuBLAS needs to give the same bits twice; it is read when CUDA starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    found = torch.device(device) if workers.accelerator is None else workers.accelerator.device
    if found.index is not None and found.index >= torch.cuda.device_count():
        raise ConfigError(f"device is {device}, and there are {torch.cuda.device_count()} GPUs")
    return found


def place(model: LoadedModel, device: torch.device) -> None:
    """Put the denoiser, and a ControlNet that runs before each of its calls, on `device`."""
    model.denoiser.to(device)
    if model.controlnet is not None:
        model.controlnet.to(device)

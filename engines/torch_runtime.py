"""Torch: runs a model or a quantized checkpoint as diffusers' own modules. The rung that others are compared with."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from quest_deploy.artifacts import stage_of
from quest_deploy.engines.base import Closing, Engine, check_inputs
from quest_deploy.model.components import first_device
from quest_deploy.model.libraries import LOADING
from quest_deploy.model.load import LoadedModel, load_model, wrap_components
from quest_deploy.model.products import float32_products
from quest_deploy.model.spec import ComponentSpec, component_specs

# Quantized modules keep which timestep they are at, and the number of threads is one for the process.
_RUNNING = threading.Lock()


class TorchEngine(Closing):
    """One component as a module whose positional inputs and outputs are those of its specification.

    Threads take turns.
    """

    def __init__(self, spec: ComponentSpec, module: nn.Module, *, threads: int | None = None) -> None:
        self.spec = spec
        self.module: nn.Module | None = module
        self.device = first_device(module)
        self.threads = threads

    # Not inference mode: schedulers may write into a prediction, which is forbidden for its tensors.
    @torch.no_grad()
    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run once; inputs are moved to the module's device, where the outputs stay.

        Raises:
            EngineInputError: a name, type or shape that the component does not take.
        """
        check_inputs(self.spec, inputs)
        if self.module is None:
            raise RuntimeError(f"{self.spec.name}: the engine is closed")
        arguments = [inputs[tensor.name].to(self.device) for tensor in self.spec.inputs]
        # Not the caller's autocast either: codes are computed in float32, and so is all that a specification says.
        exact = torch.autocast(self.device.type, enabled=False)
        with _RUNNING, limited_threads(self.threads), float32_products("ieee"), exact:
            outputs = self.module(*arguments)
        return {tensor.name: value for tensor, value in zip(self.spec.outputs, outputs, strict=True)}

    def close(self) -> None:
        self.module = None


class InHalf(nn.Module):
    """A component in half precision between inputs and outputs in float32, as engines of that type have them.

    Timesteps stay float32: diffusers makes sines of them in float32, and float16 knows no 999.5.
    """

    def __init__(self, module: nn.Module, spec: ComponentSpec, dtype: torch.dtype) -> None:
        super().__init__()
        self.module = module.to(dtype)
        self.names = [tensor.name for tensor in spec.inputs]
        self.dtype = dtype

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run once; inputs and outputs in the order of the specification."""
        halved = [
            value.to(self.dtype) if value.is_floating_point() and name != "timestep" else value
            for name, value in zip(self.names, inputs, strict=True)
        ]
        return tuple(value.float() if value.is_floating_point() else value for value in self.module(*halved))


def default_device() -> torch.device:
    """The GPU where torch can use one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_torch_model(path: Path) -> LoadedModel:
    """Load a diffusers model or a quantized checkpoint.

    Raises:
        ArtifactError: neither of them, or a checkpoint that was changed since it was written.
        ModelLoadError: the model cannot be loaded.
    """
    if stage_of(path) == "checkpoint":
        from quest_deploy.quantize.checkpoint import load_checkpoint

        return load_checkpoint(path)
    return load_model(path)


def torch_engines(
    model: LoadedModel,
    specs: dict[str, ComponentSpec],
    *,
    device: str | torch.device | None = None,
    threads: int | None = None,
) -> dict[str, Engine]:
    """The components of a loaded model as engines; `device` None takes the GPU where torch can use one."""
    chosen = default_device() if device is None else torch.device(device)
    modules = wrap_components(model)
    return {
        name: TorchEngine(spec, modules[name].to(chosen), threads=threads) for name, spec in specs.items()
    }


def load_torch_engines(
    path: Path, *, device: str | torch.device | None = None, threads: int | None = None
) -> dict[str, Engine]:
    """Load every component of a model directory or checkpoint.

    Args:
        path: The directory.
        device: Where they run; None takes the GPU where torch can use one.
        threads: CPU threads; None leaves the choice to torch.

    Raises:
        ArtifactError: neither of them, or a checkpoint that was changed since it was written.
        ModelLoadError: the model cannot be loaded.
    """
    with LOADING:
        return torch_engines(load_torch_model(path), component_specs(path), device=device, threads=threads)


@contextlib.contextmanager
def limited_threads(threads: int | None) -> Iterator[None]:
    """Run the body with `threads` CPU threads; the setting is global, so it is put back afterwards."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)

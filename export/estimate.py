"""What an export will take in memory and on disk, before any of it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from quest_deploy.config import ExportConfig
from quest_deploy.export.passes.block_int4 import BLOCKS
from quest_deploy.export.to_onnx import INLINE_LIMIT_BYTES, load_source
from quest_deploy.model.components import runs
from quest_deploy.model.load import wrap_components
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.layers import QuantizedLayer, QuantizedLinear

FLOAT_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0}
FLOAT32_BYTES = 4
# Of quantizers: a graph has what follows from them.
NOT_EXPORTED = (".stored_scale", ".row")
# Counted from exports whose peak was measured (benchmarks/results/large.json): the traced program and its graph, for
# each module; and how often the largest weight, and a file without external data, are in memory at once.
BYTES_OF_MODULE = 250_000
COPIES_OF_WEIGHT, COPIES_OF_FILE = 4, 5
# Of the activations while operators are tried in half precision, on images of 256 x 256 pixels.
BYTES_OF_TRIALS = 700_000_000
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, kw_only=True)
class ComponentEstimate:
    """What the export of one component will take.

    Attributes:
        component: Its name.
        parameters: How many weights it has.
        disk_bytes: Of its ONNX file with external data.
        memory_bytes: The most at once, of the whole process.
    """

    component: str
    parameters: int
    disk_bytes: int
    memory_bytes: int


def estimate(source: Path, config: ExportConfig) -> list[ComponentEstimate]:
    """What `export` will take for each component. Nothing is written, and no large weight is read.

    Raises:
        ArtifactError: `source` cannot be used.
        ExportError: mode and source do not go together.
    """
    model = load_source(source, config)
    before = _resident_bytes()
    found = []
    for name, module in wrap_components(model).items():
        sizes = [*_weights(module, config)]
        disk = round(sum(count * size for count, size in sizes))
        largest = max((count for count, _ in sizes), default=0) * FLOAT32_BYTES
        memory = before + BYTES_OF_MODULE * sum(1 for _ in module.modules()) + COPIES_OF_WEIGHT * largest
        if config.dtype != "fp32":
            memory += BYTES_OF_TRIALS
        if disk <= INLINE_LIMIT_BYTES:
            memory += COPIES_OF_FILE * disk
        found.append(
            ComponentEstimate(
                component=name,
                parameters=sum(count for count, _ in sizes),
                disk_bytes=disk,
                memory_bytes=memory,
            )
        )
    return found


def _weights(module: nn.Module, config: ExportConfig) -> Iterator[tuple[int, float]]:
    """How many values each tensor has, and the bytes of one."""
    layers = quantized_layers(module)
    codes = {f"{name}.codes": layer for name, layer in layers.items()}
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) in seen or name.endswith(NOT_EXPORTED) or not runs(module, name):
            continue
        seen.add(id(tensor))
        size = _code_bytes(codes[name], config) if name in codes else _float_bytes(tensor, config)
        yield tensor.numel(), size


def _float_bytes(tensor: Tensor, config: ExportConfig) -> float:
    return FLOAT_BYTES[config.dtype] if tensor.is_floating_point() else float(tensor.element_size())


def _code_bytes(layer: QuantizedLayer, config: ExportConfig) -> float:
    if layer.weight_bits != 4:
        return 1.0
    if config.mode == "int4-weight-only" and isinstance(layer, QuantizedLinear):
        block = next((block for block in BLOCKS if layer.codes.shape[1] % block == 0), None)
        if block is not None:
            return 0.5 + FLOAT_BYTES[config.dtype] / block
    return 0.5 if config.target == "onnxruntime" else 1.0


def _resident_bytes() -> int:
    """Of this process now, as Linux counts it; 0 elsewhere."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * PAGE_BYTES
    except (OSError, IndexError, ValueError):
        return 0

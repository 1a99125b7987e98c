"""What has to be exchanged in a component before it is traced."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx
from torch import Tensor, nn

logger = logging.getLogger(__name__)

MAX_PERIOD = 10000
PROBES = (0.0, 1.0, 250.5, 999.0)
MAX_POSITIONS = 1024
# What onnxscript's optimizer takes for zero.
NEARLY_ZERO = 1e-8


class ConstantFrequencies(nn.Module):
    """Sinusoidal timestep embedding whose frequencies are a constant that torch computed.

    diffusers computes them in the graph, where the exporter folds them with numpy's exp: one unit in the last place
    away from torch's, times t = 1000, moves the angle by 1e-4. That alone can flip a code of the first time embedding
    layer, and with it the whole picture.
    """

    frequencies: Tensor

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        half = embedding.num_channels // 2
        exponent = -math.log(MAX_PERIOD) * torch.arange(half, dtype=torch.float32)
        exponent = exponent / (half - embedding.downscale_freq_shift)
        self.register_buffer("frequencies", torch.exp(exponent))
        self.scale, self.cosine_first = embedding.scale, embedding.flip_sin_to_cos

    def forward(self, timesteps: Tensor) -> Tensor:
        """`timesteps` [n] -> [n, channels]."""
        angle = self.scale * (timesteps[:, None].to(torch.float32) * self.frequencies[None, :])
        parts = (torch.sin(angle), torch.cos(angle))
        return torch.cat(parts[::-1] if self.cosine_first else parts, dim=-1)


class RotaryTable(nn.Module):
    """Rotary position embedding of FLUX, looked up in tables of whole positions.

    diffusers computes the angles in float64, which TensorRT does not have; their sines and cosines are float32. Tokens
    lie on a grid, so that the tables hold every value there is, up to :data:`MAX_POSITIONS` along each axis.
    """

    def __init__(self, embedding: Any) -> None:
        super().__init__()
        self.axes = len(embedding.axes_dim)
        every = torch.arange(MAX_POSITIONS, dtype=torch.float32)[:, None].expand(-1, self.axes)
        for name, both in zip(("cosine", "sine"), embedding(every), strict=True):
            for axis, table in enumerate(both.split(list(embedding.axes_dim), dim=-1)):
                self.register_buffer(f"{name}_{axis}", table.contiguous())

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`ids` [tokens, axes] -> cosines and sines, float32 [tokens, channels]."""
        index = ids.to(torch.int64)
        cosine, sine = (
            torch.cat(
                [
                    self.get_buffer(f"{name}_{axis}").index_select(0, index[:, axis])
                    for axis in range(self.axes)
                ],
                dim=-1,
            )
            for name in ("cosine", "sine")
        )
        return cosine, sine


@contextlib.contextmanager
def traceable(module: nn.Module) -> Iterator[nn.Module]:
    """`module`, for the body's duration, with :class:`ConstantFrequencies` and :class:`RotaryTable` for its embeddings.

    An embedding that would not give the same bits as its replacement stays.
    """
    from diffusers.models.embeddings import Timesteps
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    probes = torch.tensor(PROBES)
    positions = torch.tensor([[0, 1, 2], [1, 63, 127], [0, 511, MAX_POSITIONS - 1]], dtype=torch.float32)
    replacements: dict[type[nn.Module], tuple[type[nn.Module], Tensor]] = {
        Timesteps: (ConstantFrequencies, probes),
        FluxPosEmbed: (RotaryTable, positions),
    }
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) not in replacements:
                continue
            kind, inputs = replacements[type(child)]
            new = kind(child).eval()
            if _same(child, new, inputs):
                replaced.append((parent, name, child))
                setattr(parent, name, new)
    try:
        yield module
    finally:
        for parent, name, child in replaced:
            setattr(parent, name, child)


def _same(embedding: nn.Module, replacement: nn.Module, inputs: Tensor) -> bool:
    pairs = [(module(inputs),) for module in (embedding, replacement)]
    original, new = (torch.cat(pair[0], dim=-1) if isinstance(pair[0], tuple) else pair[0] for pair in pairs)
    same = original.shape == new.shape and torch.equal(original, new)
    if not same:
        logger.warning(
            "%s: its frequencies stay in the graph, as the constants of this version would differ",
            type(embedding).__name__,
        )
    return same


def remove_idle_squeezes(graph_module: torch.fx.GraphModule) -> None:
    """Remove every squeeze that changes no shape, in place: ONNX refuses to squeeze an axis that is longer than 1."""
    for node in list(graph_module.graph.nodes):
        if node.target is not torch.ops.aten.squeeze.dim:
            continue
        source = node.args[0]
        if node.meta["val"].ndim == source.meta["val"].ndim:
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)
    graph_module.recompile()


def keep_tiny_addends(graph_module: torch.fx.GraphModule) -> None:
    """Write every constant that is added and nearly zero as a tensor of several values, in place.

    The exporter's optimizer takes ``x + 1e-15`` for ``x + 0`` and leaves it out, but only for a single value. It is
    what keeps a linear attention (Sana) from dividing zero by zero.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is not torch.ops.aten.add.Tensor or not isinstance(node.args[1], float):
            continue
        value, like = node.args[1], node.meta["val"]
        if not 0 < abs(value) <= NEARLY_ZERO:
            continue
        # Along an axis that the traced sizes do not change, so that the tensor is a constant.
        axis = max(
            (axis for axis, size in enumerate(like.shape) if isinstance(size, int)),
            key=lambda axis: like.shape[axis],
        )
        shape = [size if index == axis else 1 for index, size in enumerate(like.shape)]
        with graph.inserting_before(node):
            addend = graph.call_function(torch.ops.aten.full.default, (shape, value), {"dtype": like.dtype})
        addend.meta["val"] = like.new_full(shape, value)
        node.update_arg(1, addend)
    graph_module.recompile()

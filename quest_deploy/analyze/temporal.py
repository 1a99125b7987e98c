"""How far quantized time embeddings are from the true ones, timestep by timestep.

QuEST (arXiv 2402.03666, section 4.2): where the embedding of a timestep moves to that of another one, the denoiser
removes another step's noise; hence its first phase.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from quest_deploy.analyze.activations import round_figure
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.insert import Role, quantizable_layers, quantized_layers
from quest_deploy.quantize.sensitivity import BATCH_PAIRS, run_pairs
from quest_deploy.quantize.tables import time_tables


def embedding_layer(run_order: Sequence[str], roles: Mapping[str, Role]) -> str | None:
    """The layer whose output is the time embedding: the last that carries time before any that does not.

    None where the denoiser has no layer that carries time. Where each block embeds the time anew, it is the last of
    the first block's.
    """
    temporal = [name for name in run_order if roles[name] == "temporal"]
    if not temporal:
        return None
    end = run_order.index(temporal[0])
    while end + 1 < len(run_order) and roles[run_order[end + 1]] == "temporal":
        end += 1
    return run_order[end]


@torch.no_grad()
def temporal_outputs(
    denoiser: nn.Module, data: CalibrationSet, roles: Mapping[str, Role]
) -> dict[str, Tensor]:
    """What each layer that carries time gives along the first trajectory.

    Args:
        denoiser: Full-precision diffusers module or one with quantized layers.
        data: Recorded trajectories.
        roles: The part that each layer plays.

    Returns:
        By layer name, float32 [branches, T, d]; of a layer that runs more than once in a call, the first run.
    """
    collected: dict[str, list[Tensor]] = {}
    pairs, calls = 0, 0

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def keep(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            parts = collected.setdefault(name, [])
            if len(parts) < calls:
                parts.append(output.flatten(1).unflatten(0, (-1, pairs)))

        return keep

    layers: dict[str, nn.Module] = {**quantizable_layers(denoiser), **quantized_layers(denoiser)}
    layers |= time_tables(denoiser)
    handles = [
        layer.register_forward_hook(hook(name)) for name, layer in layers.items() if roles[name] == "temporal"
    ]
    try:
        for step in torch.arange(data.timesteps.numel()).split(BATCH_PAIRS):
            pairs, calls = step.numel(), calls + 1
            run_pairs(denoiser, data, torch.zeros_like(step), step)
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(parts, dim=1) for name, parts in collected.items()}


def compare_outputs(true: Mapping[str, Tensor], quantized: Mapping[str, Tensor]) -> dict[str, Any]:
    """By layer, `relative_error` and `cosine` of the quantized output at each timestep.

    Layers that time-embedding tables made useless are left out.

    Args:
        true: From `temporal_outputs`, float32 [branches, T, d] each.
        quantized: The same layers, or some of them.
    """
    result = {}
    for name, got in quantized.items():
        expected = true[name]
        error = (got - expected).square().sum(dim=(0, 2)) / expected.square().sum(dim=(0, 2)).clamp_min(1e-30)
        cosine = torch.nn.functional.cosine_similarity(expected, got, dim=2).mean(dim=0)
        result[name] = {
            "relative_error": [round_figure(value) for value in error.sqrt().tolist()],
            "cosine": [round_figure(value) for value in cosine.tolist()],
        }
    return result


def confusion(true: Tensor, quantized: Tensor) -> dict[str, Any]:
    """Which true time embedding each quantized one is nearest to.

    Args:
        true: float32 [branches, T, d].
        quantized: The same shape.

    Returns:
        `distance` [T][T], ||quantized_i - true_j|| / ||true_j||; `nearest` [T]; and `mistaken`, the share of timesteps
        whose nearest true embedding is another timestep's.
    """
    expected, got = true[0].double(), quantized[0].double()
    apart = torch.cdist(got, expected)
    distance, nearest = apart / expected.norm(dim=1).clamp_min(1e-30), apart.argmin(dim=1)
    return {
        "distance": [[round_figure(value) for value in line] for line in distance.tolist()],
        "nearest": nearest.tolist(),
        "mistaken": float((nearest != torch.arange(nearest.numel())).double().mean()),
    }

"""Rounding with second-order error compensation (GPTQ, arXiv 2210.17323), the weights' starting point.

The published QuEST starts from AdaRound block reconstruction, hours of gradient descent; this closed form solves the
same layer-wise problem, min ||W X - W_q X||^2 with fixed scales, in seconds. Codes and scales stay on the same grid, so
nothing changes for export.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quest_deploy.model.components import predict
from quest_deploy.quantize.affine import fake_quantize
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.grid import channel_shape, weight_bounds
from quest_deploy.quantize.insert import LayerQParams, channel_axis, quantizable_layers
from quest_deploy.quantize.layers import Quantizable
from quest_deploy.quantize.resume import GENERATOR, Throttle, WorkDirectory
from quest_deploy.quantize.rows import RowChoice

DAMPING = 0.01
BLOCK = 128
MAX_COLUMNS = 4096
MAX_HESSIAN_BYTES = 2 << 30


def round_with_compensation(weight: Tensor, scale: Tensor, hessian: Tensor, bits: int) -> Tensor:
    """Quantize columns one by one, each time moving the rounding error to the columns that are left.

    An output channel for which that ends worse than rounding to nearest (it is greedy, and clips) is left at nearest.

    Args:
        weight: [c_out, k].
        scale: [c_out], positive.
        hessian: [k, k], X^T X over the inputs.
        bits: 4 or 8.

    Returns:
        The weight on its grid, [c_out, k].
    """
    columns = weight.shape[1]
    diagonal = hessian.diagonal().to(torch.float64, copy=True)
    diagonal[diagonal <= 0] = 1.0
    diagonal += DAMPING * diagonal.mean()
    # Columns that matter most are rounded first, while there is most left to compensate with.
    order = diagonal.argsort(descending=True)
    damped = hessian[order][:, order].to(torch.float64)
    damped.diagonal().copy_(diagonal[order])
    factor = inverse_factor(damped).to(torch.float32)
    del damped
    work = weight[:, order].clone()
    quantized = torch.empty_like(work)
    bounds = weight_bounds(bits)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = work.new_zeros(work.shape[0], end - start)
        block = work[:, start:end].clone()
        local = factor[start:end, start:end]
        for i in range(end - start):
            column = fake_quantize(block[:, i], scale, *bounds)
            quantized[:, start + i] = column
            error = (block[:, i] - column) / local[i, i]
            block[:, i:] -= torch.outer(error, local[i, i:])
            errors[:, i] = error
        work[:, end:] -= errors @ factor[start:end, end:]
    result = torch.empty_like(quantized)
    result[:, order] = quantized
    nearest = fake_quantize(weight, scale[:, None], *bounds)
    better = output_error(weight - result, hessian) < output_error(weight - nearest, hessian)
    return torch.where(better[:, None], result, nearest)


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """[c_out]: ||E X||^2 of each output channel, for weight errors [c_out, k] and X^T X [k, k]."""
    return ((error @ hessian) * error).sum(dim=1)


def inverse_factor(matrix: Tensor) -> Tensor:
    """Upper triangular U with U^T U = matrix^-1, from one Cholesky factorisation of the reversed matrix.

    Args:
        matrix: [k, k], symmetric positive definite.
    """
    upper = torch.linalg.cholesky(matrix.flip(0, 1)).flip(0, 1)
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(upper, identity, upper=True)


def hessian_bytes(layer: Quantizable) -> int:
    """Of X^T X over the layer's inputs."""
    return 4 * layer.weight[0].numel() ** 2


def rounding_bytes(layer: Quantizable) -> int:
    """What `round_with_compensation` takes beside the layer and its Hessian, of which there are copies by turns."""
    hessian, weight = hessian_bytes(layer), 4 * layer.weight.numel()
    return max(9 * hessian + weight, 2 * hessian + 10 * weight)


def count_patches(layer: Quantizable, x: Tensor) -> int:
    """How many rows the matrix has that the layer's weight multiplies."""
    if not isinstance(layer, nn.Conv2d):
        return x.shape[:-1].numel()
    sides = zip(x.shape[2:], map(int, layer.padding), layer.kernel_size, layer.stride, strict=True)
    return int(x.shape[0] * math.prod((side + 2 * pad - size) // by + 1 for side, pad, size, by in sides))


def patches(layer: Quantizable, x: Tensor, at: Tensor) -> Tensor:
    """Rows of the matrix that the layer's weight multiplies.

    Args:
        layer: `nn.Linear`, or `nn.Conv2d` that :func:`has_patches`.
        x: Its input.
        at: int64 [n], which of its :func:`count_patches` rows.

    Returns:
        float32 [n, k], k = c_in * kh * kw for a convolution.
    """
    if isinstance(layer, nn.Conv2d):
        ph, pw = map(int, layer.padding)
        (kh, kw), (sh, sw) = layer.kernel_size, layer.stride
        windows = F.pad(x, (pw, pw, ph, ph)).unfold(2, kh, sh).unfold(3, kw, sw)
        h, w = windows.shape[2:4]
        return windows[at // (h * w), :, at // w % h, at % w].flatten(1)
    return x.flatten(0, -2)[at]


def has_patches(layer: Quantizable) -> bool:
    """Whether :func:`patches` knows the layer: no groups, no dilation, and padding given in pixels."""
    if isinstance(layer, nn.Linear):
        return True
    return layer.groups == 1 and set(layer.dilation) == {1} and not isinstance(layer.padding, str)


def chunks(denoiser: nn.Module, names: Sequence[str], most_bytes: float | None = None) -> Iterator[list[str]]:
    """Groups of layers whose Hessians fit into memory together; layers that are too wide are left out."""
    most_bytes = MAX_HESSIAN_BYTES if most_bytes is None else most_bytes
    layers = quantizable_layers(denoiser)
    chunk: list[str] = []
    used = 0
    for name in names:
        layer = layers[name]
        if layer.weight[0].numel() > MAX_COLUMNS or not has_patches(layer):
            continue
        if chunk and used + hessian_bytes(layer) > most_bytes:
            yield chunk
            chunk, used = [], 0
        chunk.append(name)
        used += hessian_bytes(layer)
    if chunk:
        yield chunk


@torch.no_grad()
def compensate(
    denoiser: nn.Module,
    data: CalibrationSet,
    qparams: Mapping[str, LayerQParams],
    names: Sequence[str],
    *,
    prompts_per_step: int,
    rows_per_step: int,
    seed: int,
    report: Callable[[int, int], None] = lambda completed, total: None,
    work: WorkDirectory | None = None,
    key: str = "rounded",
    beside: Sequence[str] = (),
    at_once: int | None = None,
) -> dict[str, Tensor]:
    """Rounded weights of the layers `names`, divided by their channel rows: the float weights to go on from.

    Args:
        denoiser: Full-precision diffusers module.
        data: Recorded trajectories.
        qparams: Scales of the layers.
        names: One chunk of layers.
        prompts_per_step: How many prompts are run at each timestep.
        rows_per_step: How many rows of each layer's input are used at each timestep.
        seed: For the choice of rows.
        report: Called after each timestep and each layer.
        work: Where to keep Hessians and rounded layers, to go on from after an interruption.
        key: What their names there start with.
        beside: Layers, `names` among them, of which rows are drawn as well, as if they were rounded together: so that
            what is drawn does not depend on how many Hessians fit into memory.
        at_once: The most prompts that are run together; None means all.

    Returns:
        By layer name, float32 in the weight's shape.
    """
    every = quantizable_layers(denoiser)
    layers = {name: every[name] for name in names}
    generator = torch.Generator().manual_seed(seed)
    hessians = {
        name: layer.weight.new_zeros(layer.weight[0].numel(), layer.weight[0].numel())
        for name, layer in layers.items()
    }
    steps, first, group, throttle = data.timesteps.numel(), 0, 0, Throttle(work)
    result: dict[str, Tensor] = {}
    if work is not None and (saved := work.load(f"{key}-hessians")) is not None:
        generator.set_state(saved[0].pop(GENERATOR))
        first = saved[1]["steps"]
        for name, hessian in saved[0].items():
            hessians[name].copy_(hessian)
    if work is not None and (saved := work.load(f"{key}-layers")) is not None:
        result = saved[0]

    choice = RowChoice(generator, data.targets.shape[2])

    def accumulate(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        layer = every[name]

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            _, _, chosen = choice.of(name, count_patches(layer, args[0]), rows_per_step)
            if name in hessians:
                rows = patches(layer, quantized_input(layer, args[0], qparams[name], group), chosen)
                hessians[name].addmm_(rows.T, rows)

        return hook

    handles = [every[name].register_forward_pre_hook(accumulate(name)) for name in beside or names]
    try:
        for step in range(first, steps):
            # Timesteps descend, groups ascend with the timestep.
            group = steps - 1 - step
            prompt = torch.randperm(data.num_prompts, generator=generator)[:prompts_per_step]
            for chunk in choice.chunks(prompt, at_once or prompts_per_step):
                predict(denoiser, *data.inputs(chunk, torch.full_like(chunk, step)))
            # The last time for the layers, of which each may take a while.
            if work is not None and (throttle.due() or step + 1 == steps):
                work.save(f"{key}-hessians", hessians | {GENERATOR: generator.get_state()}, steps=step + 1)
            report(step + 1, steps + len(names))
    finally:
        for handle in handles:
            handle.remove()
    for done, (name, layer) in enumerate(layers.items(), start=steps + 1):
        if name in result:
            continue
        q = qparams[name]
        row = torch.ones(layer.weight.shape[1]) if q.row is None else q.row
        row = channel_shape(row, layer.weight.ndim, 1).to(layer.weight.device)
        flat = (layer.weight * row).flatten(1)
        rounded = round_with_compensation(
            flat, q.weight_scale.to(flat.device), hessians.pop(name), q.weight_bits
        )
        result[name] = (rounded.reshape(layer.weight.shape) / row).cpu()
        if work is not None and throttle.due():
            work.save(f"{key}-layers", result)
        report(done, steps + len(names))
    return result


def quantized_input(layer: Quantizable, x: Tensor, qparams: LayerQParams, group: int) -> Tensor:
    """What the quantized layer's weight really multiplies: the input divided by its row, on the activation grid."""
    if qparams.row is not None:
        x = x / channel_shape(qparams.row.to(x.device), x.ndim, channel_axis(layer))
    if qparams.group_scale is None:
        return x
    scale = float(qparams.group_scale[min(group, qparams.group_scale.numel() - 1)])
    if not math.isfinite(scale):
        return x
    return fake_quantize(x, scale, qparams.qmin, qparams.qmax)

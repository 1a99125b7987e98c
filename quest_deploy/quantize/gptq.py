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
    given = hessian
    hessian = hessian.to(torch.float64, copy=True)
    dead = hessian.diagonal() <= 0
    hessian.diagonal()[dead] = 1.0
    hessian.diagonal().add_(DAMPING * hessian.diagonal().mean())
    # Columns that matter most are rounded first, while there is most left to compensate with.
    order = hessian.diagonal().argsort(descending=True)
    hessian = hessian[order][:, order]
    factor = inverse_factor(hessian).to(torch.float32)
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
    better = output_error(weight - result, given) < output_error(weight - nearest, given)
    return torch.where(better[:, None], result, nearest)


def output_error(error: Tensor, hessian: Tensor) -> Tensor:
    """[c_out]: ||E X||^2 of each output channel, for weight errors [c_out, k] and X^T X [k, k]."""
    return ((error @ hessian) * error).sum(dim=1)


def inverse_factor(matrix: Tensor) -> Tensor:
    """Upper triangular U with U^T U = matrix^-1, from one Cholesky factorisation of the reversed matrix.

    Args:
        matrix: [k, k], symmetric positive definite.
    """
    lower = torch.linalg.cholesky(matrix.flip(0, 1))
    identity = torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), identity, upper=True)


def patches(layer: Quantizable, x: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """`count` random rows of the matrix that the layer's weight multiplies.

    Args:
        layer: `nn.Linear`, or `nn.Conv2d` that :func:`has_patches`.
        x: Its input.
        count: How many rows.
        generator: Chooses them.

    Returns:
        float32 [count, k], k = c_in * kh * kw for a convolution.
    """
    if isinstance(layer, nn.Conv2d):
        ph, pw = map(int, layer.padding)
        (kh, kw), (sh, sw) = layer.kernel_size, layer.stride
        windows = F.pad(x, (pw, pw, ph, ph)).unfold(2, kh, sh).unfold(3, kw, sw)
        n, _, h, w = windows.shape[:4]
        flat = torch.randint(n * h * w, (count,), generator=generator)
        return windows[flat // (h * w), :, flat // w % h, flat % w].flatten(1)
    rows = x.flatten(0, -2)
    return rows[torch.randint(rows.shape[0], (count,), generator=generator)]


def has_patches(layer: Quantizable) -> bool:
    """Whether :func:`patches` knows the layer: no groups, no dilation, and padding given in pixels."""
    if isinstance(layer, nn.Linear):
        return True
    return layer.groups == 1 and set(layer.dilation) == {1} and not isinstance(layer.padding, str)


def chunks(denoiser: nn.Module, names: Sequence[str]) -> Iterator[list[str]]:
    """Groups of layers whose Hessians fit into memory together; layers that are too wide are left out."""
    layers = quantizable_layers(denoiser)
    chunk: list[str] = []
    used = 0
    for name in names:
        layer = layers[name]
        columns = layer.weight[0].numel()
        if columns > MAX_COLUMNS or not has_patches(layer):
            continue
        if chunk and used + 4 * columns**2 > MAX_HESSIAN_BYTES:
            yield chunk
            chunk, used = [], 0
        chunk.append(name)
        used += 4 * columns**2
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

    Returns:
        By layer name, float32 in the weight's shape.
    """
    layers = {name: quantizable_layers(denoiser)[name] for name in names}
    generator = torch.Generator().manual_seed(seed)
    hessians = {
        name: layer.weight.new_zeros(layer.weight[0].numel(), layer.weight[0].numel())
        for name, layer in layers.items()
    }
    steps, first, group, throttle = data.timesteps.numel(), 0, 0, Throttle()
    result: dict[str, Tensor] = {}
    if work is not None and (saved := work.load(f"{key}-hessians")) is not None:
        generator.set_state(saved[0].pop(GENERATOR))
        first = saved[1]["steps"]
        for name, hessian in saved[0].items():
            hessians[name].copy_(hessian)
    if work is not None and (saved := work.load(f"{key}-layers")) is not None:
        result = saved[0]

    def accumulate(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        layer = layers[name]

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = quantized_input(layer, args[0], qparams[name], group)
            rows = patches(layer, x, rows_per_step, generator)
            hessians[name].addmm_(rows.T, rows)

        return hook

    handles = [layer.register_forward_pre_hook(accumulate(name)) for name, layer in layers.items()]
    try:
        for step in range(first, steps):
            # Timesteps descend, groups ascend with the timestep.
            group = steps - 1 - step
            prompt = torch.randperm(data.num_prompts, generator=generator)[:prompts_per_step]
            sample, timestep, conditioning = data.inputs(prompt, torch.full_like(prompt, step))
            predict(denoiser, sample, timestep, conditioning)
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

"""From calibration inputs to a starting point: the scales of every layer before anything is finetuned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from quest_deploy.errors import CalibrationError
from quest_deploy.quantize import affine
from quest_deploy.quantize.calibrate import EXTREME_ROWS
from quest_deploy.quantize.grid import channel_shape, weight_bounds
from quest_deploy.quantize.insert import LayerQParams, quantizable_layers
from quest_deploy.quantize.layers import Quantizable

Method = Literal["minmax", "search"]
MIGRATION_EXPONENTS = (0.25, 0.5, 0.75)
COARSE_SEARCH_STEPS = 16
MAX_ERROR_ROWS = 512


def initialize_layer(
    layer: Quantizable,
    inputs: Tensor,
    weight_bits: int,
    activation_bits: int,
    *,
    method: Method,
    time_aware: bool,
    channel_wise: bool,
    migration_exponent: float | Literal["auto"] = "auto",
) -> LayerQParams:
    """Scales of one layer.

    Args:
        layer: `nn.Linear` or `nn.Conv2d`, full precision.
        inputs: float32 [G, s + 2, c_in], samples of its input at each timestep group, and its extremes.
        weight_bits: 4 or 8.
        activation_bits: 4 or 8.
        method: "minmax" covers every value; "search" takes the ranges of least error.
        time_aware: Whether each group gets a scale of its own (otherwise there is one, G = 1).
        channel_wise: Whether a migration row is tried.
        migration_exponent: The row's exponent; "auto" takes the best of some, or no row.
    """
    weight = layer.weight.detach()
    if method == "minmax":
        grid = affine.minmax_grid(inputs, activation_bits)
        scale = affine.minmax_weight_scale(weight, weight_bits)
        return _qparams(scale, weight_bits, activation_bits, grid, torch.tensor([grid.scale]), None)
    row = None
    if channel_wise and getattr(layer, "groups", 1) == 1:
        row = (
            choose_row(weight, inputs, weight_bits, activation_bits)
            if migration_exponent == "auto"
            else affine.migration_row(inputs, weight, migration_exponent)
        )
    scaled_inputs = inputs if row is None else inputs / row
    scaled_weight = weight if row is None else weight * channel_shape(row, weight.ndim, 1)
    grid = activation_grid(scaled_inputs, activation_bits)
    group_scale = torch.tensor([grid.scale])
    if time_aware and activation_bits == 8:
        group_scale = affine.minmax_group_scale(scaled_inputs, grid)
    elif time_aware:
        group_scale = affine.search_group_scale(scaled_inputs[:, :-EXTREME_ROWS], grid)
    scale = affine.search_weight_scale(scaled_weight, weight_bits)
    return _qparams(scale, weight_bits, activation_bits, grid, group_scale, row)


def activation_grid(inputs: Tensor, bits: int) -> affine.Grid:
    """The common grid of a layer's inputs [G, s, c_in]: every value at 8 bits, least error below.

    At 8 bits clipping a rare large value costs the network's output more than the finer steps gain, which the squared
    error of the input does not show (the published runs cover every value there, too).
    """
    if bits == 8:
        return affine.minmax_grid(inputs, bits)
    return affine.search_grid(inputs[:, :-EXTREME_ROWS], bits)


def _qparams(
    weight_scale: Tensor,
    weight_bits: int,
    activation_bits: int,
    grid: affine.Grid,
    group_scale: Tensor,
    row: Tensor | None,
) -> LayerQParams:
    return LayerQParams(
        weight_bits=weight_bits,
        weight_scale=weight_scale,
        activation_bits=activation_bits,
        group_scale=group_scale,
        qmin=grid.qmin,
        qmax=grid.qmax,
        row=row,
    )


def choose_row(weight: Tensor, inputs: Tensor, weight_bits: int, activation_bits: int) -> Tensor | None:
    """The migration row whose quantized product is nearest to the true one; None where no row beats having none.

    A convolution is judged as the 1x1 convolutions of its taps, which needs no neighbouring pixels.

    Args:
        weight: [c_out, c_in, ...].
        inputs: [G, s + 2, c_in].
        weight_bits: 4 or 8.
        activation_bits: 4 or 8.
    """
    rows = inputs[:, :-EXTREME_ROWS].flatten(0, 1)
    rows = rows[:: max(1, rows.shape[0] // MAX_ERROR_ROWS)]
    taps = weight.flatten(2).movedim(-1, 0).flatten(0, 1) if weight.ndim > 2 else weight
    true = rows @ taps.T
    candidates: list[Tensor | None] = [None]
    candidates += [affine.migration_row(inputs, weight, exponent) for exponent in MIGRATION_EXPONENTS]
    errors = []
    for row in candidates:
        x = rows if row is None else rows / row
        w = weight if row is None else weight * channel_shape(row, weight.ndim, 1)
        grid = activation_grid(inputs if row is None else inputs / row, activation_bits)
        scale = channel_shape(
            affine.search_weight_scale(w, weight_bits, steps=COARSE_SEARCH_STEPS), w.ndim, 0
        )
        w = affine.fake_quantize(w, scale, *weight_bounds(weight_bits))
        w = w.flatten(2).movedim(-1, 0).flatten(0, 1) if w.ndim > 2 else w
        x = affine.fake_quantize(x, grid.scale, grid.qmin, grid.qmax)
        errors.append(float((x @ w.T - true).square().mean()))
    return candidates[errors.index(min(errors))]


@torch.no_grad()
def initialize(
    denoiser: nn.Module,
    inputs: Mapping[str, Tensor],
    bits: Mapping[str, tuple[int, int]],
    *,
    method: Method = "search",
    time_aware: bool = True,
    channel_wise: bool = True,
) -> dict[str, LayerQParams]:
    """Scales of every quantizable layer of `denoiser`, by name.

    Args:
        denoiser: Full precision.
        inputs: As `collect_inputs` gives them.
        bits: Of weights and activations, as `layer_bits` gives them.
        method: As for `initialize_layer`.
        time_aware: As there.
        channel_wise: As there.

    Raises:
        CalibrationError: a layer was never run during calibration.
    """
    result = {}
    for name, layer in quantizable_layers(denoiser).items():
        if name not in inputs:
            raise CalibrationError(
                f"layer {name!r} was not run during calibration; leave it out of the recipe"
            )
        result[name] = initialize_layer(
            layer, inputs[name], *bits[name], method=method, time_aware=time_aware, channel_wise=channel_wise
        )
    return result

"""Each half of the quantization, switched off by itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from benchmarks.halves import float_activations, float_weights
from quest_deploy.quantize.affine import fake_quantize
from quest_deploy.quantize.insert import LayerQParams, insert
from quest_deploy.quantize.layers import TimestepContext

SCALE, ROW = torch.tensor([0.2, 0.1]), torch.tensor([0.5, 1.0, 2.0])
NOW = torch.tensor([20.0])


class Denoiser(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.fixture
def layer() -> nn.Linear:
    return nn.Linear(3, 4).requires_grad_(False)


def student(layer: nn.Linear) -> nn.Module:
    """The layer on a coarse grid, in the second of two timestep groups."""
    result, context = Denoiser(copy.deepcopy(layer)), TimestepContext(torch.tensor([10.0]))
    qparams = LayerQParams(
        weight_bits=4,
        weight_scale=torch.full((4,), 0.1),
        activation_bits=4,
        group_scale=SCALE,
        qmin=-8,
        qmax=7,
        row=ROW,
    )
    insert(result, {"layer": qparams}, context)
    return result


def test_without_both_halves_the_layer_is_what_it_was(layer: nn.Linear) -> None:
    x, changed = torch.randn(5, 3), student(layer)
    assert not torch.allclose(changed(x, timestep=NOW), layer(x), atol=1e-3)
    float_weights(changed)
    float_activations(changed)
    torch.testing.assert_close(changed(x, timestep=NOW), layer(x))


def test_one_half_alone(layer: nn.Linear) -> None:
    x, activations, weights = torch.randn(5, 3), student(layer), student(layer)
    float_weights(activations)
    on_grid = fake_quantize(x / ROW, SCALE[1], -8, 7) * ROW
    torch.testing.assert_close(activations(x, timestep=NOW), layer(on_grid))
    float_activations(weights)
    rounded = fake_quantize(layer.weight * ROW, torch.tensor(0.1), -8, 7) / ROW
    torch.testing.assert_close(weights(x, timestep=NOW), nn.functional.linear(x, rounded, layer.bias))

"""Rounding with error compensation, measured by what it minimizes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quest_deploy.quantize import gptq
from quest_deploy.quantize.affine import fake_quantize, search_weight_scale
from quest_deploy.quantize.calibrate import CalibrationSet
from quest_deploy.quantize.grid import quantize, weight_bounds
from quest_deploy.quantize.insert import LayerQParams

QUICK = settings(max_examples=25, deadline=None)


def problem(seed: int, columns: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, scales, and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator)
    inputs = torch.randn(4 * columns, columns, generator=generator) @ mixing
    weight = torch.randn(8, columns, generator=generator)
    return weight, search_weight_scale(weight, bits), inputs.T @ inputs


def error_of(weight: Tensor, rounded: Tensor, hessian: Tensor) -> Tensor:
    difference = (weight - rounded).double()
    return torch.einsum("ok,kl,ol->o", difference, hessian.double(), difference)


def nearest(weight: Tensor, scale: Tensor, bits: int) -> Tensor:
    return fake_quantize(weight, scale[:, None], *weight_bounds(bits))


@QUICK
@given(seed=st.integers(0, 9999), columns=st.integers(1, 40), bits=st.sampled_from([4, 8]))
def test_compensation_is_never_worse_than_nearest_in_the_hessian_norm(
    seed: int, columns: int, bits: int
) -> None:
    weight, scale, hessian = problem(seed, columns, bits)
    rounded = gptq.round_with_compensation(weight, scale, hessian, bits)
    plain = error_of(weight, nearest(weight, scale, bits), hessian)
    # The choice between the two is made in float32.
    assert (error_of(weight, rounded, hessian) <= plain * (1 + 1e-3) + 1e-6).all()


@pytest.mark.parametrize("columns", [40, 300], ids=["one block", "several blocks"])
def test_compensation_takes_a_third_off_the_error_of_correlated_inputs(columns: int) -> None:
    weight, scale, hessian = problem(0, columns, 4)
    rounded = gptq.round_with_compensation(weight, scale, hessian, 4)
    plain = error_of(weight, nearest(weight, scale, 4), hessian)
    assert error_of(weight, rounded, hessian).sum() < plain.sum() * 2 / 3


def test_uncorrelated_inputs_are_rounded_to_nearest() -> None:
    weight, scale, _ = problem(0, 20, 4)
    rounded = gptq.round_with_compensation(weight, scale, torch.diag(torch.rand(20) + 0.1), 4)
    assert torch.equal(rounded, nearest(weight, scale, 4))


def test_the_result_lies_on_the_grid() -> None:
    weight, scale, hessian = problem(1, 30, 4)
    rounded = gptq.round_with_compensation(weight, scale, hessian, 4)
    assert torch.equal(nearest(rounded, scale, 4), rounded)


def test_columns_that_were_never_seen_do_no_harm() -> None:
    weight, scale, hessian = problem(2, 10, 4)
    hessian[3], hessian[:, 3] = 0, 0
    rounded = gptq.round_with_compensation(weight, scale, hessian, 4)
    assert torch.equal(rounded[:, 3], nearest(weight, scale, 4)[:, 3])


def test_the_hessian_is_left_as_it_was() -> None:
    weight, scale, hessian = problem(3, 10, 4)
    before = hessian.clone()
    gptq.round_with_compensation(weight, scale, hessian, 4)
    assert torch.equal(hessian, before)


@QUICK
@given(seed=st.integers(0, 9999), size=st.integers(1, 20))
def test_the_inverse_factor_is_upper_triangular_and_squares_to_the_inverse(seed: int, size: int) -> None:
    root = torch.randn(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    matrix = root @ root.T + torch.eye(size, dtype=torch.float64)
    factor = gptq.inverse_factor(matrix)
    assert torch.equal(factor, factor.triu())
    torch.testing.assert_close(factor.T @ factor @ matrix, torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(4, 5, bias=False),
        nn.Conv2d(4, 5, 3, stride=2, padding=1, bias=False),
        nn.Conv2d(4, 5, (1, 3), bias=False),
    ],
    ids=["linear", "strided", "oblong"],
)
def test_a_patch_times_the_weight_is_an_output_of_the_layer(layer: nn.Linear | nn.Conv2d) -> None:
    x = torch.randn(2, 6, 7, 4) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 6, 7)
    count = gptq.count_patches(layer, x)
    rows = gptq.patches(layer, x, torch.randperm(count)[:12])
    outputs = layer(x) if isinstance(layer, nn.Linear) else layer(x).movedim(1, -1)
    assert count == outputs.flatten(0, -2).shape[0]
    distance = (rows @ layer.weight.flatten(1).T)[:, None] - outputs.flatten(0, -2)
    assert distance.abs().amax(dim=2).amin(dim=1).max() < 1e-5


def test_layers_that_it_cannot_round_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "MAX_COLUMNS", 64)
    model = nn.ModuleDict(
        {
            "linear": nn.Linear(64, 2),
            "wide": nn.Linear(65, 2),
            "grouped": nn.Conv2d(4, 4, 1, groups=2),
            "dilated": nn.Conv2d(4, 4, 3, dilation=2),
            "same": nn.Conv2d(4, 4, 3, padding="same"),
            "conv": nn.Conv2d(4, 4, 3, padding=1),
        }
    )
    assert list(gptq.chunks(model, list(model))) == [["linear", "conv"]]


def test_layers_are_taken_as_many_at_a_time_as_memory_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({name: nn.Linear(10, 2) for name in "abcde"})
    monkeypatch.setattr(gptq, "MAX_HESSIAN_BYTES", 2 * 4 * 10**2)
    assert list(gptq.chunks(model, list(model))) == [["a", "b"], ["c", "d"], ["e"]]


def test_rounded_weights_of_a_unet_keep_their_codes_when_quantized_again(
    float_model, recorded: CalibrationSet, qparams
) -> None:
    names = ["conv_in", "time_embedding.linear_1", "down_blocks.0.resnets.0.conv1"]
    scales: dict[str, LayerQParams] = qparams(4, 4)
    rounded = gptq.compensate(
        float_model.denoiser, recorded, scales, names, prompts_per_step=2, rows_per_step=64, seed=0
    )
    for name in names:
        q = scales[name]
        scale = q.weight_scale.reshape(-1, *[1] * (rounded[name].ndim - 1))
        codes = quantize(rounded[name], scale, *weight_bounds(q.weight_bits))
        torch.testing.assert_close(codes * scale, rounded[name], rtol=1e-6, atol=0)

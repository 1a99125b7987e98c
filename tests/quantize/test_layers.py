"""Quantized layers: scales by timestep, gradients in closed form, and one function before and after freezing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from quest_deploy.quantize.affine import fake_quantize, minmax_weight_scale
from quest_deploy.quantize.layers import (
    ActivationQuantizer,
    QuantizedLayer,
    TimestepContext,
    quantized_layer,
)

GROUP_SCALE = torch.tensor([0.3, 0.1, 0.25])
BOUNDARIES = torch.tensor([100.0, 200.0])


def linear(
    weight_bits: int = 4,
    *,
    group_scale: Tensor = GROUP_SCALE,
    row: Tensor | None = None,
    bias: bool = True,
) -> QuantizedLayer:
    layer = nn.Linear(6, 5, bias=bias)
    quantizer = ActivationQuantizer(group_scale, -8, 7, row=row)
    return quantized_layer(
        layer, minmax_weight_scale(layer.weight, weight_bits), weight_bits, quantizer, context()
    )


def conv(weight_bits: int = 4, *, row: Tensor | None = None, **geometry: object) -> QuantizedLayer:
    layer = nn.Conv2d(6, 4, 3, **geometry)
    quantizer = ActivationQuantizer(GROUP_SCALE, -3, 12, row=row, channel_axis=1)
    return quantized_layer(
        layer, minmax_weight_scale(layer.weight, weight_bits), weight_bits, quantizer, context()
    )


def context() -> TimestepContext:
    """Three samples, one in each of the groups 2, 0 and 1."""
    made = TimestepContext(BOUNDARIES)
    made.set_timestep(torch.tensor([500.0, 3.0, 150.0]))
    return made


@pytest.mark.parametrize(
    ("timestep", "group"),
    [(-5.0, 0), (0.0, 0), (99.9, 0), (100.0, 1), (150.25, 1), (199.99, 1), (200.0, 2), (999.0, 2), (1e9, 2)],
)
def test_a_timestep_belongs_to_the_stretch_it_lies_in(timestep: float, group: int) -> None:
    made = TimestepContext(BOUNDARIES)
    made.set_timestep(torch.tensor(timestep))
    assert made.group.tolist() == [group]


def test_whole_timesteps_are_compared_as_numbers() -> None:
    made = TimestepContext(torch.tensor([0.5]))
    made.set_timestep(torch.tensor([0, 1]))
    assert made.group.tolist() == [0, 1]


def test_each_sample_of_a_batch_has_its_own_group() -> None:
    assert context().group.tolist() == [2, 0, 1]


def test_without_boundaries_there_is_one_group() -> None:
    made = TimestepContext(torch.empty(0))
    made.set_timestep(torch.tensor([1.0, 999.0]))
    assert (made.num_groups, made.group.tolist()) == (1, [0, 0])


@settings(max_examples=50, deadline=None)
@given(
    group_scale=st.lists(st.floats(2.0**-10, 10, width=32), min_size=2, max_size=5),
    group=st.integers(0, 4),
    seed=st.integers(0, 999),
)
def test_the_tables_quantize_each_group_with_its_own_scale(
    group_scale: list[float], group: int, seed: int
) -> None:
    scales = torch.tensor(group_scale)
    group = group % len(group_scale)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-20, 21, (1, 40), generator=generator)
    # Away from ties, which a rounding error of the multiplication may send either way.
    offset = torch.rand(1, 40, generator=generator) * 0.9 - 0.45
    quantizer = ActivationQuantizer(scales, -8, 7)
    x, wanted = (codes + offset) * scales[group], codes.clamp(-8, 7) * scales[group]
    with torch.no_grad():
        got, unscale = quantizer(x, torch.tensor([group]))
    torch.testing.assert_close(got * unscale, wanted, rtol=1e-5, atol=0)
    while_learning, nothing = quantizer(x, torch.tensor([group]))
    assert nothing is None
    torch.testing.assert_close(while_learning, wanted, rtol=1e-5, atol=0)


def test_the_multipliers_never_exceed_one() -> None:
    scale, ratio, inverse = ActivationQuantizer(GROUP_SCALE, -8, 7).tables()
    assert ratio.max() == 1
    torch.testing.assert_close(scale / ratio, GROUP_SCALE, rtol=1e-6, atol=0)
    torch.testing.assert_close(scale * inverse, GROUP_SCALE, rtol=1e-6, atol=0)


def test_equal_scales_make_the_same_function_as_one_scale() -> None:
    x, group = torch.randn(3, 6), torch.tensor([2, 0, 1])
    quantizers = (
        ActivationQuantizer(torch.full((3,), 0.2), -8, 7),
        ActivationQuantizer(torch.tensor([0.2]), -8, 7),
    )
    with torch.no_grad():
        several, unscale = quantizers[0](x, group)
        one, nothing = quantizers[1](x, group)
    assert nothing is None
    assert torch.equal(several * unscale, one)
    assert torch.equal(quantizers[0](x, group)[0], quantizers[1](x, group)[0])


def test_a_layer_is_the_operation_on_what_each_sample_quantizes_to() -> None:
    layer = linear()
    x = torch.randn(3, 7, 6)
    scale = GROUP_SCALE[layer.context.group].reshape(3, 1, 1)
    expected = F.linear(fake_quantize(x, scale, -8, 7), layer.quantized_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "geometry",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2}, {"groups": 2}, {"padding": "same"}],
    ids=str,
)
def test_a_convolution_keeps_its_geometry(geometry: dict[str, object]) -> None:
    layer = conv(**geometry)
    x = torch.randn(3, 6, 9, 8)
    scale = GROUP_SCALE[layer.context.group].reshape(3, 1, 1, 1)
    quantized = fake_quantize(x, scale, -3, 12)
    expected = F.conv2d(quantized, layer.quantized_weight(), layer.bias, **geometry)
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_row_moves_from_the_activations_to_the_weights() -> None:
    row = torch.tensor([4.0, 0.5, 1.0, 2.0, 0.25, 1.0])
    layer = linear(8, row=row)
    x = torch.randn(3, 6)
    scale = GROUP_SCALE[layer.context.group].reshape(3, 1)
    bound = minmax_weight_scale(layer.weight, 8)[:, None]
    expected = F.linear(
        fake_quantize(x / row, scale, -8, 7), fake_quantize(layer.weight * row, bound, -127, 127), layer.bias
    )
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_a_layer_without_an_activation_quantizer_quantizes_its_weight_alone() -> None:
    source = nn.Linear(6, 5)
    layer = quantized_layer(source, minmax_weight_scale(source.weight, 4), 4, None, context())
    x = torch.randn(3, 6)
    assert torch.equal(layer(x), F.linear(x, layer.quantized_weight()) + source.bias)


def test_forward_changes_nothing() -> None:
    layer = linear()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(100 * torch.randn(3, 6))
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_the_gradient_of_a_group_scale_is_that_of_a_learned_step() -> None:
    quantizer = ActivationQuantizer(GROUP_SCALE, -8, 7)
    x, group = 2 * torch.randn(3, 50), torch.tensor([2, 0, 2])
    upstream = torch.randn(3, 50)
    got, _ = quantizer(x, group)
    (got * upstream).sum().backward()
    s = GROUP_SCALE[group][:, None]
    codes = torch.clamp((x / s).round(), -8, 7)
    inside = (x / s >= -8) & (x / s <= 7)
    # d(s q)/d(log s) = s (q - x / s) inside the range, and s times the clip bound outside.
    per_sample = (upstream * s * (codes - torch.where(inside, x / s, 0))).sum(dim=1)
    expected = torch.zeros(3).index_add(0, group, per_sample)
    torch.testing.assert_close(quantizer.log_scale.grad, expected, rtol=1e-4, atol=1e-4)


def test_a_group_that_no_sample_belongs_to_learns_nothing() -> None:
    quantizer = ActivationQuantizer(GROUP_SCALE, -8, 7)
    got, _ = quantizer(torch.randn(2, 50), torch.tensor([2, 0]))
    got.square().sum().backward()
    assert [value != 0 for value in quantizer.log_scale.grad.tolist()] == [True, False, True]


def test_the_gradient_of_a_weight_and_its_scale_is_that_of_a_learned_step() -> None:
    layer = linear(bias=False)
    with torch.no_grad():
        layer.weight_log_scale.sub_(0.7)  # so that some weights are clipped
    upstream = torch.randn(5, 6)
    (layer.quantized_weight() * upstream).sum().backward()
    s = layer.weight_scale().detach()[:, None]
    ratio = layer.weight.detach() / s
    inside = (ratio >= -8) & (ratio <= 7)
    assert 0 < int(inside.sum()) < inside.numel()
    slope = ratio.round().clamp(-8, 7) - torch.where(inside, ratio, 0)
    assert torch.equal(layer.weight.grad, upstream * inside)
    expected = (upstream * slope * s).sum(dim=1)
    torch.testing.assert_close(layer.weight_log_scale.grad, expected, rtol=1e-5, atol=1e-6)


def test_a_constant_weight_follows_its_scale() -> None:
    layer = linear().requires_grad_(False)
    layer(torch.randn(3, 6))
    with torch.no_grad():
        layer.weight_log_scale.sub_(0.3)
    scale = layer.weight_scale()[:, None]
    assert torch.equal(layer.quantized_weight(), fake_quantize(layer.weight, scale, -8, 7))


ROW = torch.tensor([4.0, 0.5, 1.0, 2.0, 0.25, 1.0])


@pytest.mark.parametrize("trained", [True, False], ids=["learning", "constant"])
@pytest.mark.parametrize("row", [None, ROW], ids=["no row", "row"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("make", [linear, conv])
def test_freezing_keeps_every_bit_of_the_output(make, bits: int, row: Tensor | None, trained: bool) -> None:
    layer = make(bits, row=row)
    layer.requires_grad_(trained)
    with torch.no_grad():
        layer.weight_log_scale.sub_(0.2)
    x = 3 * torch.randn((3, 7, 6) if make is linear else (3, 6, 5, 5))
    while_learning = layer(x).detach()
    with torch.no_grad():
        before = layer(x)
    layer.freeze()
    assert torch.equal(layer(x), before)
    # The same codes; the groups' factor is applied before the sum instead of after it.
    torch.testing.assert_close(while_learning, before, rtol=1e-5, atol=1e-5)


def test_a_frozen_layer_holds_codes_in_place_of_weights() -> None:
    layer = linear()
    layer.freeze()
    assert layer.codes.dtype == torch.int8
    assert {name for name, _ in layer.named_parameters()} == {"bias"}


def test_stored_codes_and_scales_take_the_place_of_a_layers_own() -> None:
    trained, fresh = linear(), linear()
    trained.freeze()
    fresh.freeze(trained.codes, trained.weight_scale(), trained.quantizer.group_scale())
    fresh.bias.data = trained.bias.data
    x = torch.randn(3, 6)
    assert torch.equal(fresh(x), trained(x))


def test_the_group_scales_survive_freezing() -> None:
    layer = linear()
    before = layer.quantizer.group_scale()
    layer.freeze()
    assert torch.equal(layer.quantizer.group_scale(), before)
    assert layer.quantizer.num_groups == 3


@pytest.mark.parametrize("make", [linear, conv], ids=["linear", "conv"])
def test_a_fresh_low_rank_update_changes_no_bit(make: Callable[[], QuantizedLayer]) -> None:
    layer = make()
    before = layer.weight_codes(), layer.quantized_weight().detach()
    layer.add_low_rank(2, torch.Generator().manual_seed(0))
    assert torch.equal(layer.weight_codes(), before[0])
    assert torch.equal(layer.quantized_weight().detach(), before[1])


def test_the_weight_learns_as_w_plus_b_a_and_is_quantized_after_that() -> None:
    row = torch.rand(6) + 0.5
    layer = linear(row=row)
    layer.add_low_rank(2, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.low_rank_b.copy_(torch.randn(5, 2))
    wanted = (layer.weight + layer.low_rank_b @ layer.low_rank_a) * row
    torch.testing.assert_close(layer.scaled_weight(), wanted)
    expected = fake_quantize(wanted, layer.weight_scale()[:, None], -8, 7)
    torch.testing.assert_close(layer.quantized_weight(), expected)


@pytest.mark.parametrize("make", [linear, conv], ids=["linear", "conv"])
def test_merging_leaves_the_codes_and_no_trace(make: Callable[[], QuantizedLayer]) -> None:
    layer = make()
    names = [name for name, _ in layer.named_parameters()]
    layer.add_low_rank(3, torch.Generator().manual_seed(0))
    with torch.no_grad():
        layer.low_rank_b.copy_(torch.randn_like(layer.low_rank_b))
    codes, before = layer.weight_codes(), layer.weight.clone()
    layer.merge_low_rank()
    assert not torch.equal(layer.weight, before)
    assert torch.equal(layer.weight_codes(), codes)
    assert [name for name, _ in layer.named_parameters()] == names
    assert torch.linalg.matrix_rank((layer.weight - before).flatten(1), rtol=1e-4) == 3


def test_a_constant_weight_follows_its_low_rank_update() -> None:
    layer = linear().requires_grad_(False)
    layer.add_low_rank(2, torch.Generator().manual_seed(0))
    layer.requires_grad_(False)
    before = layer.quantized_weight()
    layer.low_rank_b.copy_(torch.randn(5, 2))
    assert not torch.equal(layer.quantized_weight(), before)


def test_the_rank_is_at_most_that_of_the_weight() -> None:
    layer = linear()
    layer.add_low_rank(100, torch.Generator().manual_seed(0))
    assert layer.low_rank_a.shape == (5, 6)
    assert layer.low_rank_b.shape == (5, 5)

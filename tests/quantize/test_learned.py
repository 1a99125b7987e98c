from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from quest_deploy.quantize import learned
from quest_deploy.quantize.affine import minmax_weight_scale
from quest_deploy.quantize.grid import quantize
from quest_deploy.quantize.layers import ActivationQuantizer, QuantizedLayer, TimestepContext, quantized_layer

ROW = torch.tensor([4.0, 0.5, 1.0, 2.0, 0.25, 1.0])
GROUPS = torch.tensor([0.3, 0.1, 0.2])


def straight_through(
    x: Tensor, group_scale: Tensor, group: Tensor, row: Tensor | None, qmin: int, qmax: int
) -> Tensor:
    """The same quantizer, differentiated operation by operation."""
    own, scale = group_scale[group].reshape(-1, *[1] * (x.ndim - 1)), group_scale.detach().min()
    factor = scale / own.detach() if row is None else scale / own.detach() * row
    steps = x * factor / scale * (own.detach() / own)
    clipped = steps.clamp(qmin, qmax)
    return (clipped + (clipped.round() - clipped).detach()) * own


@pytest.mark.parametrize("row", [None, 1 / ROW], ids=["no row", "row"])
@pytest.mark.parametrize("group", [[2, 0, 1], [0]], ids=["a group each", "one group"])
def test_codes_and_gradients_are_those_of_every_operation(row: Tensor | None, group: list[int]) -> None:
    values, upstream = 2 * torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    found = []
    for quantizer in (learned.fake_quantize, straight_through):
        x, log_scale = values.clone().requires_grad_(), GROUPS.log().requires_grad_()
        y = quantizer(x, log_scale.exp(), torch.tensor(group), row, -8, 7)
        (y * upstream).sum().backward()
        found.append((y.detach(), x.grad, log_scale.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[0][2], found[1][2], rtol=1e-4, atol=1e-4)


def test_codes_while_learning_are_the_exported_ones() -> None:
    quantizer, x = ActivationQuantizer(GROUPS, -8, 7, row=ROW), 3 * torch.randn(64, 7, 6)
    group = torch.randint(3, (64,))
    steps = GROUPS[group].reshape(-1, 1, 1)
    codes = (quantizer(x, group)[0] / steps).round()
    scale, ratio, _ = quantizer.tables()
    exported = quantize(x * (ratio[group].reshape(-1, 1, 1) * (1.0 / ROW)), scale.detach(), -8, 7)
    assert torch.equal(codes, exported.float())


def layers() -> nn.ModuleList:
    context = TimestepContext(torch.tensor([300.0, 600.0]), torch.tensor([1]))
    made = []
    for _ in range(2):
        source = nn.Linear(6, 6)
        quantizer = ActivationQuantizer(GROUPS, -128, 127)
        made.append(quantized_layer(source, minmax_weight_scale(source.weight, 4), 4, quantizer, context))
    return nn.ModuleList(made)


def passes(network: nn.ModuleList, x: Tensor) -> list[Tensor]:
    first, second = network
    return [second(first(x)).square().sum(), second(first(second(x))).sum()]


def gradients(network: nn.Module) -> dict[str, Tensor]:
    return {name: value.grad for name, value in network.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("together", [True, False], ids=["one backward pass", "two backward passes"])
def test_quantizing_weights_once_gives_the_gradients_of_quantizing_them_every_time(together: bool) -> None:
    network, x = layers(), torch.randn(4, 6)
    sum(passes(network, x)).backward()
    wanted = {name: value.clone() for name, value in gradients(network).items()}
    network.zero_grad(set_to_none=True)
    with learned.quantized_once(network):
        if together:
            sum(passes(network, x)).backward()
        else:
            for index in range(2):
                passes(network, x)[index].backward()
    found = gradients(network)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_weights_are_quantized_once_and_no_longer_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    network, x, calls = layers(), torch.randn(4, 6), []
    real = learned.weight
    monkeypatch.setattr(learned, "weight", lambda *given: calls.append(1) or real(*given))
    with learned.quantized_once(network):
        sum(passes(network, x)).backward()
    assert len(calls) == 2
    passes(network, x)
    assert len(calls) == 2 + 5


def test_a_failure_leaves_no_weight_behind() -> None:
    network = layers()
    with pytest.raises(KeyError), learned.quantized_once(network):
        raise KeyError
    assert all(isinstance(layer, QuantizedLayer) and layer.shared is None for layer in network)
    assert not gradients(network)


def test_weights_that_do_not_learn_are_left_alone() -> None:
    network = layers()
    network[1].requires_grad_(False)
    with learned.quantized_once(network):
        assert network[0].shared is not None
        assert network[1].shared is None

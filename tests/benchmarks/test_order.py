from __future__ import annotations

import torch

from benchmarks import order
from quest_deploy.quantize import learned


def test_quantizers_written_as_published_have_the_same_codes_and_gradients() -> None:
    """So that the loops differ in what they cost and not in what they learn (but for values just outside the range)."""
    values, scale, group = torch.rand(3, 5, 6) - 0.5, torch.tensor([0.3, 0.1]), torch.tensor([1, 0, 1])
    found = []
    for quantize in (learned.fake_quantize, order.plain_input):
        x, steps = values.clone().requires_grad_(), scale.clone().requires_grad_()
        y = quantize(x, steps, group, None, -8, 7)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, steps.grad))
    for ours, published in zip(*found, strict=True):
        torch.testing.assert_close(ours, published, rtol=1e-3, atol=1e-3)


def test_weights_written_as_published_have_the_same_codes() -> None:
    weight, scale = torch.randn(4, 6), torch.tensor([0.1, 0.2, 0.3, 0.4])
    ours, published = (quantize(weight, scale, -8, 7) for quantize in (learned.weight, order.plain_weight))
    torch.testing.assert_close(ours, published, rtol=1e-5, atol=1e-6)


def test_ratios_are_over_the_published_passes_of_each_phase() -> None:
    rows = {
        name: {"phase_1_ms": first, "phase_2_ms": second}
        for name, first, second in (("here", 1.0, 40.0), ("published", 80.0, 160.0))
    }
    both = (7_700 * 80 + 32_000 * 160) / (7_700 * 1 + 32_000 * 40)
    assert order.ratios(rows) == {"published": {"phase_1": 80.0, "phase_2": 4.0, "both": round(both, 2)}}

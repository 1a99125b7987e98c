"""How much of its weights an engine keeps on the GPU. On a simulated runtime."""

from __future__ import annotations

import pytest
import torch

from quest_deploy.engines.trt_plan import LoadedPlan, stream_weights
from quest_deploy.errors import EngineBuildError
from tests.engines.simulated_trt import ACTIVATION_BYTES, SimulatedEngine, simulated_library


def test_component_of_every_step_gets_its_weights_first_and_none_more_than_it_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (10_000_000_000, 12_000_000_000))
    plans = {name: simulated_plan(name, 4_000_000_000) for name in ("text_encoder", "unet", "vae_decoder")}
    stream_weights(plans, first="unet", weights_gb=None)
    kept = {name: plan.engine.weight_streaming_budget_v2 for name, plan in plans.items() if plan.engine}
    # More than 32 bits hold.
    left = 9_000_000_000 - 2 * ACTIVATION_BYTES - 4_000_000_000
    assert kept == {"unet": 4_000_000_000, "text_encoder": 4_000_000_000, "vae_decoder": left - 4_000_000_000}
    assert [plan.streams for plan in plans.values()] == [False, False, True]


def test_budget_that_tensorrt_does_not_take_is_an_error() -> None:
    plan = simulated_plan("unet", 4096)
    assert isinstance(plan.engine, SimulatedEngine)
    plan.engine.takes_budgets = False
    with pytest.raises(EngineBuildError, match="unet: TensorRT refused to keep 100 bytes.*--gpu-weights"):
        plan.stream_weights(100)


def simulated_plan(name: str, weights: int) -> LoadedPlan:
    """A plan with so many bytes of weights."""
    engine = SimulatedEngine()
    engine.streamable_weights_size = weights
    return LoadedPlan(name, simulated_library(lambda log, plan: None), engine)

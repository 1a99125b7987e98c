"""What is known of a phase before there is a student to train."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from torch import nn

from quest_deploy.config import PhaseConfig
from quest_deploy.model.load import LoadedModel
from quest_deploy.quantize.fit import _learns
from quest_deploy.quantize.insert import quantized_layers
from quest_deploy.quantize.layers import TimestepContext
from quest_deploy.quantize.trace import Trace
from quest_deploy.quantize.train import trainable

RATES = ("learning_rate_weights", "learning_rate_scales", "learning_rate_floats")


@pytest.mark.parametrize("temporal", [True, False], ids=["temporal", "sensitive"])
def test_a_phase_learns_before_there_is_a_student_what_it_learns_with_one(
    temporal: bool,
    quantize_tiny: Callable[[int, int], tuple[nn.Module, TimestepContext]],
    float_model: LoadedModel,
    traced: Trace,
) -> None:
    student, _ = quantize_tiny(4, 8)
    quantized, found = list(quantized_layers(student)), []
    for layers, *rates in itertools.product(("none", "temporal", "all"), *[(0.0, 0.1)] * len(RATES)):
        phase = PhaseConfig(layers=layers, steps=1, **dict(zip(RATES, rates, strict=True)))
        expected = bool(trainable(student, phase, traced.roles, temporal=temporal))
        found.append(_learns(float_model.denoiser, traced.roles, quantized, phase, temporal=temporal))
        assert found[-1] == expected, phase
    assert {True, False} == set(found)

"""The grid is one function: torch equals its lowering, bit for bit, in onnx.reference and in ONNX Runtime."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from quest_deploy.export.codes import mark_codes
from quest_deploy.export.graph import quiet_torch
from quest_deploy.export.qdq import translation_table
from quest_deploy.quantize import grid

SYMMETRIC_8, SYMMETRIC_4, UNSIGNED_4 = (-128, 127), (-8, 7), (0, 15)
BOUNDS = [SYMMETRIC_8, (-127, 127), (0, 127), SYMMETRIC_4, (-7, 7), UNSIGNED_4, (-3, 12), (-14, 1), (-15, 0)]
INT32_LIMIT = 2.0**31
SMALLEST_NORMAL = float(np.finfo(np.float32).tiny)
SCALES = st.one_of(
    st.floats(2.0**-20, 1024.0, width=32),
    st.sampled_from([SMALLEST_NORMAL, 4 * SMALLEST_NORMAL, 1e-30, 1e-12, 1.0, 0.1, 1e30]),
).map(lambda scale: float(np.float32(scale)))
MODEST = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


class Activations(nn.Module):
    def __init__(self, bounds: tuple[int, int]) -> None:
        super().__init__()
        self.bounds = bounds

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return torch.ops.quest_deploy.quantize_dequantize(x, scale, *self.bounds)


class Weights(nn.Module):
    def __init__(self, axis: int, bits: int) -> None:
        super().__init__()
        self.axis, self.bits = axis, bits

    def forward(self, codes: Tensor, scale: Tensor) -> Tensor:
        return torch.ops.quest_deploy.dequantize_weight(codes, scale, self.axis, self.bits)


def lowered(module: nn.Module, example: tuple[Tensor, Tensor], dynamic: tuple[dict, dict]) -> onnx.ModelProto:
    with quiet_torch():
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=21,
            dynamic_shapes=dynamic,
            input_names=["x", "scale"],
            output_names=["y"],
            custom_translation_table=translation_table(),
            verbose=False,
        )
    return mark_codes(ir.to_proto(program.model))


@functools.cache
def activation_runners(
    bounds: tuple[int, int],
) -> tuple[ReferenceEvaluator, list[onnxruntime.InferenceSession]]:
    example = (torch.zeros(8), torch.tensor(1.0))
    return runners(lowered(Activations(bounds), example, ({0: torch.export.Dim("n")}, {})))


@functools.cache
def weight_runners(axis: int, bits: int) -> tuple[ReferenceEvaluator, list[onnxruntime.InferenceSession]]:
    example = (torch.zeros(3, 3, dtype=torch.int8), torch.ones(3))
    return runners(lowered(Weights(axis, bits), example, ({}, {})))


def runners(model: onnx.ModelProto) -> tuple[ReferenceEvaluator, list[onnxruntime.InferenceSession]]:
    sessions = []
    for level in ("ORT_ENABLE_ALL", "ORT_DISABLE_ALL"):
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
        sessions.append(
            onnxruntime.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        )
    return ReferenceEvaluator(model), sessions


def assert_same_bits(got: np.ndarray, expected: np.ndarray) -> None:
    assert got.dtype == expected.dtype
    # -0.0 and 0.0 are the same value on every rung: the code 0.
    np.testing.assert_array_equal(got, expected)


def check_activations(values: np.ndarray, scale: float, bounds: tuple[int, int]) -> None:
    x, s = torch.from_numpy(values), torch.tensor(scale, dtype=torch.float32)
    expected = grid.quantize_dequantize(x, s, *bounds).numpy()
    codes = grid.quantize(x, s, *bounds).numpy()
    reference, sessions = activation_runners(bounds)
    feed = {"x": values, "scale": s.numpy()}
    runs = [session.run for session in sessions]
    with np.errstate(over="ignore"):
        largest = np.abs(values / np.float32(scale)).max()
    # Without a Clip before it, onnx.reference wraps around beyond int32, where the standard says that QuantizeLinear
    # saturates.
    if bounds != SYMMETRIC_8 or largest < INT32_LIMIT:
        runs.append(reference.run)
    for run in runs:
        with np.errstate(over="ignore"):
            got_values, got_codes = run(None, feed)
        assert_same_bits(got_codes, codes)
        assert_same_bits(got_values, expected)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@given(data=st.data(), scale=SCALES)
@MODEST
def test_activations_agree_on_any_value(bounds: tuple[int, int], data: st.DataObject, scale: float) -> None:
    ratios = data.draw(st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=70))
    check_activations(np.array(ratios, dtype=np.float32) * np.float32(scale), scale, bounds)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@given(scale=SCALES)
@MODEST
def test_activations_agree_on_ties_and_their_neighbours(bounds: tuple[int, int], scale: float) -> None:
    ties = (np.arange(-130, 130, dtype=np.float32) + np.float32(0.5)) * np.float32(scale)
    values = np.concatenate(
        [ties, np.nextafter(ties, np.float32(np.inf)), np.nextafter(ties, np.float32(-np.inf))]
    )
    check_activations(values, scale, bounds)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
@given(scale=SCALES)
@MODEST
def test_activations_agree_on_extremes(bounds: tuple[int, int], scale: float) -> None:
    limits = np.finfo(np.float32)
    values = np.array(
        [0.0, -0.0, limits.max, limits.min, limits.tiny, -limits.tiny, 1e-45, -1e-45, 1e30, -1e30],
        dtype=np.float32,
    )
    check_activations(values, scale, bounds)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("axis", [0, 1])
@given(data=st.data())
@MODEST
def test_per_channel_weights_agree(bits: int, axis: int, data: st.DataObject) -> None:
    low, high = grid.weight_bounds(bits)
    codes = np.array(data.draw(st.lists(st.integers(low, high), min_size=9, max_size=9)), dtype=np.int8)
    codes = codes.reshape(3, 3)
    scale = np.array(data.draw(st.lists(SCALES, min_size=3, max_size=3)), dtype=np.float32)
    expected = grid.dequantize_weight(torch.from_numpy(codes), torch.from_numpy(scale), axis, bits).numpy()
    reference, sessions = weight_runners(axis, bits)
    for run in (reference.run, *(session.run for session in sessions)):
        assert_same_bits(run(["y"], {"x": codes, "scale": scale})[0], expected)


@pytest.mark.parametrize("bounds", BOUNDS, ids=str)
def test_codes_stay_inside_their_bounds(bounds: tuple[int, int]) -> None:
    values = torch.linspace(-500, 500, 4001)
    codes = grid.quantize(values, torch.tensor(0.37), *bounds)
    assert (int(codes.min()), int(codes.max())) == bounds

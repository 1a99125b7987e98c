"""Builds a TensorRT for RTX engine from a graph in memory, which needs no GPU."""

from __future__ import annotations

import onnx
import pytest

SIZES = {"batch": 2, "steps": 1, "height": 8, "width": 8, "sequence": 5}


def build(model: onnx.ModelProto) -> int:
    """Bytes of the engine of `model`, its dimensions fixed to :data:`SIZES`.

    Fails the test with what TensorRT says where it cannot build.
    """
    trt = pytest.importorskip("tensorrt_rtx")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(model.SerializeToString())
    assert parsed, [str(parser.get_error(index)) for index in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    for value in model.graph.input:
        shape = [
            SIZES[dimension.dim_param] if dimension.dim_param else dimension.dim_value
            for dimension in value.type.tensor_type.shape.dim
        ]
        profile.set_shape(value.name, shape, shape, shape)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, "TensorRT builds no engine"
    return int(plan.nbytes)

"""Which operators of a float graph lose too much in fp16 or bf16: each is tried alone, on what it is really given."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import helper, numpy_helper

from quest_deploy.export.passes.lower_precision import DTYPES, FLOAT, narrowed, stays_float
from quest_deploy.metrics import snr_db
from quest_deploy.model.components import denoiser_inputs, unscaled
from quest_deploy.model.conditioning.text import tokenize
from quest_deploy.model.families import VAE_DECODER, choose_prompts
from quest_deploy.model.load import LoadedModel
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize import calibrate

# What is left of normally distributed numbers after rounding to the type: 6 dB for each bit of the significand.
ROUNDING_SNR_DB = {"fp16": 72.0, "bf16": 54.0}
# Five bits: an operator that cancels more of what it is given than this is better off in float32.
LOSS_DB = 30.0
IR_VERSION = 10
PROMPTS, STEPS, GUIDANCE_SCALE, SEED = 2, 4, 5.0, 0
Arrays = Mapping[str, np.ndarray]


@torch.no_grad()
def sample_inputs(model: LoadedModel) -> dict[str, list[dict[str, np.ndarray]]]:
    """What the components are given while a few images are drawn, by component: a list of inputs by name.

    Components that do not run then (an encoder of images, a ControlNet) have none.
    """
    default = load_prompts()[:PROMPTS]
    prompts = choose_prompts(model.family, model.classes, (), default=default, count=PROMPTS)
    data = calibrate.record_trajectories(
        model, prompts, steps=STEPS, guidance_scale=GUIDANCE_SCALE, seed=SEED, batch_size=PROMPTS
    )
    every = torch.arange(data.num_prompts)
    inputs: dict[str, list[dict[str, np.ndarray]]] = {model.family.denoiser: []}
    for step in range(data.timesteps.numel()):
        sample, timestep, conditioning = data.inputs(every, torch.full_like(every, step))
        given = denoiser_inputs(model.denoiser_spec, sample, timestep, conditioning)
        inputs[model.family.denoiser].append({name: value.numpy() for name, value in given.items()})
    for part in model.family.text:
        tokens = tokenize(part, model.tokenizers[part.name], prompts)
        inputs[part.name] = [{name: value.numpy() for name, value in tokens.items()}]
    if model.vae is not None:
        vae: Any = model.vae
        inputs[VAE_DECODER] = [{"latent_sample": unscaled(vae.config, data.latents[:, -1]).numpy()}]
    return inputs


def fragile_nodes(model: ir.Model, inputs: Sequence[Arrays], dtype: str) -> dict[str, float]:
    """The nodes that stay in float32, with the signal-to-noise ratio in dB that each would have in `dtype`.

    A node is given its inputs as the float32 graph has them, rounded to `dtype`, and computes in ONNX Runtime, which
    rounds what it answers. What overflows has -inf.

    Args:
        model: A float32 graph with canonical names.
        inputs: What it is given, by name; the worst of them counts.
        dtype: "fp16" or "bf16".
    """
    limit = ROUNDING_SNR_DB[dtype] - LOSS_DB
    exact = stays_float(model.graph)
    nodes = [node for node in model.graph if node not in exact and _computes_floats(node)]
    worst: dict[str, float] = {}
    alone = {node: _alone(node) for node in nodes}
    for values in _intermediate(model, nodes, inputs):
        for node, session in alone.items():
            assert node.name is not None
            found = _snr_alone(node, session, values, dtype)
            worst[node.name] = min(found, worst.get(node.name, math.inf))
    return {name: found for name, found in worst.items() if not found >= limit}


def _computes_floats(node: ir.Node) -> bool:
    kinds = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
    moves = node.op_type in ("Cast", "DequantizeLinear", "QuantizeLinear", "Constant")
    return FLOAT in kinds and node.outputs[0].dtype == FLOAT and not moves


def _intermediate(
    model: ir.Model, nodes: Sequence[ir.Node], inputs: Sequence[Arrays]
) -> Iterator[dict[str, np.ndarray]]:
    """Every value that `nodes` read or write, by name, for each of `inputs`."""
    proto = ir.to_proto(model)
    names = {
        value.name
        for node in nodes
        for value in (*node.inputs, *node.outputs)
        if value is not None and value.name is not None
    }
    made = {name for node in proto.graph.node for name in node.output}
    constants = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer if one.name in names}
    proto.graph.output.extend(
        onnx.ValueInfoProto(name=name)
        for name in sorted((names & made) - {one.name for one in proto.graph.output})
    )
    session = _session(proto)
    wanted = [one.name for one in session.get_outputs()]
    for given in inputs:
        yield {**constants, **given, **dict(zip(wanted, session.run(wanted, dict(given)), strict=True))}


def _session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # Fused operators would not show what is inside them.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _alone(node: ir.Node) -> onnxruntime.InferenceSession:
    """A graph of this node."""
    inputs: dict[str, ir.DataType] = {}
    for value in node.inputs:
        if value is not None and value.name is not None:
            dtype = value.dtype if value.const_value is None else value.const_value.dtype
            assert dtype is not None
            inputs[value.name] = dtype
    graph = helper.make_graph(
        [ir.to_proto(node)],
        "alone",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
        [onnx.ValueInfoProto(name=node.outputs[0].name)],
    )
    assert node.graph is not None
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", node.graph.opset_imports[""])])
    proto.ir_version = IR_VERSION
    return _session(proto)


def _snr_alone(node: ir.Node, session: onnxruntime.InferenceSession, values: Arrays, dtype: str) -> float:
    """dB of the node's first output, its float inputs rounded to `dtype` and its output too."""
    kind = DTYPES[dtype]
    feeds = {}
    for value in node.inputs:
        if value is not None and value.name is not None:
            given = values[value.name]
            if given.dtype == np.float32:
                # Constants are kept in the type's range when they are converted.
                narrow = narrowed if value.is_initializer() else rounded
                given = narrow(given, kind).astype(np.float32)
            feeds[value.name] = given
    output = node.outputs[0].name
    assert output is not None
    (got,) = session.run([output], feeds)
    return _snr_db(values[output], rounded(got, kind))


def _snr_db(expected: np.ndarray, got: np.ndarray) -> float:
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(got)):
        return -math.inf
    return float(snr_db(*(torch.from_numpy(one[finite].reshape(1, -1)) for one in (expected, got))))


def rounded(values: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """float32 values as `dtype` has them; what it cannot hold is infinite."""
    with np.errstate(over="ignore"):
        return values.astype(dtype.numpy()).astype(np.float32)

"""Which operators of a float graph lose too much in fp16 or bf16: each is tried alone, on what it is really given."""

from __future__ import annotations

import ctypes
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx import helper

from quest_deploy.export.passes.lower_precision import DTYPES, FLOAT, narrowed, stays_float
from quest_deploy.model.components import denoiser_inputs, unscaled
from quest_deploy.model.conditioning.text import tokenize
from quest_deploy.model.deferred import streamed
from quest_deploy.model.denoisers import latent_channels, latent_size
from quest_deploy.model.families import VAE_DECODER, choose_prompts
from quest_deploy.model.load import LoadedModel
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize import calibrate

# What is left of normally distributed numbers after rounding to the type: 6 dB for each bit of the significand.
ROUNDING_SNR_DB = {"fp16": 72.0, "bf16": 54.0}
# Five bits: an operator that cancels more of what it is given than this is better off in float32.
LOSS_DB = 30.0
PIECE = 1 << 20
IR_VERSION = 10
PROMPTS, STEPS, GUIDANCE_SCALE, SEED = 2, 4, 5.0, 0
# A denoiser of more parameters, or of larger latents, is tried on fewer and smaller images: its operators are many, and
# attention's probabilities grow with the fourth power of a side.
LARGE, SMALL_LATENTS, FEW_PROMPTS, FEW_STEPS = 500_000_000, 32, 1, 2
Arrays = Mapping[str, np.ndarray]
Report = Callable[[int, int], None]


@torch.no_grad()
def sample_inputs(model: LoadedModel) -> dict[str, list[dict[str, np.ndarray]]]:
    """What the components are given while a few images are drawn, by component: a list of inputs by name.

    Components that do not run then (an encoder of images, a ControlNet) have none. Weights that were left in their
    files are read layer by layer; a denoiser of more than :data:`LARGE` parameters, or of latents larger than
    :data:`SMALL_LATENTS`, draws fewer and smaller images.
    """
    large = sum(tensor.numel() for tensor in model.denoiser.parameters()) > LARGE
    large = large or max(_own_shape(model)[1:]) > SMALL_LATENTS
    count, steps = (FEW_PROMPTS, FEW_STEPS) if large else (PROMPTS, STEPS)
    prompts = choose_prompts(model.family, model.classes, (), default=load_prompts()[:count], count=count)
    vae: Any = model.vae
    components = (model.denoiser, *model.text_encoders.values(), model.controlnet, vae)
    with streamed(*(module for module in components if module is not None)):
        data = calibrate.record_trajectories(
            model,
            prompts,
            steps=steps,
            guidance_scale=GUIDANCE_SCALE,
            seed=SEED,
            batch_size=count,
            latent_shape=_small_shape(model) if large else _own_shape(model),
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
        inputs[VAE_DECODER] = [{"latent_sample": unscaled(vae.config, data.latents[:, -1]).numpy()}]
    return inputs


def _own_shape(model: LoadedModel) -> tuple[int, int, int]:
    """Of the latents that a model was trained for; one that does not say draws any size."""
    config: Any = model.denoiser.config
    return (latent_channels(config), *latent_size(config, SMALL_LATENTS))


def _small_shape(model: LoadedModel) -> tuple[int, int, int]:
    channels, height, width = _own_shape(model)
    _, _, *sizes = model.denoiser_spec.inputs[0].shape
    if not all(isinstance(size, str) for size in sizes):
        return channels, height, width
    return channels, min(height, SMALL_LATENTS), min(width, SMALL_LATENTS)


def fragile_nodes(
    model: ir.Model, inputs: Sequence[Arrays], dtype: str, *, report: Report = lambda done, total: None
) -> dict[str, float]:
    """The nodes that stay in float32, with the signal-to-noise ratio in dB that each would have in `dtype`.

    Node after node computes in ONNX Runtime: once as the float32 graph has it, and once with its inputs rounded to
    `dtype` and its answer too. What overflows has -inf. Values are let go after their last reader, and a weight is in
    memory while its node computes, so that this takes little more memory than the activations.

    Args:
        model: A float32 graph with canonical names.
        inputs: What it is given, by name; the worst of them counts.
        dtype: "fp16" or "bf16".
        report: Called with the nodes done and their number.
    """
    limit = ROUNDING_SNR_DB[dtype] - LOSS_DB
    graph, kind = model.graph, DTYPES[dtype]
    exact = stays_float(graph, kind)
    live = [dict(given) for given in inputs]
    readers = Counter(name for node in graph for name in {*_names(node.inputs)})
    readers.update(_names(graph.outputs))
    worst: dict[str, float] = {}
    for done, node in enumerate(graph):
        report(done, len(graph))
        session, constants = _alone(node)
        outputs = _names(node.outputs)
        tried = node not in exact and _computes_floats(node)
        # Constants are kept in the type's range when they are converted.
        narrow = {name: _narrow(value, kind, narrowed) for name, value in constants.items()} if tried else {}
        for values in live:
            given = {name: values[name] for name in _names(node.inputs) if name in values}
            computed = dict(zip(outputs, session.run(outputs, _fed(session, given | constants)), strict=True))
            if tried:
                assert node.name is not None
                given = {name: _narrow(value, kind, rounded) for name, value in given.items()}
                (got,) = session.run(outputs[:1], _fed(session, given | narrow))
                found = _snr_db(computed[outputs[0]], got, kind)
                worst[node.name] = min(found, worst.get(node.name, math.inf))
            values.update(computed)
        for name in {*_names(node.inputs)}:
            readers[name] -= 1
        for values in live:
            for name in (*_names(node.inputs), *outputs):
                if not readers[name]:
                    values.pop(name, None)
        if max(value.nbytes for value in computed.values()) >= PIECE:
            del given, computed, constants, narrow, session
            return_freed_memory()
    report(len(graph), len(graph))
    return {name: found for name, found in worst.items() if not found >= limit}


def return_freed_memory() -> None:
    """Let the C library give freed memory back, where it is glibc: what large arrays took, it would keep for good."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _computes_floats(node: ir.Node) -> bool:
    kinds = {value.dtype for value in (*node.inputs, *node.outputs) if value is not None}
    moves = node.op_type in ("Cast", "DequantizeLinear", "QuantizeLinear", "Constant")
    return FLOAT in kinds and node.outputs[0].dtype == FLOAT and not moves


def _names(values: Iterable[ir.Value | None]) -> list[str]:
    return [value.name for value in values if value is not None and value.name]


def _fed(session: onnxruntime.InferenceSession, values: Arrays) -> dict[str, np.ndarray]:
    return {one.name: values[one.name] for one in session.get_inputs()}


def _session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    # Fused operators would not show what is inside them.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = False
    return onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def _alone(node: ir.Node) -> tuple[onnxruntime.InferenceSession, dict[str, np.ndarray]]:
    """A graph of this node, and the constants that it is fed; those of 4 bits, which numpy lacks, are inside it."""
    inputs: dict[str, ir.DataType] = {}
    constants: dict[str, np.ndarray] = {}
    inside: list[onnx.TensorProto] = []
    for value in node.inputs:
        if value is None or not value.name:
            continue
        constant = value.const_value if value.is_initializer() else None
        dtype = value.dtype if constant is None else constant.dtype
        assert dtype is not None
        if constant is not None and dtype == ir.DataType.INT4:
            inside.append(ir.to_proto(constant))
            inside[-1].name = value.name
            continue
        inputs[value.name] = dtype
        if constant is not None:
            constants[value.name] = constant.numpy()
    graph = helper.make_graph(
        [ir.to_proto(node)],
        "alone",
        [helper.make_tensor_value_info(name, kind, None) for name, kind in inputs.items()],
        [onnx.ValueInfoProto(name=name) for name in _names(node.outputs)],
        initializer=inside,
    )
    assert node.graph is not None
    domains = {"", node.domain}
    proto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid(name, node.graph.opset_imports[name]) for name in domains]
    )
    proto.ir_version = IR_VERSION
    return _session(proto), constants


def _narrow(
    values: np.ndarray, dtype: ir.DataType, how: Callable[[np.ndarray, ir.DataType], np.ndarray]
) -> np.ndarray:
    """float32 values as `how` makes them of `dtype`, in float32 again; others as they are."""
    return how(values, dtype).astype(np.float32) if values.dtype == np.float32 else values


def _snr_db(expected: np.ndarray, got: np.ndarray, dtype: ir.DataType) -> float:
    """Signal-to-noise ratio of `got` rounded to `dtype`, in dB; -inf where it is infinite elsewhere than `expected`."""
    signal = noise = 0.0
    wanted, answered = expected.reshape(-1), got.reshape(-1)
    # In pieces: in float64 and all at once this would take more memory than everything else.
    for start in range(0, wanted.size, PIECE):
        piece = slice(start, start + PIECE)
        here, there = wanted[piece], rounded(answered[piece], dtype)
        finite = np.isfinite(here)
        if not np.array_equal(finite, np.isfinite(there)):
            return -math.inf
        exact = here[finite].astype(np.float64)
        error = exact - there[finite]
        signal, noise = signal + float(exact @ exact), noise + float(error @ error)
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def rounded(values: np.ndarray, dtype: ir.DataType) -> np.ndarray:
    """float32 values as `dtype` has them; what it cannot hold is infinite."""
    with np.errstate(over="ignore"):
        return values.astype(dtype.numpy()).astype(np.float32)

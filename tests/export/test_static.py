"""Quantized text encoders and decoders leave torch as the codes that ONNX Runtime chooses, and as engines."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import Tensor, nn

from quest_deploy.config import FinetuneConfig
from quest_deploy.export.check import quantized_products
from quest_deploy.export.codes import code_names, force_codes, forced_name
from quest_deploy.export.graph import component_graph
from quest_deploy.export.to_onnx import quantized_layer_names
from quest_deploy.model.load import LoadedModel, load_model, wrap_components
from quest_deploy.quantize.recipe import load_recipe
from quest_deploy.quantize.static import quantize_companions
from tests.export.conftest import run_onnx, snr_db
from tests.export.tensorrt import build
from tests.export.test_graph import torch_codes

DEAR = ["text_encoder", pytest.param("vae_decoder", marks=pytest.mark.thorough)]


@pytest.fixture(scope="module")
def models(tiny_model: Path) -> dict[str, LoadedModel]:
    """The tiny model with text encoder and decoder quantized, by mode."""
    found = {}
    for mode in ("w8a8", "int8-weight-only"):
        model = load_model(tiny_model)
        recipe = dataclasses.replace(
            load_recipe("w8a8"), calibration_steps=2, text_encoder=mode, vae_decoder=mode
        )
        prompts = tuple(f"a cat and {number} moons" for number in range(recipe.calibration_prompts))
        companions = quantize_companions(model, FinetuneConfig(recipe=recipe, prompts=prompts))
        found[mode] = dataclasses.replace(
            model, text_encoders={"text_encoder": companions["text_encoder"]}, vae=companions["vae"]
        )
    return found


Exported = Callable[[str, str], tuple[nn.Module, onnx.ModelProto]]


@pytest.fixture(scope="module")
def exported(models: dict[str, LoadedModel]) -> Exported:
    """A component by mode and name, in torch and as a graph: with 8-bit codes both targets have the same."""

    @functools.cache
    def make(mode: str, name: str) -> tuple[nn.Module, onnx.ModelProto]:
        module = wrap_components(models[mode])[name]
        spec = models[mode].specs[name]
        return module, ir.to_proto(
            component_graph(module, spec, granularity=1, opset=21, target="tensorrt-rtx")
        )

    return make


def inputs_of(model: LoadedModel, name: str) -> dict[str, Tensor]:
    if name == "vae_decoder":
        return {"latent_sample": torch.randn(2, 4, 8, 6)}
    (tensor,) = model.specs[name].inputs
    return {tensor.name: torch.randint(0, 100, (2, int(tensor.shape[1])))}


@pytest.mark.parametrize("name", DEAR)
def test_codes_agree_layer_by_layer(models: dict[str, LoadedModel], exported: Exported, name: str) -> None:
    model = models["w8a8"]
    module, proto = exported("w8a8", name)
    assert quantized_products(proto.graph) == len(quantized_layer_names(module)) > 0
    inputs = inputs_of(model, name)
    codes, names = torch_codes(module, inputs), code_names(proto)
    assert names and set(names) <= set(codes)
    forced = {forced_name(code): torch.from_numpy(codes[code]) for code in names}
    got = run_onnx(force_codes(proto), {**inputs, **forced})
    differing = sum(int((got[code] != codes[code]).sum()) for code in names)
    largest = max(int(np.abs(got[code].astype(int) - codes[code]).max()) for code in names)
    # Float operators between the products may round differently: DESIGN §7 allows one code in 10^4, by one.
    assert differing <= 1e-4 * sum(codes[code].size for code in names) and largest <= 1
    with torch.no_grad():
        expected = module(*inputs.values())[0].numpy()
    assert snr_db(expected, got[model.specs[name].outputs[0].name]) >= 50


@pytest.mark.parametrize("name", DEAR)
def test_weights_alone_are_stored_as_integers(
    models: dict[str, LoadedModel], exported: Exported, name: str
) -> None:
    model = models["int8-weight-only"]
    module, proto = exported("int8-weight-only", name)
    inputs = inputs_of(model, name)
    with torch.no_grad():
        expected = module(*inputs.values())[0].numpy()
    assert snr_db(expected, run_onnx(proto, inputs)[model.specs[name].outputs[0].name]) >= 80
    large = [tensor for tensor in proto.graph.initializer if len(tensor.dims) > 1 and "codes" in tensor.name]
    assert large and all(tensor.data_type == onnx.TensorProto.INT8 for tensor in large)
    assert code_names(proto) == [] and quantized_layer_names(module) == []


@pytest.mark.parametrize("mode", ["w8a8", "int8-weight-only"])
@pytest.mark.parametrize("name", DEAR)
def test_a_tensorrt_for_rtx_engine_is_built(exported: Exported, name: str, mode: str) -> None:
    assert build(exported(mode, name)[1]) > 0

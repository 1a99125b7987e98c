"""Engines with more inputs and outputs than the deployed one: built here, run on a GPU only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from quest_deploy.engines import debug_engine
from quest_deploy.engines.debug_engine import build_graph, component_of, run_graph
from quest_deploy.engines.libraries import gpus
from quest_deploy.errors import MissingDependencyError
from quest_deploy.export.codes import code_names, force_codes, forced_name, mark_codes
from tests.engines import conftest as tiny

INPUTS = {
    "sample": torch.zeros(2, tiny.CHANNELS, tiny.LATENTS, tiny.LATENTS),
    "timestep": torch.zeros(1),
    "encoder_hidden_states": torch.zeros(2, tiny.TOKENS, tiny.HIDDEN),
}


def unet() -> onnx.ModelProto:
    return tiny.unet(np.random.default_rng(0))


def forced() -> tuple[onnx.ModelProto, dict[str, Tensor]]:
    codes = {"sample_q": INPUTS["sample"], "text_q": INPUTS["encoder_hidden_states"]}
    assert code_names(unet()) == list(codes)
    given = {forced_name(name): like.to(torch.int8) for name, like in codes.items()}
    return force_codes(unet()), INPUTS | given


class TestBuild:
    @pytest.fixture(autouse=True)
    def _library(self) -> None:
        pytest.importorskip("tensorrt_rtx")

    def test_with_codes_as_outputs(self, tmp_path: Path) -> None:
        plan = build_graph(mark_codes(unet()), tmp_path, INPUTS, tmp_path / "d", backend="tensorrt-rtx")
        assert plan.stat().st_size > 0

    def test_with_codes_as_inputs_too(self, tmp_path: Path) -> None:
        graph, given = forced()
        plan = build_graph(graph, tmp_path, given, tmp_path / "d", backend="tensorrt-rtx")
        assert plan.stat().st_size > 0

    def test_with_weights_in_a_file_beside_the_graph(self, tmp_path: Path) -> None:
        source = tmp_path / "onnx" / "model.onnx"
        source.parent.mkdir()
        onnx.save(unet(), source, save_as_external_data=True, location="model.data", size_threshold=0)
        (graph, given), left = forced(), onnx.load(source, load_external_data=False)
        graph = force_codes(left)
        plan = build_graph(graph, source.parent, given, tmp_path / "d", backend="tensorrt-rtx")
        assert plan.stat().st_size > 0
        assert (source.parent / "model.data").is_file()


def test_the_component_is_what_the_graph_takes_and_gives() -> None:
    graph, given = forced()
    spec = component_of(graph, given)
    assert {tensor.name: (tensor.dtype, tensor.shape) for tensor in spec.inputs} == {
        name: (str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in given.items()
    }
    assert [(tensor.name, tensor.dtype) for tensor in spec.outputs] == [
        ("out_sample", "float32"),
        ("sample_q", "int8"),
        ("text_q", "int8"),
    ]


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_nothing_is_built_where_nothing_can_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object, **__: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr(debug_engine, "build_graph", build)
    with pytest.raises(MissingDependencyError, match="NVIDIA GPU"):
        run_graph(unet(), tmp_path, [INPUTS], backend="tensorrt-rtx")

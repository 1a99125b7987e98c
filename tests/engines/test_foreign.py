"""Graphs of other exporters, fitted to the pipeline's types and shapes."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from quest_deploy.artifacts import read_artifact
from quest_deploy.engines.adapted import AdaptedEngine
from quest_deploy.engines.foreign import fit, from_json, to_json
from quest_deploy.engines.trt_build import copy_companions
from quest_deploy.errors import ArtifactError, EngineInputError
from quest_deploy.model.spec import ComponentSpec, TensorSpec
from quest_deploy.model.tensors import float_tensor

SPEC = ComponentSpec(
    name="unet",
    inputs=(float_tensor("sample", "batch", 4, "height", "width"), float_tensor("timestep", "steps")),
    outputs=(float_tensor("out_sample", "batch", 4, "height", "width"),),
)
LATENTS = ("batch_size", 4, "latent_height", "latent_width")


def graph(sample: TensorSpec | None = None, timestep: TensorSpec | None = None) -> ComponentSpec:
    """A graph as others export it: other symbols, half precision, a scalar timestep."""
    half = TensorSpec(name="sample", dtype="float16", shape=LATENTS)
    whole = TensorSpec(name="timestep", dtype="int64", shape=())
    return ComponentSpec(
        name="unet",
        inputs=(timestep or whole, sample or half),
        outputs=(dataclasses.replace(half, name="out_sample"),),
    )


class Remembering:
    """Stands for a runtime: keeps what it was given."""

    def __init__(self) -> None:
        self.given: dict[str, Tensor] = {}

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        self.given = inputs
        return {"out_sample": inputs["sample"]}

    def close(self) -> None:
        self.given = {}


def test_inputs_are_given_in_the_graphs_types_and_outputs_come_in_float32() -> None:
    runtime = Remembering()
    engine = AdaptedEngine(fit(SPEC, graph()), runtime)
    outputs = engine(sample=torch.rand(2, 4, 8, 8), timestep=torch.tensor([17.6]))
    assert runtime.given["sample"].dtype == torch.float16
    assert (runtime.given["timestep"].ndim, int(runtime.given["timestep"])) == (0, 18)
    assert outputs["out_sample"].dtype == torch.float32


def test_batches_are_those_of_the_engine_for_the_shapes_of_the_graph() -> None:
    class Profiled(Remembering):
        def batch_ranges(self, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[int, int]]:
            assert shapes == {"sample": (2, 4, 8, 8), "timestep": ()}
            return [(4, 4)]

    shapes = {"sample": (2, 4, 8, 8), "timestep": (1,)}
    assert AdaptedEngine(fit(SPEC, graph()), Profiled()).batch_ranges(shapes) == [(4, 4)]
    assert AdaptedEngine(fit(SPEC, graph()), Remembering()).batch_ranges(shapes) == []


def test_the_pipeline_sees_its_own_types_and_symbols() -> None:
    assert fit(SPEC, graph()).spec == SPEC


def test_symbols_of_the_graph_become_those_of_the_pipeline() -> None:
    fitted = fit(SPEC, graph())
    assert {tensor.name: tensor.shape for tensor in fitted.graph.inputs} == {
        "sample": ("batch", 4, "height", "width"),
        "timestep": (),
    }


def test_a_size_that_the_graph_fixes_is_a_number() -> None:
    fixed = TensorSpec(name="sample", dtype="float32", shape=("b", 4, 64, 64))
    fitted = fit(SPEC, graph(sample=fixed))
    assert fitted.spec.inputs[0].shape == ("batch", 4, 64, 64)


def test_several_timesteps_are_refused_where_the_graph_takes_one() -> None:
    engine = AdaptedEngine(fit(SPEC, graph()), Remembering())
    with pytest.raises(EngineInputError, match="got 2 values, the graph takes one for the whole batch"):
        engine(sample=torch.rand(2, 4, 8, 8), timestep=torch.tensor([1.0, 2.0]))
    engine(sample=torch.rand(2, 4, 8, 8), timestep=torch.tensor([2.0, 2.0]))


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (TensorSpec(name="sample", dtype="float16", shape=(2, 4, "h", "w")), r"has shape \[2, 4, 'h', 'w'\]"),
        (TensorSpec(name="sample", dtype="float16", shape=("b", 3, "h", "w")), r"has shape \['b', 3, "),
        (TensorSpec(name="sample", dtype="float16", shape=("b", "h", "w")), r"has shape \['b', 'h', 'w'\]"),
        (TensorSpec(name="sample", dtype="int8", shape=LATENTS), "has int8, expected one of float32"),
        (TensorSpec(name="sample", dtype="bfloat16", shape=LATENTS), "has bfloat16, expected one of float32"),
        (TensorSpec(name="latents", dtype="float16", shape=LATENTS), "the graph has no input 'sample', only"),
    ],
)
def test_what_does_not_fit_is_named(sample: TensorSpec, message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        fit(SPEC, graph(sample=sample))


def test_an_output_that_nothing_reads_may_be_missing_and_others_may_not() -> None:
    texts = ComponentSpec(
        name="text_encoder",
        inputs=(TensorSpec(name="input_ids", dtype="int64", shape=("batch", 24)),),
        outputs=(
            float_tensor("last_hidden_state", "batch", 24, 8),
            float_tensor("pooler_output", "batch", 8),
        ),
    )
    first, second = texts.outputs
    assert fit(texts, dataclasses.replace(texts, outputs=(first,))).spec.outputs == (first,)
    with pytest.raises(ArtifactError, match="no output 'last_hidden_state'"):
        fit(texts, dataclasses.replace(texts, outputs=(second,)))


def test_a_manifest_keeps_it() -> None:
    fitted = {"unet": fit(SPEC, graph())}
    assert from_json(to_json(fitted)) == fitted


def test_weights_in_files_of_any_name_stay_with_the_graph(tiny_onnx: Path, tmp_path: Path) -> None:
    """Engines have their own, and those of --strip-weights shall have none."""
    shutil.copytree(tiny_onnx, tmp_path / "onnx")
    for name in ("manifest.json", "quest.json"):
        (tmp_path / "onnx" / name).unlink()
    for name in ("onnx__MatMul_1234", "unet.conv_in.weight", "model.onnx.data"):
        (tmp_path / "onnx" / "unet" / name).write_bytes(b"\0")
    (tmp_path / "onnx" / "LICENSE").write_text("free")
    copy_companions(read_artifact(tmp_path / "onnx"), tmp_path / "engines")
    assert [path.name for path in (tmp_path / "engines" / "unet").iterdir()] == ["config.json"]
    assert (tmp_path / "engines" / "LICENSE").is_file()

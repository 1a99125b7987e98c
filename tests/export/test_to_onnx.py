from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from quest_deploy.artifacts import Artifact
from quest_deploy.config import ExportConfig, ProgressEvent
from quest_deploy.errors import ArtifactError, ExportError, StaleArtifactError
from quest_deploy.export import to_onnx
from quest_deploy.export.check import read_onnx
from quest_deploy.export.to_onnx import EXTERNAL_DATA_FILE, export, save
from quest_deploy.model.load import load_model, wrap_components
from quest_deploy.model.spec import component_specs
from tests.export.conftest import run_onnx, snr_db, unet_inputs
from tests.export.tensorrt import build

FLOAT = ExportConfig(mode="none")
SIZES = {"batch": 3, "steps": 1, "height": 8, "width": 12, "sequence": 7}


@pytest.fixture(scope="module")
def events() -> list[ProgressEvent]:
    return []


@pytest.fixture(scope="module")
def exported(
    tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory, events: list[ProgressEvent]
) -> Artifact:
    return export(tiny_pipeline, tmp_path_factory.mktemp("out") / "onnx", FLOAT, progress=events.append)


@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_decoder"])
def test_every_component_computes_what_torch_computes(
    exported: Artifact, tiny_pipeline: Path, name: str
) -> None:
    spec = component_specs(exported.path)[name]
    inputs = {}
    for tensor in spec.inputs:
        shape = [SIZES.get(size, size) for size in tensor.shape]
        inputs[tensor.name] = (
            torch.randint(0, 100, shape) if tensor.dtype == "int64" else torch.rand(shape) * 3
        )
    with torch.no_grad():
        expected = wrap_components(load_model(tiny_pipeline))[name](*inputs.values())
    got = run_onnx(read_onnx(exported.path / name / "model.onnx"), inputs)
    for tensor, value in zip(spec.outputs, expected, strict=True):
        assert got[tensor.name].shape == tuple(value.shape)
        assert snr_db(value.numpy(), got[tensor.name]) >= 90


def test_the_directory_is_self_contained(exported: Artifact, tiny_pipeline: Path) -> None:
    for name in (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "LICENSE",
        "README.md",
        "unet/config.json",
    ):
        assert (exported.path / name).read_bytes() == (tiny_pipeline / name).read_bytes()
    assert (exported.path / "tokenizer").is_dir() and (
        exported.path / "vae_decoder" / "config.json"
    ).is_file()


def test_the_manifest_says_what_is_inside(exported: Artifact) -> None:
    component = exported.manifest.details["components"]["unet"]
    assert component["size_bytes"] == (exported.path / "unet" / "model.onnx").stat().st_size
    assert component["operators"]["Conv"] > 0 and component["quantized_layers"] == []
    assert exported.manifest.inputs["source"] and exported.manifest.config["mode"] == "none"


def test_progress_ends_complete(exported: Artifact, events: list[ProgressEvent]) -> None:
    of_all = [event for event in events if event.stage == "export"]
    assert [event.completed for event in of_all] == [0, 1, 2, 3]
    for name in ("text_encoder", "unet", "vae_decoder"):
        assert [event.completed for event in events if event.stage == f"trace {name}"] == [0, 1]
    assert events[-1].completed == events[-1].total


@pytest.mark.thorough
def test_two_processes_write_the_same_bytes(exported: Artifact, tiny_pipeline: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from quest_deploy.config import ExportConfig; "
        "from quest_deploy.export.to_onnx import export; "
        "export(Path(sys.argv[1]), Path(sys.argv[2]), ExportConfig(mode='none'))"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(tiny_pipeline), str(tmp_path / "onnx")],
        check=True,
        env={"PYTHONHASHSEED": "1", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    for name in component_specs(exported.path):
        first, second = (
            hashlib.sha256((root / name / "model.onnx").read_bytes()).hexdigest()
            for root in (exported.path, tmp_path / "onnx")
        )
        assert first == second


def test_export_prints_nothing(
    tiny_pipeline: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    from quest_deploy.export.graph import component_graph

    spec = component_specs(tiny_pipeline)["text_encoder"]
    module = wrap_components(load_model(tiny_pipeline))["text_encoder"]
    capfd.readouterr()
    component_graph(module, spec, granularity=1, opset=21, target="onnxruntime")
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == "" and caplog.records == []


def test_int8_of_an_unquantized_model_says_finetune_first(tiny_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="run `quest-deploy finetune` first"):
        export(tiny_pipeline, tmp_path / "onnx", ExportConfig(mode="int8"))
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_directory_is_no_source(exported: Artifact, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="stage 'onnx', expected a diffusers model or a checkpoint"):
        export(exported.path, tmp_path / "again", FLOAT)


def test_an_existing_output_is_kept(exported: Artifact, tiny_pipeline: Path) -> None:
    before = (exported.path / "manifest.json").read_bytes()
    with pytest.raises(ArtifactError, match="--overwrite"):
        export(tiny_pipeline, exported.path, FLOAT)
    assert (exported.path / "manifest.json").read_bytes() == before


def test_corrupt_weights_leave_nothing_behind(tiny_pipeline: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(tiny_pipeline, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(Exception, match="broken") as error:
        export(broken, tmp_path / "onnx", FLOAT)
    assert type(error.value).__name__ == "ModelLoadError"
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


def test_large_weights_go_next_to_the_graph(tmp_path: Path) -> None:
    weight = np.arange(4096, dtype=np.float32)
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[4096] x) => (float[4096] y) { y = Mul(x, w) }',
        initializers=[ir.tensor(weight, name="w")],
    )
    save(model, tmp_path / "model.onnx", inline_limit_bytes=1000)
    assert (tmp_path / EXTERNAL_DATA_FILE).stat().st_size >= weight.nbytes
    loaded = onnx.load(tmp_path / "model.onnx")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(loaded.graph.initializer[0]), weight)


def test_details_are_json(exported: Artifact) -> None:
    json.dumps(exported.manifest.details)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_stays_near_and_builds(tiny_pipeline: Path, tmp_path: Path, dtype: str) -> None:
    config = ExportConfig(mode="none", dtype=dtype, target="tensorrt-rtx")
    written = export(tiny_pipeline, tmp_path / "onnx", config)
    details = written.manifest.details
    assert details["dtype"] == dtype
    # The mask of the text encoder holds the smallest float32, which fp16 does not have.
    assert details["components"]["text_encoder"]["float32_nodes"]
    model = read_onnx(written.path / "unet" / "model.onnx")
    narrow = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[dtype]
    kinds = Counter(tensor.data_type for tensor in model.graph.initializer)
    assert kinds[narrow] > 3 * kinds[onnx.TensorProto.FLOAT]
    assert build(model) > 0
    if dtype == "fp16":  # ONNX Runtime has no bf16 on the CPU
        inputs = unet_inputs(2, 1, 8, 12, 24)
        with torch.no_grad():
            (expected,) = wrap_components(load_model(tiny_pipeline))["unet"](*inputs.values())
        assert snr_db(expected.numpy(), run_onnx(model, inputs)["out_sample"]) >= 50


@pytest.mark.thorough
def test_a_model_that_changes_while_it_is_exported_is_not_exported(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    copy = to_onnx.copy_configuration

    def change(source: Path, output: Path) -> None:
        copy(source, output)
        (model / "unet" / "config.json").write_text("{}")

    monkeypatch.setattr(to_onnx, "copy_configuration", change)
    with pytest.raises(StaleArtifactError, match="changed while it was read"):
        export(model, tmp_path / "onnx", ExportConfig(mode="none"))
    assert not (tmp_path / "onnx").exists()

"""Weights in a file of their own: every consumer of an exported directory finds them."""

from __future__ import annotations

from pathlib import Path

import pytest

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import ExportConfig, GenerateConfig, ParityConfig
from quest_deploy.errors import ArtifactError
from quest_deploy.export import to_onnx
from quest_deploy.export.lint import lint
from quest_deploy.export.to_onnx import EXTERNAL_DATA_FILE, export
from quest_deploy.parity import compare
from quest_deploy.pipeline import generate

pytestmark = pytest.mark.thorough

COMPONENTS = ("text_encoder", "unet", "vae_decoder")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    path = tmp_path_factory.mktemp("external") / "onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_onnx, "INLINE_LIMIT_BYTES", 1000)
        export(tiny_checkpoint, path, ExportConfig(target="onnxruntime"))
    return path


def test_the_manifest_lists_the_files_and_sizes_count_them(exported: Path) -> None:
    manifest = read_artifact(exported, stage="onnx").manifest
    for name in COMPONENTS:
        files = [exported / name / file for file in ("model.onnx", EXTERNAL_DATA_FILE)]
        assert {str(file.relative_to(exported)) for file in files} <= manifest.files.keys()
        size = sum(file.stat().st_size for file in files)
        assert manifest.details["components"][name]["size_bytes"] == size


def test_codes_are_compared_and_nothing_differs(
    exported: Path, tiny_model: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = ParityConfig(num_prompts=1, steps=2, guidance_scale=3.0)
    result = compare(tiny_model, exported, tmp_path / "parity", config, via=(tiny_checkpoint,))
    gates = {gate.quantity: gate for gate in result.gates if gate.rung == "onnx"}
    for quantity in ("int8 codes that differ", "noise SNR, same codes"):
        assert gates[quantity].passed, gates[quantity]


def test_it_is_linted_and_draws(exported: Path, tmp_path: Path) -> None:
    assert lint(exported, "onnxruntime").summary()["share_of_macs"]["int8"] > 0
    generate(exported, tmp_path / "images", GenerateConfig(prompts=("pizza",), steps=2))
    assert len([*(tmp_path / "images").glob("*.png")]) >= 1


def test_a_truncated_file_of_weights_is_refused(exported: Path, tmp_path: Path) -> None:
    weights = exported / "unet" / EXTERNAL_DATA_FILE
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    try:
        with pytest.raises(ArtifactError, match=EXTERNAL_DATA_FILE):
            generate(exported, tmp_path / "images", GenerateConfig(prompts=("pizza",), steps=2))
    finally:
        weights.write_bytes(whole)

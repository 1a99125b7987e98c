"""What a checkpoint with LoRAs is compared with: the model that these are merged into as well."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quest_deploy.artifacts import read_manifest
from quest_deploy.config import ExportConfig, LoraConfig, ParityConfig
from quest_deploy.errors import ParityError, StaleArtifactError
from quest_deploy.export.to_onnx import export
from quest_deploy.model.merged import merged_details
from quest_deploy.parity import compare
from quest_deploy.parity import run as parity_run
from tests.parity.stubs import Rungs

CONFIG = ParityConfig(prompts=("a red apple",), num_prompts=1, steps=2)


@pytest.fixture
def rungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rungs:
    made = Rungs(tmp_path)
    monkeypatch.setattr(parity_run, "load_pipeline", made.load)
    return made


@pytest.fixture
def lora(tmp_path: Path) -> LoraConfig:
    """Of a rank that only stubs take."""
    save_file({"unet.x.lora_A.weight": torch.ones(1)}, tmp_path / "style.safetensors")
    return LoraConfig(file=str(tmp_path / "style.safetensors"), scale=0.5)


def with_lora(rungs: Rungs, lora: LoraConfig, model: Path, name: str = "checkpoint") -> Path:
    return rungs.add(name, stage="checkpoint", recipe="w8a8", made_from=model, loras=(lora,))


def run(rungs: Rungs, *ladder: Path) -> Any:
    reference, *via, candidate = ladder
    return compare(reference, candidate, rungs.root / "parity", CONFIG, via=via)


def test_loras_of_the_checkpoint_are_merged_into_the_reference(rungs: Rungs, lora: LoraConfig) -> None:
    model = rungs.add("model")
    result = run(rungs, model, with_lora(rungs, lora, model))
    assert rungs.merged == {"model": (lora,), "checkpoint": ()}
    assert result.report["notes"] == [
        "checkpoint was made with LoRAs (style.safetensors times 0.5); they were merged into model too."
    ]


def test_an_export_tells_of_them_without_its_checkpoint(rungs: Rungs, lora: LoraConfig) -> None:
    model = rungs.add("model")
    checkpoint = with_lora(rungs, lora, model)
    told = merged_details(read_manifest(checkpoint))
    onnx = rungs.add("onnx", stage="onnx", recipe="w8a8", made_from=checkpoint, **told)
    run(rungs, model, onnx)
    assert rungs.merged == {"model": (lora,), "onnx": ()}


def test_a_model_that_the_checkpoint_was_not_made_from_gets_none(rungs: Rungs, lora: LoraConfig) -> None:
    """Whoever merged them into a model of their own would have them twice."""
    model, other = rungs.add("model"), rungs.add("other")
    (other / "scheduler.txt").write_text("another digest")
    result = run(rungs, other, with_lora(rungs, lora, model))
    assert rungs.merged == {"other": (), "checkpoint": ()}
    assert any("from another model than model" in note for note in result.report["notes"])


def test_a_relative_path_is_found_from_another_working_directory(
    rungs: Rungs, lora: LoraConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its content: a file of that name that is nearer is another one."""
    model = rungs.add("model")
    monkeypatch.chdir(tmp_path)
    checkpoint = with_lora(rungs, LoraConfig(file=lora.path.name, scale=0.5), model)
    other = tmp_path / "elsewhere"
    other.mkdir()
    save_file({"unet.x.lora_A.weight": torch.zeros(1)}, other / lora.path.name)
    monkeypatch.chdir(other)
    run(rungs, model, checkpoint)
    assert rungs.merged["model"] == (lora,)


@pytest.mark.parametrize("change", ["missing", "another"])
def test_a_lora_that_cannot_be_merged_again_is_an_error(rungs: Rungs, lora: LoraConfig, change: str) -> None:
    model = rungs.add("model")
    checkpoint = with_lora(rungs, lora, model)
    if change == "missing":
        lora.path.unlink()
    else:
        save_file({"unet.x.lora_A.weight": torch.zeros(1)}, lora.path)
    with pytest.raises(StaleArtifactError, match=r"style\.safetensors', which is .*; put the file .* back"):
        run(rungs, model, checkpoint)


def test_checkpoints_with_different_loras_are_not_compared_with_one_model(
    rungs: Rungs, lora: LoraConfig
) -> None:
    model = rungs.add("model")
    bare = rungs.add("bare", stage="checkpoint", recipe="w4a8", made_from=model)
    with pytest.raises(ParityError, match=r"not made with the same LoRAs; compare each"):
        run(rungs, model, bare, with_lora(rungs, lora, model))
    # From a quantized reference down nothing is blamed on quantization, but the reader must know.
    assert (
        "The checkpoints were not made with the same LoRAs."
        in (run(rungs, bare, with_lora(rungs, lora, model, "other")).report["notes"])
    )


def test_an_export_of_the_bare_model_is_no_reference(rungs: Rungs, lora: LoraConfig) -> None:
    model = rungs.add("model")
    onnx = rungs.add("onnx", stage="onnx", made_from=model)
    with pytest.raises(
        ParityError, match=r"'.*onnx' was made without the LoRAs .*give the model in its place"
    ):
        run(rungs, onnx, with_lora(rungs, lora, model))


@pytest.mark.thorough
def test_a_lora_is_no_cost_of_quantization(tmp_path: Path, tiny_model: Path, lora_checkpoint: Path) -> None:
    """Without it in the reference, its change of the noise prediction leaves less than 0 dB."""
    export(lora_checkpoint, tmp_path / "onnx", ExportConfig())
    result = compare(tiny_model, tmp_path / "onnx", tmp_path / "parity", CONFIG)
    assert result.report["rungs"][1]["against_reference"]["noise_snr_db"]["mean"] > 10
    assert "LoRAs (style.safetensors times 0.7); they were merged into model too" in str(
        result.report["notes"]
    )

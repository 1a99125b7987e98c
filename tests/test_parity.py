"""The parity ladder: what passes, what fails, what is named; on a stub pipeline, and once on the reference model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.artifacts import read_artifact, write_artifact
from quest_deploy.config import ParityConfig, ProgressEvent
from quest_deploy.errors import ArtifactError, ConfigError, MissingDependencyError, ParityError
from quest_deploy.parity import compare
from quest_deploy.parity import run as parity_run
from quest_deploy.parity.gates import Gate
from quest_deploy.parity.ladder import make_ladder
from quest_deploy.prompts import load_prompts
from tests.parity.stubs import Damage, Rungs

SLIGHT = Damage(noise=0.01)
CONFIG = ParityConfig(
    prompts=("a red apple", "a <b>cat</b>", "a house"), num_prompts=3, steps=4, batch_size=2
)


@pytest.fixture
def rungs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rungs:
    made = Rungs(tmp_path)
    monkeypatch.setattr(parity_run, "load_pipeline", made.load)
    return made


def gate(result: Any, quantity: str, rung: str | None = None) -> Gate:
    (found,) = [g for g in result.gates if g.quantity == quantity and rung in (None, g.rung)]
    return found


def full_ladder(rungs: Rungs, onnx: Damage, quantized: Damage = SLIGHT) -> Any:
    model = rungs.add("model")
    checkpoint = rungs.add("checkpoint", quantized, stage="checkpoint", recipe="w8a8", made_from=model)
    candidate = rungs.add("onnx", onnx, stage="onnx", recipe="w8a8", made_from=checkpoint)
    return compare(model, candidate, rungs.root / "parity", CONFIG, via=[checkpoint])


# What passes and what fails


@pytest.mark.parametrize(("dtype", "verdict"), [("fp32", "failed"), ("fp16", "passed"), ("bf16", "passed")])
def test_float_operators_are_held_to_what_their_type_allows(rungs: Rungs, dtype: str, verdict: str) -> None:
    # 44 dB: less than float32 owes, more than a thousand roundings to fp16 cost.
    candidate = rungs.add("onnx", Damage(noise=0.006), stage="onnx", dtype=dtype)
    result = compare(rungs.add("model"), candidate, rungs.root / "parity", CONFIG)
    assert result.verdict == verdict
    assert gate(result, "noise SNR, worst step").measured == pytest.approx(44.4, abs=0.1)


def test_fp16_is_held_to_something(rungs: Rungs) -> None:
    candidate = rungs.add("onnx", Damage(noise=0.01), stage="onnx", dtype="fp16")
    assert compare(rungs.add("model"), candidate, rungs.root / "parity", CONFIG).verdict == "failed"


def test_exported_weights_alone_are_compared_with_a_checkpoint_without_activation_quantizers(
    rungs: Rungs,
) -> None:
    model = rungs.add("model")
    checkpoint = rungs.add("checkpoint", SLIGHT, stage="checkpoint", recipe="w4a8", made_from=model)
    onnx = rungs.add(
        "onnx", SLIGHT, stage="onnx", recipe="w4a8", made_from=checkpoint, lowering="int4-weight-only"
    )
    result = compare(model, onnx, rungs.root / "parity", CONFIG, via=[checkpoint])
    assert rungs.weights_only == {"checkpoint"}
    assert result.verdict == "passed"
    # No activation is quantized, so there are no codes to be given.
    assert gate(result, "noise SNR, worst step", "onnx").measured == math.inf
    assert not [one for one in result.gates if "codes" in one.quantity]


def test_a_checkpoint_keeps_its_quantizers_above_what_has_them(rungs: Rungs) -> None:
    full_ladder(rungs, SLIGHT)
    assert rungs.weights_only == set()


def test_an_identical_candidate_passes(rungs: Rungs) -> None:
    result = compare(rungs.add("a"), rungs.add("b"), rungs.root / "parity", CONFIG)
    assert result and result.verdict == "passed"
    assert gate(result, "noise SNR, worst step").measured == math.inf


def test_identical_figures_are_words_in_json(rungs: Rungs) -> None:
    compare(rungs.add("a"), rungs.add("b"), rungs.root / "parity", CONFIG)
    report = json.loads((rungs.root / "parity" / "report.json").read_text())
    against = report["rungs"][1]["against_reference"]
    assert against["image_psnr_db"] == {"mean": "identical", "per_prompt": ["identical"] * 3}
    assert against["noise_snr_db"]["median"] == ["identical"] * 4
    assert against["image_ssim"]["mean"] == pytest.approx(1, abs=1e-12)


def test_report_holds_no_number_that_json_lacks(rungs: Rungs) -> None:
    compare(rungs.add("a"), rungs.add("b", Damage(nan_at_step=1)), rungs.root / "parity", CONFIG)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads((rungs.root / "parity" / "report.json").read_text(), parse_constant=refuse)


def test_a_damaged_denoiser_fails_the_deployment_gate(rungs: Rungs) -> None:
    result = compare(rungs.add("a"), rungs.add("b", Damage(noise=0.01)), rungs.root / "parity", CONFIG)
    failed = gate(result, "noise SNR, worst step")
    assert not result and result.verdict == "failed" and failed.passed is False
    assert failed.measured == pytest.approx(40, abs=0.01)


@pytest.mark.parametrize(
    ("damage", "quantity"),
    [(Damage(text=0.01), "text encoder SNR"), (Damage(decoder=0.02), "VAE decoder SNR")],
)
def test_damage_outside_the_denoiser_fails_its_own_gate(rungs: Rungs, damage: Damage, quantity: str) -> None:
    result = compare(rungs.add("a"), rungs.add("b", damage), rungs.root / "parity", CONFIG)
    assert [g.quantity for g in result.gates if g.passed is False] == [quantity]


def test_damage_below_the_limit_passes(rungs: Rungs) -> None:
    result = compare(rungs.add("a"), rungs.add("b", Damage(noise=1e-3)), rungs.root / "parity", CONFIG)
    assert result and gate(result, "noise SNR, worst step").measured == pytest.approx(60, abs=0.01)


def test_first_divergence_names_the_step(rungs: Rungs) -> None:
    result = compare(rungs.add("a"), rungs.add("b", Damage(noise=0.01)), rungs.root / "parity", CONFIG)
    assert gate(result, "noise SNR, worst step").detail.startswith(
        "first at step 1 of 4 (timestep 1000): 40.0 dB"
    )


@pytest.mark.parametrize("step", [0, 2])
def test_a_nan_is_named_by_tensor_step_and_prompt(rungs: Rungs, step: int) -> None:
    damage = Damage(nan_at_step=step)
    result = compare(rungs.add("a"), rungs.add("b", damage), rungs.root / "parity", CONFIG)
    finite = gate(result, "tensors with NaN or Inf", "model-2")
    assert not result
    assert finite.detail.startswith(
        f"noise prediction at step {step + 1} (timestep {1000 - 100 * step}): 2 NaN and 0"
    )
    assert "'a red apple'" in finite.detail


# Quantization apart from deployment


def test_quantization_and_deployment_are_gated_apart(rungs: Rungs) -> None:
    result = full_ladder(rungs, onnx=Damage(noise=0.01))
    assert result.verdict == "passed"
    assert {(g.rung, g.kind) for g in result.gates} == {
        ("model", "finite"),
        ("checkpoint", "finite"),
        ("onnx", "finite"),
        ("checkpoint", "quantization"),
        ("onnx", "deployment"),
    }
    assert gate(result, "noise SNR", "checkpoint").measured == pytest.approx(40, abs=0.01)
    assert (
        gate(result, "image PSNR", "checkpoint").passed and gate(result, "change of image PSNR").measured == 0
    )
    assert gate(result, "noise SNR, same codes").passed is None


def test_deployment_that_changes_image_quality_fails(rungs: Rungs) -> None:
    result = full_ladder(rungs, onnx=Damage(noise=0.02))
    change = gate(result, "change of image PSNR")
    assert change.passed is False and change.measured == pytest.approx(6, abs=0.5)
    assert "95 % interval" in change.detail
    # Three prompts.
    assert "too few for 95 %" in change.detail and "raise --num-prompts" in change.detail


def test_a_checkpoint_below_its_budget_fails(rungs: Rungs, tmp_path: Path) -> None:
    budget = tmp_path / "budget.yaml"
    budget.write_text("recipes: {w8a8: {noise_snr_db_min: 45}}")
    model = rungs.add("model")
    checkpoint = rungs.add(
        "checkpoint", Damage(noise=0.01), stage="checkpoint", recipe="w8a8", made_from=model
    )
    result = compare(model, checkpoint, rungs.root / "parity", replace(CONFIG, budget=str(budget)))
    assert [g.quantity for g in result.gates if g.passed is False] == ["noise SNR"]


def test_a_recipe_without_budget_is_not_gated(rungs: Rungs) -> None:
    model = rungs.add("model")
    checkpoint = rungs.add("checkpoint", Damage(noise=5), stage="checkpoint", recipe="mine", made_from=model)
    result = compare(model, checkpoint, rungs.root / "parity", CONFIG)
    assert result and not [g for g in result.gates if g.kind == "quantization"]
    (note,) = result.report["notes"]
    assert (
        note == "checkpoint: no limits for recipe 'mine': only NaN and infinity were checked; give --budget."
    )
    assert note.replace("'", "&#39;") in (rungs.root / "parity" / "report.html").read_text()


def test_a_budget_that_limits_nothing_is_said(rungs: Rungs, tmp_path: Path) -> None:
    budget = tmp_path / "budget.yaml"
    budget.write_text("image_psnr_db_min: 900")
    config = replace(CONFIG, budget=str(budget))
    floats = rungs.add("model"), rungs.add("onnx", stage="onnx")
    report = compare(*floats, rungs.root / "floats", config).report
    assert [note for note in report["notes"] if "--budget" in note and "held against nothing" in note]
    checkpoint = rungs.add("checkpoint", stage="checkpoint", recipe="w8a8")
    report = compare(floats[0], checkpoint, rungs.root / "quantized", config).report
    assert not [note for note in report["notes"] if "held against nothing" in note]


def test_every_rung_below_a_quantized_reference_is_said_to_have_no_limits(rungs: Rungs) -> None:
    reference, candidate = (
        rungs.add(name, stage="checkpoint", recipe=recipe) for name, recipe in (("a", "w8a8"), ("b", "w4a8"))
    )
    notes = compare(reference, candidate, rungs.root / "parity", CONFIG).report["notes"]
    assert any("limits are against full precision" in note for note in notes)


def test_a_rung_with_limits_has_no_note_of_none(rungs: Rungs) -> None:
    assert not [note for note in full_ladder(rungs, SLIGHT).report["notes"] if "only NaN" in note]


def test_a_runtime_whose_denoiser_nothing_can_judge_is_not_passed(rungs: Rungs) -> None:
    # Its codes cannot be seen, and against a quantized reference its images have no limit.
    checkpoint = rungs.add("checkpoint", stage="checkpoint", recipe="w8a8")
    onnx = rungs.add("onnx", Damage(noise=5), stage="onnx", recipe="w8a8", made_from=checkpoint)
    result = compare(checkpoint, onnx, rungs.root / "parity", CONFIG)
    assert (result.verdict, bool(result)) == ("incomplete", False)
    (note,) = [note for note in result.report["notes"] if "not judged" in note]
    assert note.startswith("onnx: the denoiser was not judged") and "full-precision model first" in note


def test_one_prompt_judges_no_runtime_without_codes(rungs: Rungs) -> None:
    model = rungs.add("model")
    checkpoint = rungs.add("checkpoint", SLIGHT, stage="checkpoint", recipe="w8a8", made_from=model)
    onnx = rungs.add("onnx", SLIGHT, stage="onnx", recipe="w8a8", made_from=checkpoint)
    alone = replace(CONFIG, prompts=("a house",), num_prompts=1)
    result = compare(model, onnx, rungs.root / "parity", alone, via=[checkpoint])
    assert result.verdict == "incomplete"
    assert [note for note in result.report["notes"] if "raise --num-prompts" in note]


def test_a_name_in_a_budget_that_stands_for_no_recipe_is_refused_before_any_work(rungs: Rungs) -> None:
    budget = rungs.root / "budget.yaml"
    budget.write_text("recipes: {mien: {noise_snr_db_min: 45}}")
    model = rungs.add("model", Damage(missing="must not be loaded"))
    checkpoint = rungs.add("checkpoint", stage="checkpoint", recipe="mine", made_from=model)
    with pytest.raises(ConfigError, match=r"recipes\.mien stands for no recipe here, expected mine"):
        compare(model, checkpoint, rungs.root / "parity", replace(CONFIG, budget=str(budget)))


def test_a_skipped_checkpoint_is_pointed_out(rungs: Rungs) -> None:
    model = rungs.add("model")
    onnx = rungs.add("onnx", stage="onnx", recipe="w8a8", made_from=model)
    result = compare(model, onnx, rungs.root / "parity", CONFIG)
    assert any("--via" in note for note in result.report["notes"])


def test_lineage_comes_from_the_manifest(rungs: Rungs) -> None:
    model, other = rungs.add("model"), rungs.add("checkpoint", stage="checkpoint", recipe="w8a8")
    related = rungs.add("onnx", stage="onnx", recipe="w8a8", made_from=other)
    edges = make_ladder(model, [other], related)[1]
    assert [edge.lineage for edge in edges] == [False, True]


# Rungs that cannot be run


def test_an_engine_without_a_gpu_is_not_run_and_not_passed(rungs: Rungs) -> None:
    model = rungs.add("model")
    engines = rungs.add(
        "engines", Damage(missing="no NVIDIA GPU was found"), stage="engines", made_from=model
    )
    result = compare(model, engines, rungs.root / "parity", CONFIG)
    assert not result and result.verdict == "incomplete"
    assert result.report["rungs"][1]["reason"] == "no NVIDIA GPU was found"
    assert "no NVIDIA GPU was found" in (rungs.root / "parity" / "report.html").read_text()


def test_a_rung_below_one_that_was_not_run_is_still_compared_with_the_reference(rungs: Rungs) -> None:
    model = rungs.add("model")
    engines = rungs.add("engines", Damage(missing="no GPU"), stage="engines", made_from=model)
    onnx = rungs.add("onnx", stage="onnx", made_from=model)
    result = compare(model, onnx, rungs.root / "parity", CONFIG, via=[engines])
    assert result.verdict == "incomplete"
    assert result.report["rungs"][2]["against_reference"]["image_psnr_db"]["mean"] == "identical"


def test_a_missing_library_for_another_stage_is_an_error(rungs: Rungs) -> None:
    onnx = rungs.add("onnx", Damage(missing="onnxruntime is not installed"), stage="onnx")
    with pytest.raises(MissingDependencyError):
        compare(rungs.add("model"), onnx, rungs.root / "parity", CONFIG)
    assert not (rungs.root / "parity").exists()


# What cannot be compared


def test_a_quantized_reference_over_a_full_precision_candidate_is_refused(rungs: Rungs) -> None:
    checkpoint = rungs.add("checkpoint", stage="checkpoint", recipe="w8a8")
    with pytest.raises(ParityError, match="order the rungs"):
        compare(checkpoint, rungs.add("model"), rungs.root / "parity", CONFIG)


def test_another_noise_schedule_is_refused(rungs: Rungs) -> None:
    with pytest.raises(ParityError, match=r"noise schedule.*num_train_timesteps"):
        compare(rungs.add("a"), rungs.add("b", Damage(train_timesteps=500)), rungs.root / "parity", CONFIG)


def test_another_architecture_is_refused(rungs: Rungs) -> None:
    model, other = rungs.add("a"), rungs.add("b")
    config = json.loads((other / "unet" / "config.json").read_text())
    (other / "unet" / "config.json").write_text(json.dumps({**config, "in_channels": 9}))
    with pytest.raises(ParityError, match="different unet inputs"):
        compare(model, other, rungs.root / "parity", CONFIG)


def test_images_are_refused(rungs: Rungs) -> None:
    with write_artifact(rungs.root / "images", stage="images", config={}) as writer:
        (writer.path / "image-00000.png").write_bytes(b"")
    with pytest.raises(ParityError, match="stage 'images'"):
        compare(rungs.add("model"), rungs.root / "images", rungs.root / "parity", CONFIG)


def test_an_existing_output_is_refused_before_any_work(rungs: Rungs) -> None:
    model = rungs.add("model", Damage(missing="must not be loaded"))
    (rungs.root / "parity").mkdir()
    (rungs.root / "parity" / "mine.txt").write_text("keep")
    with pytest.raises(ArtifactError, match="holds no artifact"):
        compare(model, model, rungs.root / "parity", CONFIG)


# What is written


def test_the_artifact_names_its_inputs(rungs: Rungs) -> None:
    model, other = rungs.add("a"), rungs.add("b", Damage(noise=1e-4))
    compare(model, other, rungs.root / "parity", CONFIG)
    artifact = read_artifact(rungs.root / "parity", stage="parity", verify=True)
    assert set(artifact.manifest.files) == {"report.json", "report.html"}
    assert set(artifact.manifest.inputs) == {"model", "model-2"}
    assert artifact.manifest.details == {"verdict": "passed"}


def test_batch_size_does_not_change_the_figures(rungs: Rungs) -> None:
    model, other = rungs.add("a"), rungs.add("b", Damage(noise=0.01))
    reports = [
        compare(model, other, rungs.root / f"parity-{size}", replace(CONFIG, batch_size=size)).report
        for size in (1, 3)
    ]
    assert reports[0]["rungs"][1]["against_reference"] == reports[1]["rungs"][1]["against_reference"]


def test_prompts_default_to_the_held_out_list(rungs: Rungs) -> None:
    model = rungs.add("model")
    report = compare(model, model, rungs.root / "parity", replace(CONFIG, prompts=(), num_prompts=5)).report
    assert tuple(report["prompts"]) == load_prompts(default="heldout")[:5]


def test_progress_counts_to_its_total(rungs: Rungs) -> None:
    events: list[ProgressEvent] = []
    compare(rungs.add("a"), rungs.add("b"), rungs.root / "parity", CONFIG, progress=events.append)
    assert [event.completed for event in events] == list(range(1, len(events) + 1))
    assert events[-1].completed == events[-1].total


def test_a_missing_budget_fails_before_anything_is_loaded(rungs: Rungs) -> None:
    model = rungs.add("model", Damage(missing="must not be loaded"))
    with pytest.raises(ConfigError, match="cannot be read"):
        compare(model, model, rungs.root / "parity", replace(CONFIG, budget=str(rungs.root / "none.yaml")))

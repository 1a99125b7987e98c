"""The stage on the tiny model: everything is measured, a killed run goes on, other inputs are refused."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.analyze import measure, stage
from quest_deploy.analyze.config import AnalyzeConfig
from quest_deploy.analyze.stage import analyze
from quest_deploy.artifacts import read_artifact
from quest_deploy.config import ProgressEvent
from quest_deploy.errors import ArtifactError, ConfigError, StaleArtifactError
from quest_deploy.files import read_json
from quest_deploy.model import merged
from quest_deploy.model.load import load_model
from quest_deploy.quantize.recipe import load_recipe


def test_every_layer_is_analyzed_before_and_after(document: dict[str, Any], tiny_checkpoint: Path) -> None:
    layers = set(read_json(tiny_checkpoint / "quest.json")["layers"])
    assert set(document["run_order"]) == layers
    assert {layer["name"] for layer in document["sensitivity"]["layers"]} == layers
    for when in ("before", "after"):
        assert set(document["activations"][when]) == layers


def test_bits_are_told_once_and_as_damages_are_named(document: dict[str, Any]) -> None:
    assert document["sensitivity"]["bits"] == ["w4", "w8", "a8"]
    assert all(layer["damage"].keys() == {"w4", "w8", "a8"} for layer in document["sensitivity"]["layers"])


def test_series_follow_the_timesteps(document: dict[str, Any]) -> None:
    assert len(document["timesteps"]) == 2
    for layer in document["activations"]["after"].values():
        assert {len(series) for series in layer["by_timestep"].values()} == {2}


def test_checkpoint_says_how_much_it_clips(document: dict[str, Any]) -> None:
    assert all("clipped" in layer["by_timestep"] for layer in document["activations"]["after"].values())
    assert all("clipped" not in layer["by_timestep"] for layer in document["activations"]["before"].values())


def test_first_convolution_sees_the_same_latents_before_and_after(document: dict[str, Any]) -> None:
    before, after = (document["activations"][when]["conv_in"]["by_timestep"] for when in ("before", "after"))
    assert before["max"] == after["max"]


def test_quantized_time_embedding_is_near_the_true_one_but_not_equal(document: dict[str, Any]) -> None:
    temporal = document["temporal"]
    assert temporal["embedding"] == "time_embedding.linear_2"
    for when in ("start", "checkpoint"):
        errors = temporal[when]["layers"]["time_embedding.linear_2"]["relative_error"]
        assert all(0 < error < 0.5 for error in errors)


def test_damages_of_layers_predict_that_of_the_network(document: dict[str, Any]) -> None:
    """Within 3 dB, a factor of two: what mixed precision counts on."""
    network = document["network"]
    assert network["predicted_snr_db"] == pytest.approx(network["start"]["step_snr_db"], abs=3.0)


class Killed(BaseException):
    """Ends a run as a signal would: no `except Exception` sees it."""


def test_killed_run_goes_on_with_the_layers_that_it_had(
    tmp_path: Path,
    tiny_model: Path,
    analyze_config: AnalyzeConfig,
    document: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(measure.Throttle, "due", lambda self: True)

    def kill(event: ProgressEvent) -> None:
        if event.stage == "quantize each layer alone" and event.completed == 10:
            raise Killed

    with pytest.raises(Killed):
        analyze(tiny_model, tmp_path / "out", analyze_config, progress=kill)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="--resume"):
        analyze(tiny_model, tmp_path / "out", analyze_config)

    def go_on(*args: Any, finished: dict[str, Any], **rest: Any) -> Any:
        assert list(finished.values()) == document["sensitivity"]["layers"][:10]
        raise Killed

    monkeypatch.setattr(measure, "measure_sensitivity", go_on)
    with pytest.raises(Killed):
        analyze(tiny_model, tmp_path / "out", analyze_config, resume=True)


def test_finished_run_leaves_no_state_behind(analysis: Path) -> None:
    assert [file.name for file in analysis.parent.iterdir()] == [analysis.name]


def test_finished_analysis_is_reused(
    analysis: Path, tiny_model: Path, tiny_checkpoint: Path, analyze_config: AnalyzeConfig
) -> None:
    before = (analysis / "manifest.json").stat().st_mtime_ns
    again = analyze(tiny_model, analysis, analyze_config, checkpoint=tiny_checkpoint, resume=True)
    assert again.digest == read_artifact(analysis).digest
    assert (analysis / "manifest.json").stat().st_mtime_ns == before


def test_an_analysis_that_was_to_be_replaced_is_no_result_of_the_run_that_was_interrupted(
    analysis: Path, tiny_model: Path, tiny_checkpoint: Path, analyze_config: AnalyzeConfig, tmp_path: Path
) -> None:
    output = shutil.copytree(analysis, tmp_path / "out")

    def kill(event: ProgressEvent) -> None:
        raise Killed

    def run(**options: Any) -> Any:
        return analyze(tiny_model, output, analyze_config, checkpoint=tiny_checkpoint, **options)

    with pytest.raises(Killed):
        run(progress=kill, overwrite=True)
    with pytest.raises(ArtifactError, match="exists already; add --overwrite"):
        run(resume=True)
    assert (tmp_path / ".out.analyze" / "run.json").is_file()
    # As if it was killed between writing the analysis and deleting its state.
    (output / "manifest.json").touch()
    run(resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_checkpoint_in_place_of_the_model_is_refused(
    tmp_path: Path, tiny_checkpoint: Path, analyze_config: AnalyzeConfig
) -> None:
    with pytest.raises(ArtifactError, match="expected the full-precision model .* as --checkpoint"):
        analyze(tiny_checkpoint, tmp_path / "out", analyze_config)


def test_artifact_without_layers_is_refused(
    tmp_path: Path, analysis: Path, analyze_config: AnalyzeConfig
) -> None:
    with pytest.raises(ArtifactError, match="stage 'analysis', which has no layers"):
        analyze(analysis, tmp_path / "out", analyze_config)


def test_checkpoint_of_another_model_is_refused(
    tmp_path: Path, reference_model: Path, tiny_checkpoint: Path, analyze_config: AnalyzeConfig
) -> None:
    with pytest.raises(StaleArtifactError, match="was not made from"):
        analyze(reference_model, tmp_path / "out", analyze_config, checkpoint=tiny_checkpoint)


@pytest.mark.thorough
def test_loras_of_the_checkpoint_are_merged_into_the_model(
    tmp_path: Path, tiny_model: Path, lora_checkpoint: Path, analyze_config: AnalyzeConfig, quick_plots: None
) -> None:
    """Without them in the model, their change of the noise prediction leaves less than 0 dB."""
    config = dataclasses.replace(analyze_config, bits=("w8",))
    path = analyze(tiny_model, tmp_path / "out", config, checkpoint=lora_checkpoint).path
    document = read_json(path / "analysis.json")
    assert document["network"]["checkpoint"]["snr_db"] > 10
    (lora,) = document["model"]["loras"]
    assert Path(lora["file"]).name == "style.safetensors" and lora["scale"] == 0.7
    assert "style.safetensors times 0.7" in (path / "analysis.html").read_text()


def test_a_lora_that_changed_since_is_an_error(
    tmp_path: Path,
    tiny_model: Path,
    lora_checkpoint: Path,
    analyze_config: AnalyzeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(merged, "hash_file", lambda path: "0" * 64)
    with pytest.raises(StaleArtifactError, match=r"style\.safetensors', which is another file by now"):
        analyze(tiny_model, tmp_path / "out", analyze_config, checkpoint=lora_checkpoint)


def test_every_problem_of_a_configuration_is_named(analyze_config: AnalyzeConfig) -> None:
    with pytest.raises(ConfigError) as caught:
        dataclasses.replace(analyze_config, num_prompts=9, steps=1, bits=("w4", "w5"))
    for part in ("num_prompts is 9", "steps is 1", "'w5'"):
        assert part in str(caught.value)


@pytest.mark.thorough
def test_a_checkpoint_with_time_tables_is_analyzed(
    tmp_path: Path, tiny_model: Path, table_checkpoint: Path, analyze_config: AnalyzeConfig
) -> None:
    recipe = dataclasses.replace(analyze_config.recipe, temporal_path="table")
    config = dataclasses.replace(analyze_config, recipe=recipe)
    path = analyze(tiny_model, tmp_path / "out", config, checkpoint=table_checkpoint).path
    document = read_json(path / "analysis.json")
    layers, temporal = set(read_json(table_checkpoint / "quest.json")["layers"]), document["temporal"]
    assert set(document["activations"]["after"]) == layers < set(document["activations"]["before"])
    # What is left of the path are the tables; the embedding before them is not computed any more.
    assert temporal["checkpoint"]["confusion"] is None and temporal["checkpoint"]["layers"]


def test_a_checkpoint_of_another_recipe_is_not_compared(
    tmp_path: Path, tiny_model: Path, tiny_checkpoint: Path, analyze_config: AnalyzeConfig
) -> None:
    recipe = dataclasses.replace(analyze_config.recipe, activation_bits=4, channel_wise=False)
    config = dataclasses.replace(analyze_config, recipe=recipe)
    with pytest.raises(ConfigError, match=r"\(activation_bits, channel_wise differ\).*leave --recipe out"):
        analyze(tiny_model, tmp_path / "out", config, checkpoint=tiny_checkpoint)
    more_steps = dataclasses.replace(recipe.sensitive, steps=9)
    same_start = dataclasses.replace(analyze_config.recipe, sensitive=more_steps)
    stage._check_recipe(same_start, tiny_checkpoint)


def test_a_finished_analysis_of_what_is_no_directory_is_reused(
    tmp_path: Path, tiny_model: Path, tiny_recipe: Path, monkeypatch: pytest.MonkeyPatch, quick_plots: None
) -> None:
    """Of a hub id or a single file: what it draws is known when it is loaded."""
    monkeypatch.setattr(stage, "load_model", lambda model: load_model(tiny_model))
    config = AnalyzeConfig(
        recipe=load_recipe(str(tiny_recipe)),
        num_prompts=1,
        steps=2,
        sensitivity_prompts=1,
        sensitivity_steps=1,
        bits=("w8",),
    )
    first = analyze("somebody/a-model", tmp_path / "out", config)
    monkeypatch.setattr(stage, "measure", None)
    assert analyze("somebody/a-model", tmp_path / "out", config, resume=True).digest == first.digest
    with pytest.raises(ArtifactError, match="exists already; add --overwrite"):
        analyze("somebody/a-model", tmp_path / "out", dataclasses.replace(config, seed=1), resume=True)

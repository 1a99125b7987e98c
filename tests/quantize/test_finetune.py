"""The finetune stage: what it writes, and that an interrupted run goes on as if nothing had happened."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import PNDMScheduler

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import FinetuneConfig, PhaseConfig, ProgressEvent, Recipe
from quest_deploy.errors import ArtifactError, ConfigError
from quest_deploy.files import hash_directory
from quest_deploy.quantize import resume as stage
from quest_deploy.quantize.checkpoint import load_checkpoint
from quest_deploy.quantize.finetune import finetune
from quest_deploy.quantize.insert import quantizable_layers, quantized_layers

MOMENTS = {
    "gptq": (
        "trajectories-:1:after",
        "trajectories-:2:during",
        "inputs-:1:during",
        "inputs-:1:after",
        "inputs$:1:during",
        "inputs$:1:after",
        "scales:5:during",
        "scales:1:after",
        "rounded-0000-hessians:1:during",
        "rounded-0000-hessians:1:after",
        "rounded-0000-layers:2:after",
        "rounded-0000-layers:1:during",
        "rounded-0000$:1:during",
        "rounded-0000$:1:after",
        "phase-temporal:1:after",
        "phase-temporal:2:during",
        "phase-sensitive:1:after",
        "phase-sensitive:2:during",
        "output:1:during",
    ),
    "adaround": (
        "adaround-0000:1:during",
        "adaround-:2:after",
        "adaround-:1:during",
        "adaround-:1:after",
        "phase-temporal:1:after",
    ),
    "shared": ("inputs$:1:after", "scales:1:after"),
    "table": (
        "damages:3:after",
        "damages:1:during",
        "phase-temporal:1:after",
        "phase-temporal:1:during",
        "phase-sensitive:1:after",
        "output:1:during",
    ),
    "sliced": ("drop:1:during", "phase-sensitive:2:after"),
    "bfloat16": (
        "trajectories-:2:after",
        "inputs$:1:after",
        "phase-temporal:2:after",
        "phase-sensitive:1:after",
        "phase-sensitive:1:during",
    ),
    "own": (
        "phase-temporal:2:after",
        "own-trajectories-:1:after",
        "own-trajectories-:1:during",
        "phase-sensitive:1:after",
    ),
    "two": ("inputs$:1:after", "phase-temporal:2:after", "phase-sensitive:1:after", "output:1:during"),
}


def config(**changes: Any) -> FinetuneConfig:
    """A run that takes a second: it has to make a checkpoint, not a good one."""
    phase = PhaseConfig(layers="all", steps=1, batch_size=1)
    recipe = {
        "name": "tiny",
        "weight_bits": 8,
        "activation_bits": 8,
        "calibration_prompts": 2,
        "validation_prompts": 1,
        "calibration_steps": 2,
        "initializer": "nearest",
        "temporal": phase,
        "sensitive": phase,
    }
    return FinetuneConfig(recipe=Recipe(**(recipe | changes)), prompts=("a", "b"), seed=0)


@pytest.fixture(scope="module")
def events() -> list[ProgressEvent]:
    return []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, events: list) -> Path:
    """The tiny model, finetuned."""
    path = tmp_path_factory.mktemp("finetune") / "checkpoint"
    finetune(tiny_model, path, config(initializer="gptq"), progress=events.append)
    return path


class Stop(Exception):
    """Ends a run from outside."""


@pytest.fixture
def interrupt(tmp_path: Path, tiny_model: Path) -> Callable[[str], Path]:
    """Starts a run that ends when it enters the given part."""

    def make(part: str) -> Path:
        def stop(event: ProgressEvent) -> None:
            if event.stage == part:
                raise Stop

        with pytest.raises(Stop):
            finetune(tiny_model, tmp_path / "out", config(), progress=stop)
        return tmp_path / "out"

    return make


@pytest.fixture(
    scope="module",
    # Twenty seconds each; continuous integration runs them all.
    params=[pytest.param(name, marks=pytest.mark.thorough) for name in MOMENTS],
)
def killed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model: Path
) -> dict[str, Any]:
    """What a run killed at all moments and resumed each time left, beside one in peace."""
    script, moments = Path(__file__).with_name("interrupted_run.py"), MOMENTS[request.param]
    done = subprocess.run(
        [sys.executable, script, request.param, tiny_model, tmp_path_factory.mktemp("killed"), *moments],
        capture_output=True,
        text=True,
        timeout=110,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return {"moments": len(moments), **json.loads(done.stdout)}


def test_kill_9_struck_at_every_moment(killed: dict[str, Any]) -> None:
    assert killed["statuses"] == [0, *[signal.SIGKILL] * killed["moments"], 0]


def test_a_killed_and_resumed_run_ends_in_the_bytes_of_one_in_peace(killed: dict[str, Any]) -> None:
    whole, interrupted = killed["digests"]
    assert interrupted == whole
    assert not killed["histories"] or killed["histories"][0] == killed["histories"][1]


def test_a_killed_run_leaves_its_state_and_no_output(killed: dict[str, Any]) -> None:
    assert ".interrupted.finetune" in killed["before"]
    assert "interrupted" not in killed["before"]


def test_a_resumed_run_leaves_nothing_but_its_output(killed: dict[str, Any]) -> None:
    assert killed["after"] == ["interrupted", "whole"]


def test_every_layer_is_quantized(checkpoint: Path, float_model: Any) -> None:
    layers = quantized_layers(load_checkpoint(checkpoint).denoiser)
    assert layers.keys() == quantizable_layers(float_model.denoiser).keys()


def test_the_manifest_tells_recipe_and_source(checkpoint: Path, tiny_model: Path) -> None:
    manifest = read_artifact(checkpoint, stage="checkpoint").manifest
    assert manifest.config["recipe"]["name"] == "tiny"
    assert manifest.inputs == {"source": hash_directory(tiny_model)}


def test_stable_diffusion_1_is_finetuned_as_it_is_published(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    PNDMScheduler(beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1).save_pretrained(
        model / "scheduler"
    )
    index = json.loads((model / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", "PNDMScheduler"]
    (model / "model_index.json").write_text(json.dumps(index))
    with caplog.at_level("INFO", logger="quest_deploy"):
        made = finetune(model, tmp_path / "out", config(calibration_steps=4))
    told = [entry.message for entry in caplog.records if "recorded with" in entry.message]
    assert len(told) == 1 and "DDIMScheduler" in told[0]
    assert made.manifest.details["scheduler"] == "DDIMScheduler"
    # Images are drawn with the model's own.
    assert type(load_checkpoint(made.path).scheduler) is PNDMScheduler


def test_progress_names_every_part_and_completes_it(checkpoint: Path, events: list[ProgressEvent]) -> None:
    last = {event.stage: event for event in events}
    assert list(last) == [
        "record trajectories",
        "collect activations",
        "search scales",
        "round weights",
        "finetune temporal layers",
        "finetune sensitive layers",
    ]
    assert all(event.completed == event.total > 0 for event in last.values())


def test_progress_of_a_phase_tells_its_losses(checkpoint: Path, events: list[ProgressEvent]) -> None:
    assert {"loss", "validation_loss", "best"} <= events[-1].metrics.keys()


def test_another_seed_gives_other_weights(tiny_model: Path, tmp_path: Path) -> None:
    made = []
    for seed in (0, 1):
        path = tmp_path / str(seed)
        finetune(tiny_model, path, dataclasses.replace(config(), seed=seed))
        made.append((path / "unet" / "quest.safetensors").read_bytes())
    assert made[0] != made[1]


def test_phases_of_no_steps_leave_the_starting_point(
    tiny_model: Path, tmp_path: Path, float_model: Any
) -> None:
    none = PhaseConfig(layers="none", steps=0)
    finetune(tiny_model, tmp_path / "out", config(temporal=none, sensitive=none))
    layer = quantized_layers(load_checkpoint(tmp_path / "out").denoiser)["conv_in"]
    error = (layer.quantized_weight() - float_model.denoiser.conv_in.weight).abs()
    # Every weight lies within half a step, or beyond the range that the search shrank.
    assert (error.flatten(1).amin(dim=1) <= 0.5 * layer.weight_scale()).all()


def test_an_interrupted_run_is_not_started_again_unasked(interrupt: Callable, tiny_model: Path) -> None:
    output = interrupt("search scales")
    with pytest.raises(ConfigError, match="go on with --resume, or start afresh with --overwrite"):
        finetune(tiny_model, output, config())


def test_resuming_with_other_settings_is_refused_with_what_differs(
    interrupt: Callable, tiny_model: Path
) -> None:
    output = interrupt("search scales")
    with pytest.raises(ConfigError) as caught:
        finetune(tiny_model, output, config(weight_bits=4, guidance_scale=5.0), resume=True)
    assert "config.recipe.weight_bits was 8, now 4" in str(caught.value)
    assert "config.recipe.guidance_scale was 3.0, now 5.0" in str(caught.value)
    assert "repeat those, or start afresh with --overwrite and without --resume" in str(caught.value)


def test_resuming_with_another_model_is_refused(
    interrupt: Callable, tiny_model: Path, tmp_path: Path
) -> None:
    output = interrupt("search scales")
    other = shutil.copytree(tiny_model, tmp_path / "other")
    (other / "README.md").write_text("another model\n")
    with pytest.raises(ConfigError, match="was started with other settings .*source was"):
        finetune(other, output, config(), resume=True)


def test_resuming_with_other_threads_is_refused(
    interrupt: Callable, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = interrupt("search scales")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    with pytest.raises(ConfigError, match="machine.threads was .*, now 77"):
        finetune(tiny_model, output, config(), resume=True)


def test_an_interrupted_run_is_thrown_away_when_asked(interrupt: Callable, tiny_model: Path) -> None:
    output = interrupt("search scales")
    finetune(tiny_model, output, config(weight_bits=4), overwrite=True)
    assert [path.name for path in output.parent.iterdir()] == ["out"]


def test_resuming_where_nothing_was_started_starts(tiny_model: Path, tmp_path: Path) -> None:
    assert finetune(tiny_model, tmp_path / "out", config(), resume=True).path == tmp_path / "out"


def test_a_corrupt_state_is_refused(interrupt: Callable, tiny_model: Path) -> None:
    output = interrupt("search scales")
    state = output.parent / ".out.finetune" / "trajectories-000000.safetensors"
    state.write_bytes(state.read_bytes()[:-50])
    with pytest.raises(ArtifactError, match="the saved state is corrupt .* start afresh with --overwrite"):
        finetune(tiny_model, output, config(), resume=True)


def test_an_existing_checkpoint_is_refused_before_any_work(checkpoint: Path) -> None:
    with pytest.raises(ArtifactError, match="exists already; add --overwrite"):
        finetune(Path("no model here"), checkpoint, config())


def test_resuming_a_finished_run_gives_its_checkpoint_and_clears_its_state(
    checkpoint: Path, tiny_model: Path, tmp_path: Path
) -> None:
    output = shutil.copytree(checkpoint, tmp_path / "out")
    state = tmp_path / ".out.finetune"
    state.mkdir()
    (state / "run.json").write_text("{}")
    (output / "manifest.json").touch()
    assert finetune(tiny_model, output, config(initializer="gptq"), resume=True).path == output
    assert not state.exists()


def test_a_checkpoint_that_was_to_be_replaced_is_no_result_of_the_run_that_was_interrupted(
    checkpoint: Path, tiny_model: Path, tmp_path: Path
) -> None:
    """Of another version, for one: it was given back as new, and the run's state deleted."""
    output, settings = shutil.copytree(checkpoint, tmp_path / "out"), config(initializer="gptq")
    before = (output / "manifest.json").stat().st_mtime_ns

    def stop(event: ProgressEvent) -> None:
        raise Stop

    with pytest.raises(Stop):
        finetune(tiny_model, output, settings, progress=stop, overwrite=True)
    with pytest.raises(ArtifactError, match="exists already; add --overwrite"):
        finetune(tiny_model, output, settings, resume=True)
    assert (tmp_path / ".out.finetune" / "trajectories-000000.safetensors").is_file()
    finetune(tiny_model, output, settings, resume=True, overwrite=True)
    assert (output / "manifest.json").stat().st_mtime_ns > before


def test_the_manifest_tells_of_a_phase_that_broke_off(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest_deploy.quantize.train._backpropagate", lambda *args, **options: float("nan"))
    details = finetune(tiny_model, tmp_path / "out", config()).manifest.details
    assert [details[phase]["not_finite_at"] for phase in ("temporal", "sensitive")] == [1, 1]


def test_resuming_into_the_checkpoint_of_another_model_is_refused(
    checkpoint: Path, tiny_model: Path, tmp_path: Path
) -> None:
    other = shutil.copytree(tiny_model, tmp_path / "model")
    (other / "README.md").write_text("another")
    output = shutil.copytree(checkpoint, tmp_path / "out")
    with pytest.raises(ArtifactError, match="exists already; add --overwrite"):
        finetune(other, output, config(initializer="gptq"), resume=True)


def test_a_checkpoint_is_no_model_to_finetune(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quest_deploy.quantize.finetune.load_model", None)  # before anything is loaded
    with pytest.raises(ArtifactError, match="is of stage 'checkpoint', expected a full-precision model"):
        finetune(checkpoint, tmp_path / "again", config())
    assert list(tmp_path.iterdir()) == []


def test_a_pattern_of_no_layers_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    wrong = config()
    recipe = dataclasses.replace(wrong.recipe, sensitive=PhaseConfig(layers="qkv*", steps=1))
    with pytest.raises(ConfigError, match=r"'qkv\*' stands for no layer of this model"):
        finetune(tiny_model, tmp_path / "out", dataclasses.replace(wrong, recipe=recipe))
    assert not list(tmp_path.iterdir())


def test_a_phase_with_nothing_to_train_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    still = PhaseConfig(layers="none", steps=1, learning_rate_scales=0.0)
    recipe = dataclasses.replace(config().recipe, sensitive=still)
    with pytest.raises(ConfigError, match="sensitive phase has steps but nothing to train"):
        finetune(tiny_model, tmp_path / "out", dataclasses.replace(config(), recipe=recipe))


def test_finetuning_leaves_torchs_settings_and_generator_alone(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, during = torch.get_rng_state(), []

    def quantize_companions(*arguments: Any) -> dict[str, Any]:
        during.append(torch.are_deterministic_algorithms_enabled())
        return {}

    monkeypatch.setattr("quest_deploy.quantize.finetune.quantize_companions", quantize_companions)
    finetune(tiny_model, tmp_path / "out", config())
    assert during == [True]
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.equal(torch.get_rng_state(), before)


def test_saves_are_due_every_so_often(monkeypatch: pytest.MonkeyPatch) -> None:
    every = stage.SAVE_EVERY_SECONDS
    clock = iter([100.0, 101.0, 100.0 + every, 100.0 + every, 101.0 + every])
    monkeypatch.setattr(stage.time, "monotonic", lambda: next(clock))
    throttle = stage.Throttle(None)
    assert [throttle.due() for _ in range(3)] == [False, True, False]
    # At most a minute of work is lost where saves are quick.
    assert stage.SAVE_EVERY_SECONDS < 60

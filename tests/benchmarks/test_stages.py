from __future__ import annotations

import dataclasses
import json
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from benchmarks import __main__ as entry
from benchmarks import cost, environment, stages
from benchmarks.__main__ import FIXED, HERE, parse
from benchmarks.settings import RESULTS, Settings, write_recipe
from quest_deploy.artifacts import write_artifact
from quest_deploy.bench import stage as bench_stage
from quest_deploy.commands import main
from quest_deploy.config import FinetuneConfig, to_dict
from quest_deploy.prompts import load_prompts
from quest_deploy.quantize.recipe import load_recipe
from scripts import demo


class Work(Settings):
    """Settings whose files lie in a temporary directory."""

    @property
    def work(self) -> Path:
        return Path("work")


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stages that were run; each writes a manifest and takes a second."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "manifest.json").write_text("{}")
    names: list[str] = []

    def run(stage: demo.Stage) -> demo.Outcome:
        names.append(stage.name)
        stage.output.mkdir(exist_ok=True)
        (stage.output / "manifest.json").write_text(json.dumps(len(names)))
        code = 1 if "fail" in stage.arguments else 0
        return demo.Outcome(stage=stage.name, command="", exit_code=code, seconds=1.0, peak_memory_bytes=1)

    monkeypatch.setattr(stages, "run", run)
    return names


def make(*arguments: str, **changes: Any) -> dict:
    return stages.make(
        Work(), "a stage", arguments, Path("out"), inputs=[Path("in")], sources=("sources",), **changes
    )


def test_a_finished_stage_is_not_run_again(calls: list[str]) -> None:
    assert make("verb") == make("verb")
    assert calls == ["a stage"]


def test_other_arguments_inputs_or_a_changed_output_run_it_again(calls: list[str]) -> None:
    make("verb")
    make("verb", "--option")
    Path("in/manifest.json").write_text("changed")
    make("verb", "--option")
    Path("out/manifest.json").write_text("changed")
    make("verb", "--option")
    assert len(calls) == 4


def test_engines_of_an_earlier_run_are_not_kept(calls: list[str]) -> None:
    make("build-engine")
    Path("out/left").touch()
    make("build-engine", "--other")
    assert calls == ["a stage"] * 2
    assert not Path("out/left").exists()


def test_a_failed_stage_is_run_again(calls: list[str]) -> None:
    assert make("fail")["exit_code"] == 1
    make("fail")
    assert len(calls) == 2


def test_a_required_stage_that_failed_ends_the_benchmark(calls: list[str]) -> None:
    with pytest.raises(SystemExit, match="failed with code 1"):
        stages.required(make("fail"))


def interrupted(*arguments: str, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """A run that was killed, after it had left something to go on from."""

    def killed(stage: demo.Stage) -> demo.Outcome:
        Path(".out.finetune").mkdir(exist_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "run", killed)
        make(*arguments, **changes)


def test_a_finished_interrupted_run_says_so(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted("verb", monkeypatch=monkeypatch)
    assert make("verb")["resumed"] is True


def test_what_another_run_left_is_not_gone_on_with(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted("verb", monkeypatch=monkeypatch, settings_read={"weight_bits": 4})
    assert make("verb", settings_read={"weight_bits": 8})["resumed"] is False
    assert not Path(".out.finetune").exists()
    Path(".out.finetune").mkdir()  # of a version that told nothing
    Path("work/stages/a stage.begun").unlink()
    assert make("verb", "--again")["resumed"] is False


def test_what_ran_in_other_threads_is_begun_afresh(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    interrupted("verb", monkeypatch=monkeypatch)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert make("verb")["resumed"] is False


def test_a_stage_tells_the_threads_that_it_ran_with(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make("verb")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert make("verb")["threads"] == "1"
    assert calls == ["a stage"]


def test_openvino_matters_to_what_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "openvino" in stages.tool_versions()
    monkeypatch.setattr(stages, "tool_versions", lambda: {"torch": "9", "openvino": "1"})
    assert stages.made_by(stages.QUANTIZER)["tools"] == {"torch": "9"}
    assert stages.made_by(stages.PACKAGE)["tools"] == {"torch": "9", "openvino": "1"}


def test_another_content_of_the_recipe_or_another_library_runs_it_again(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make("verb", settings_read={"weight_bits": 4})
    make("verb", settings_read={"weight_bits": 4})
    make("verb", settings_read={"weight_bits": 8})
    assert len(calls) == 2
    monkeypatch.setattr(stages, "tool_versions", lambda: {"torch": "9"})
    make("verb", settings_read={"weight_bits": 8})
    assert len(calls) == 3


def test_a_stage_is_of_the_code_that_it_began_with(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    digests = iter(["before", "while it ran", "afterwards"])
    monkeypatch.setattr(stages, "sources_digest", lambda paths: next(digests))
    make("verb")
    assert json.loads(Path("work/stages/a stage.json").read_text())["sources"] == "before"


@pytest.mark.parametrize(("after", "told"), [("same", ("end", False)), ("other", ("start", True))])
def test_code_that_changed_while_a_benchmark_ran_is_told(
    after: str, told: tuple[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = iter(["same", after])
    monkeypatch.setattr(entry, "sources_digest", lambda paths: next(digests))
    monkeypatch.setattr(entry, "git", lambda *words: "start")
    module = SimpleNamespace(run=lambda settings: {"commit": "end", "uncommitted_changes": False})
    assert entry.measured(module, Work()) == dict(zip(("commit", "uncommitted_changes"), told, strict=True))


def test_every_stage_is_a_valid_call_of_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[str, ...]] = []

    def note(settings: Settings, name: str, arguments: tuple[str, ...], output: Path, **_: object) -> dict:
        given.append((*arguments, "-o", str(output)))
        return {"exit_code": 0}

    monkeypatch.setattr(stages, "make", note)
    settings, path = Settings(), Path("x")
    stages.finetune(settings, settings.recipe("w4a8"), path)
    for stage in (stages.build, stages.generate):
        stage(settings, "w4a8", path)
    for target in cost.TARGETS:
        stages.export(settings, "w4a8", path, target)
    stages.parity(settings, "w4a8", path, path)
    for verb, *arguments in given:
        command = main.get_command(click.Context(main), verb)
        assert command is not None
        command.make_context(verb, arguments)  # raises click.UsageError for an option that does not exist
    assert len(given) == 6


def test_a_checkpoint_of_other_settings_is_not_taken_for_the_recipes(
    tmp_path: Path,
) -> None:
    settings = Settings(checkpoints=tmp_path)
    recipe = settings.recipe("w4a8")
    prompts = load_prompts(default="calibration")
    for seed, config in ((0, recipe), (1, recipe), (0, dataclasses.replace(recipe, walk_share=0.125))):
        made = FinetuneConfig(recipe=config, prompts=prompts, seed=seed)
        with write_artifact(
            settings.checkpoint("w4a8"), stage="checkpoint", config=to_dict(made), overwrite=True
        ):
            pass
        if (seed, config) == (0, recipe):
            assert stages.finetuned(settings, "w4a8")[1]["seconds"] is None
        else:
            with pytest.raises(SystemExit, match="other settings"):
                stages.finetuned(settings, "w4a8")


def test_a_setting_that_a_checkpoint_does_not_know_has_its_default() -> None:
    recipe = Settings().recipe("w4a8")
    config = FinetuneConfig(recipe=recipe, prompts=("a",) * recipe.calibration_prompts)
    recorded = to_dict(config)
    del recorded["recipe"]["walk_length"], recorded["device"]
    assert stages.made_with(config, recorded)
    longer = dataclasses.replace(config, recipe=dataclasses.replace(recipe, walk_length=7))
    assert not stages.made_with(longer, recorded)
    assert not stages.made_with(dataclasses.replace(config, device="cuda"), recorded)


def test_sources_digest_sees_content_and_names(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    file = tmp_path / "package" / "a.py"
    digests = []
    for content in ("x = 1", "x = 2"):
        file.write_text(content)
        digests.append(stages.sources_digest(["package"], tmp_path))
    file.rename(tmp_path / "package" / "b.py")
    digests.append(stages.sources_digest(["package"], tmp_path))
    (tmp_path / "package" / "compiled.pyc").write_text("")
    assert len(set(digests)) == 3
    assert stages.sources_digest(["package"], tmp_path) == digests[-1]


def test_written_recipe_reads_back(tmp_path: Path) -> None:
    recipe = Settings(quick=True).recipe("w4a4")
    assert load_recipe(str(write_recipe(recipe, tmp_path))) == recipe


def test_quick_results_stay_out_of_the_repository() -> None:
    assert Settings().results == RESULTS
    assert Settings(quick=True).results.parts[0] == "artifacts"


def test_full_run_measures_on_all_held_out_prompts() -> None:
    assert len(Settings().prompts) == 64


@pytest.mark.parametrize("recipes", ["w5a8", "w4a8,", ""])
def test_unknown_recipes_are_a_usage_error(recipes: str) -> None:
    with pytest.raises(SystemExit) as error:
        parse(["quality", "--recipes", recipes])
    assert error.value.code == 2


def test_recipes_are_separated_by_commas() -> None:
    assert parse(["--recipes", "w4a8, W4A4"]).recipes == ("w4a8", "w4a4")


@pytest.mark.parametrize("benchmark", FIXED)
def test_recipes_that_a_benchmark_would_ignore_are_a_usage_error(benchmark: str) -> None:
    with pytest.raises(SystemExit) as error:
        parse([benchmark, "--recipes", "w4a4"])
    assert error.value.code == 2


def test_all_with_recipes_runs_those_that_go_by_them(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[list[str]] = []
    monkeypatch.setattr(subprocess, "call", lambda command: calls.append(command) or 0)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "all", "--recipes", "w4a4"])
    assert entry.main() == 0
    assert {command[3] for command in calls} == set(HERE) - set(FIXED)
    assert all(command[4:] == ["--recipes", "w4a4"] for command in calls)


def test_values_are_counted_from_the_header(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {}, "a": {"shape": [2, 3]}, "b": {"shape": []}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert cost.tensor_values(tmp_path / "x.safetensors") == 7


def test_ratio_needs_both_sizes() -> None:
    sizes = {"fp32": {"onnx": 1000}, "w4a8": {"onnx": 190, "engine": 5}}
    assert cost.ratio(sizes, "w4a8", "onnx") == 0.19
    assert cost.ratio(sizes, "w4a8", "engine") is None


def test_processor_is_named_or_the_architecture(tmp_path: Path) -> None:
    assert bench_stage.machine()["cpu"] == environment.machine()["cpu"]
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Abacus 3000\nmodel name\t: other\n")
    assert environment.cpu_model(tmp_path / "cpuinfo") == "Abacus 3000"
    assert environment.cpu_model(tmp_path / "missing") == environment.platform.machine()

"""`quest-deploy analyze`: from the command line to a recipe that finetuning takes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from quest_deploy.analyze import figures, stage
from quest_deploy.analyze.config import AnalyzeConfig
from quest_deploy.analyze.mixed import RecipeRequest, write_mixed_recipe
from quest_deploy.commands import main
from quest_deploy.config import BitsOverride
from quest_deploy.errors import ConfigError
from quest_deploy.files import read_json
from quest_deploy.model.load import load_model
from quest_deploy.quantize.allocate import read_table, roles_of, summarize
from quest_deploy.quantize.recipe import load_recipe
from quest_deploy.quantize.select import layer_bits, select
from quest_deploy.quantize.trace import trace

SMALL = ("--num-prompts", "2", "--steps", "2", "--sensitivity-steps", "1", "--sensitivity-prompts", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, tiny_recipe: Path) -> Path:
    """A directory in which the tiny model was analyzed, and a recipe written with it."""
    folder = tmp_path_factory.mktemp("analyze")
    with pytest.MonkeyPatch.context() as patch:
        # Drawing takes longer than everything else.
        patch.setattr(figures, "to_svg", lambda figure: "<svg/>")
        done = run(folder, tiny_model, tiny_recipe, "--average-weight-bits", "6", "--finetune-share", "0.3")
    assert done["recipe"]["average_weight_bits"] <= 6
    return folder


def run(folder: Path, model: Path, recipe: Path, *options: str) -> dict:
    """Analyze, or reuse what is there, and write `mixed.yaml`."""
    words = [
        "analyze",
        str(model),
        "-o",
        str(folder / "out"),
        "--recipe",
        str(recipe),
        *SMALL,
        "--json",
        "--resume",
    ]
    words += ["--bits", "w4,w8,a4,a8", "--write-recipe", str(folder / "mixed.yaml"), *options]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.stderr
    result: dict = json.loads(done.stdout)
    return result


def test_artifact_and_page_are_there(place: Path) -> None:
    assert {file.name for file in (place / "out").iterdir()} == {
        "analysis.html",
        "analysis.json",
        "manifest.json",
    }


def test_recipe_gives_layers_the_bits_of_the_budget(place: Path) -> None:
    table = read_table(read_json(place / "out" / "analysis.json")["sensitivity"])
    bits = layer_bits({layer.name: layer.role for layer in table}, load_recipe(str(place / "mixed.yaml")))
    assert 5.5 < summarize(table, bits).average_weight_bits <= 6


def test_recipe_trains_a_share_of_the_weights(place: Path) -> None:
    table = read_table(read_json(place / "out" / "analysis.json")["sensitivity"])
    recipe = load_recipe(str(place / "mixed.yaml"))
    chosen = select({layer.name: layer.role for layer in table}, recipe.sensitive.layers)
    share = sum(layer.weights for layer in table if layer.name in chosen) / sum(
        layer.weights for layer in table
    )
    assert 0.2 < share <= 0.3


def test_another_recipe_needs_no_new_measurement(place: Path, tiny_model: Path, tiny_recipe: Path) -> None:
    before = (place / "out" / "manifest.json").stat().st_mtime_ns
    done = run(place, tiny_model, tiny_recipe, "--average-activation-bits", "5")
    assert done["recipe"]["average_activation_bits"] <= 5
    assert (place / "out" / "manifest.json").stat().st_mtime_ns == before


def test_a_recipe_is_not_written_into_the_analysis(tmp_path: Path) -> None:
    words = ["analyze", "nowhere/model", "-o", str(tmp_path / "out"), "--finetune-share", "0.5"]
    done = CliRunner().invoke(main, [*words, "--write-recipe", str(tmp_path / "out" / "mixed.yaml")])
    assert done.exit_code == 1 and "choose a path outside of it" in done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--average-weight-bits", "6"], "add --write-recipe FILE.yaml"),
        (["--write-recipe", "mixed.yaml"], "nothing to choose"),
        (["--write-recipe", "mixed.json", "--finetune-share", "0.5"], "ends in .yaml"),
        (["--write-recipe", "nowhere/mixed.yaml", "--finetune-share", "2"], "expected above 0 and at most 1"),
        (["--bits", "w4,w3"], "'w3' are unknown"),
        (["--steps", "1"], "steps is 1, expected at least 2"),
        (
            ["--bits", "w8,a8,w4a8", "--average-weight-bits", "6", "--write-recipe", "mixed.yaml"],
            "bits lack w8a4, w4a4, and a budget chooses among 4 and 8; add them",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_loaded(
    options: list[str], message: str, tmp_path: Path
) -> None:
    # The model does not exist, which would be the message if it were loaded first.
    done = CliRunner().invoke(main, ["analyze", "nowhere/model", "-o", str(tmp_path / "out"), *options])
    assert done.exit_code == 1
    assert message in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_onnx_is_refused(tmp_path: Path, tiny_onnx: Path) -> None:
    done = CliRunner().invoke(main, ["analyze", str(tiny_onnx), "-o", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "stage 'onnx', which has no layers to analyze" in done.stderr


def share_of(folder: Path, recipe: str) -> list[str]:
    """The command that chooses layers for a recipe's second phase; `recipe` is its YAML, its name "r"."""
    (folder / "r.yaml").write_text(recipe)
    words = ["analyze", "nowhere/model", "-o", str(folder / "out"), "--recipe", str(folder / "r.yaml")]
    return [*words, "--finetune-share", "0.2", "--write-recipe", str(folder / "mixed.yaml")]


def test_bits_that_a_share_needs_are_asked_for_at_once(tmp_path: Path) -> None:
    words = share_of(
        tmp_path,
        "weight_bits: 4\nactivation_bits: 4\noverrides: [{layers: time-projections, activation_bits: 8}]\n"
        "temporal: {layers: none, steps: 0}\nsensitive: {layers: all, steps: 1}\n",
    )
    done = CliRunner().invoke(main, [*words, "--bits", "w8a8,w4a4"])
    assert done.exit_code == 1
    assert "bits lack w4a8, and layers of recipe r have them" in done.stderr
    done = CliRunner().invoke(main, [*words, "--bits", "w8a8,w4a4,w4a8"])
    assert "bits lack" not in done.stderr


def test_a_share_for_a_phase_without_steps_is_refused(tmp_path: Path) -> None:
    words = share_of(
        tmp_path,
        "weight_bits: 8\nactivation_bits: 8\n"
        "temporal: {layers: temporal, steps: 1}\nsensitive: {layers: none, steps: 0}\n",
    )
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert "which recipe r has no steps for" in done.stderr


def test_a_checkpoints_own_recipe_is_the_default(
    tmp_path: Path, tiny_model: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def keep(model: object, output: object, config: AnalyzeConfig, **options: object) -> None:
        seen.append(config.recipe)
        raise ConfigError("that is all")

    monkeypatch.setattr(stage, "analyze", keep)
    words = ["analyze", str(tiny_model), "-o", str(tmp_path / "out")]
    assert CliRunner().invoke(main, [*words, "--checkpoint", str(tiny_checkpoint)]).exit_code == 1
    assert CliRunner().invoke(main, words).exit_code == 1
    assert [recipe.name for recipe in seen] == ["tiny", "w4a4"]


def test_presets_of_a_written_recipe_stand_for_the_layers_of_the_model(
    place: Path, tiny_model: Path, tmp_path: Path
) -> None:
    sensitivity = read_json(place / "out" / "analysis.json")["sensitivity"]
    roles = trace(load_model(tiny_model)).roles
    assert roles_of(read_table(sensitivity)) == roles
    assert roles_of(read_table(sensitivity)).outlets == roles.outlets != frozenset()
    recipe = dataclasses.replace(
        load_recipe("w4a8"),
        overrides=(BitsOverride(layers="time-projections", weight_bits=8, activation_bits=8),),
    )
    request = RecipeRequest(path=tmp_path / "mixed.yaml", budget=None, finetune_share=0.5)
    chosen = write_mixed_recipe(recipe, sensitivity, request)
    expected = {name: f"w{w}a{a}" for name, (w, a) in layer_bits(roles, recipe).items()}
    assert chosen["layers"] == expected
    assert expected[min(roles.outlets)] == "w8a8"
    table = dataclasses.replace(
        recipe,
        temporal_path="table",
        overrides=(BitsOverride(layers="time_embedding.*", weight_bits=8),),
    )
    assert not any("time_emb" in name for name in write_mixed_recipe(table, sensitivity, request)["layers"])

"""Recipes: packaged, from files, and everything that is wrong with one in one message."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from quest_deploy.config import BitsOverride, Recipe, to_dict
from quest_deploy.errors import ConfigError
from quest_deploy.quantize.recipe import NAMES, PACKAGED, PAPER, load_recipe, recipe_from_dict
from quest_deploy.quantize.select import PRESETS

PHASE = {"layers": "all", "steps": 2}


def fields(**changes: Any) -> dict[str, Any]:
    base = {"name": "mine", "weight_bits": 4, "activation_bits": 8, "temporal": PHASE, "sensitive": PHASE}
    return base | changes


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_recipe_has_the_bits_of_its_name(name: str) -> None:
    recipe = load_recipe(name)
    assert (recipe.name, f"w{recipe.weight_bits}a{recipe.activation_bits}") == (name, name)


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_recipe_names_known_layers(name: str) -> None:
    recipe = load_recipe(name)
    assert {
        recipe.temporal.layers,
        recipe.sensitive.layers,
        *(o.layers for o in recipe.overrides),
    } <= PRESETS.keys()


def test_a_file_is_named_after_itself(tmp_path: Path) -> None:
    path = tmp_path / "gentle.yaml"
    phase = "{layers: all, steps: 1}"
    path.write_text(f"weight_bits: 8\nactivation_bits: 8\ntemporal: {phase}\nsensitive: {phase}\n")
    assert load_recipe(str(path)).name == "gentle"


@pytest.mark.parametrize("name", PAPER)
def test_a_published_setting_trains_its_tasks_layers_and_time_first(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.sensitive.layers == name in PRESETS
    assert (recipe.initializer, recipe.time_aware, recipe.walk_share) == ("adaround", True, 0.0)
    # Passes of the published loops: updates times samples, of which a guided pair has two.
    branches = 1 if name == "paper-uncond" else 2
    phases = (recipe.temporal, recipe.sensitive)
    passes = [phase.steps * phase.batch_size * branches for phase in phases]
    assert (
        passes
        == {
            "paper-sd": [7700, 32_000],
            "paper-cldm": [48_000, 25_600],
            "paper-uncond": [32_000, 25_600],
        }[name]
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_comes_back_from_a_manifest(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe_from_dict(to_dict(recipe)) == recipe


def test_every_mistyped_field_is_reported_at_once() -> None:
    wrong = fields(
        weight_bits="4", time_aware=1, typo=3, initializer="rtn", temporal={"steps": 1.5, "rate": 1}
    )
    del wrong["sensitive"]
    with pytest.raises(ConfigError) as caught:
        recipe_from_dict(wrong)
    for problem in (
        "recipe mine: ",
        "weight_bits is '4', expected a whole number",
        "time_aware is 1, expected true or false",
        "typo is unknown",
        "initializer is 'rtn', expected one of nearest, gptq",
        "temporal.layers is missing",
        "temporal.steps is 1.5, expected a whole number",
        "temporal.rate is unknown",
        "sensitive is missing",
    ):
        assert problem in str(caught.value)


def test_every_value_out_of_range_is_reported_at_once() -> None:
    phase = PHASE | {"steps": -1, "learning_rate_weights": float("nan")}
    with pytest.raises(ConfigError) as caught:
        recipe_from_dict(fields(weight_bits=5, validation_prompts=0, temporal=phase, sensitive=phase))
    for problem in (
        "weight_bits is 5, expected 4 or 8",
        "validation_prompts is 0, expected at least 1",
        "temporal: finetuning phase: steps is -1, expected at least 0",
        "learning_rate_weights is nan",
        "sensitive: finetuning phase: steps is -1",
    ):
        assert problem in str(caught.value)


def test_wrong_types_hide_neither_values_out_of_range_nor_other_overrides() -> None:
    wrong = fields(
        weight_bits=3,
        activation_bits="8",
        typo=1,
        overrides=[{"layers": "a", "weight_bits": 6}, {"layers": "b", "weight_bits": 5}, {"layer": "c"}],
        temporal={"layers": 3, "steps": -1, "batch_size": 0},
        sensitive={"layers": "all", "steps": 2.5, "patience": -1},
    )
    with pytest.raises(ConfigError) as caught:
        recipe_from_dict(wrong)
    for problem in (
        "weight_bits is 3, expected 4 or 8",
        "activation_bits is '8', expected a whole number",
        "typo is unknown",
        "overrides[0]: override of layers 'a': weight_bits is 6",
        "overrides[1]: override of layers 'b': weight_bits is 5",
        "overrides[2].layer is unknown",
        "temporal.layers is 3",
        "temporal: finetuning phase: steps is -1, expected at least 0; batch_size is 0",
        "sensitive.steps is 2.5, expected a whole number",
        "sensitive: finetuning phase: patience is -1",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [
        {"calibration_prompts": "200", "validation_prompts": 100},
        {"attention_bits": "8", "softmax_bits": 8},
        {"overrides": [{"layers": "a", "weight_bits": "4"}]},
        {"temporal": {"layers": []}},
    ],
    ids=str,
)
def test_what_cannot_be_read_is_no_reason_for_another_problem(wrong: dict) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe_from_dict(fields(**wrong))
    assert ";" not in str(caught.value)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")], ids=str)
def test_numbers_that_are_not_finite_are_refused(value: float) -> None:
    rates = ("learning_rate_weights", "learning_rate_scales", "learning_rate_floats", "auto_share")
    others = ("guidance_scale", "walk_share", "collapse_loss_db", "migration_exponent", "memory_limit_gb")
    with pytest.raises(ConfigError) as caught:
        recipe_from_dict(fields(temporal=PHASE | dict.fromkeys(rates, value)) | dict.fromkeys(others, value))
    for name in (*rates, *others):
        assert f"{name} is {value}, expected" in str(caught.value)


def test_a_phase_with_steps_needs_layers() -> None:
    with pytest.raises(ConfigError, match="sensitive: .*layers is .*, expected at least one"):
        recipe_from_dict(fields(sensitive={"layers": [], "steps": 1}))
    assert recipe_from_dict(fields(sensitive={"layers": [], "steps": 0})).sensitive.layers == ()


def test_repeated_fields_of_a_file_are_reported_with_all_else(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    phase = "{layers: all, steps: 1, steps: -1}"
    bits = "weight_bits: 4\nweight_bits: 8\nactivation_bits: 3\n"
    path.write_text(f"{bits}temporal: {phase}\nsensitive: {{layers: all, steps: 1}}\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    for problem in (
        "weight_bits is in lines 1 and 2, expected once",
        "steps is in lines 4 and 4, expected once",
        "activation_bits is 3",
        "steps is -1",
    ):
        assert problem in str(caught.value)


def test_a_key_of_a_merged_mapping_may_be_given_again(tmp_path: Path) -> None:
    path = tmp_path / "merged.yaml"
    path.write_text(
        "weight_bits: 4\nactivation_bits: 8\ntemporal: &phase {layers: temporal, steps: 3}\n"
        "sensitive:\n  <<: *phase\n  layers: all\n"
    )
    recipe = load_recipe(str(path))
    assert (recipe.sensitive.layers, recipe.sensitive.steps) == ("all", 3)


def test_all_prompts_cannot_be_kept_for_validation() -> None:
    with pytest.raises(
        ConfigError, match="validation_prompts is 4, expected fewer than calibration_prompts, 4"
    ):
        recipe_from_dict(fields(calibration_prompts=4, validation_prompts=4))


def test_a_whole_number_is_a_number() -> None:
    assert recipe_from_dict(fields(guidance_scale=3)) == recipe_from_dict(fields(guidance_scale=3.0))


def test_true_is_not_a_number() -> None:
    with pytest.raises(ConfigError, match="guidance_scale is True, expected a number"):
        recipe_from_dict(fields(guidance_scale=True))


def test_overrides_are_read() -> None:
    recipe = recipe_from_dict(fields(overrides=[{"layers": "mid_block.*", "activation_bits": 4}]))
    assert recipe.overrides == (BitsOverride(layers="mid_block.*", activation_bits=4),)
    assert recipe_from_dict(to_dict(recipe)) == recipe


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("mid_block", "overrides is 'mid_block', expected a list"),
        (["mid_block"], r"overrides\[0\] is 'mid_block', expected a mapping"),
        ([{"layers": "x", "bits": 4}], r"overrides\[0\].bits is unknown"),
        ([{"layers": "x", "weight_bits": "4"}], "weight_bits is '4', expected a whole number or nothing"),
        ([{"layers": "x", "weight_bits": 3}], "layers 'x': weight_bits is 3, expected 4 or 8"),
        ([{"layers": "x"}], "layers 'x': neither weight_bits nor activation_bits is given"),
    ],
)
def test_a_wrong_override_is_refused(overrides: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_from_dict(fields(overrides=overrides))


def test_several_patterns_may_choose_the_layers_of_a_phase() -> None:
    recipe = recipe_from_dict(fields(temporal={"layers": ["a.*", "b"], "steps": 1}))
    assert recipe.temporal.layers == ("a.*", "b")


def test_a_phase_has_to_be_a_mapping() -> None:
    with pytest.raises(ConfigError, match="temporal is 'all', expected a mapping"):
        recipe_from_dict(fields(temporal="all"))


def test_an_unknown_name_is_refused_with_the_packaged_ones() -> None:
    with pytest.raises(
        ConfigError, match="recipe 'w3a3' is unknown; choose w8a8, w4a8, w4a4, paper-sd, .*, or give a YAML"
    ):
        load_recipe("w3a3")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"weight_bits: [4", "is not valid YAML"),
        (b"- 4\n", "got list, expected a mapping of fields"),
        (b"", "got NoneType, expected a mapping of fields"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"1: 2\n", "1 is unknown"),
        (b"name: 2020-13-45\n", "is not valid YAML"),
        (b"a: !!python/object/apply:os.getcwd []\n", "is not valid YAML"),
    ],
    ids=["unclosed", "list", "empty", "not text", "number as a field", "no date", "code"],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "broken.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_recipe(str(path))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read .*No such file"):
        load_recipe(str(tmp_path / "none.yaml"))


def test_a_recipe_is_checked_when_made() -> None:
    with pytest.raises(ConfigError, match="activation_bits is 16"):
        Recipe(**{**vars(load_recipe("w4a8")), "activation_bits": 16})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention_bits": 5}, "attention_bits is 5, expected 4, 8 or nothing"),
        ({"attention_bits": 8, "softmax_bits": 4}, "softmax_bits is 4, expected 8 or nothing"),
        ({"softmax_bits": 8}, "softmax_bits is set, expected attention_bits beside it"),
        ({"softmax_max_keys": 0}, "softmax_max_keys is 0, expected at least 1"),
        ({"split": "no"}, "split is 'no', expected true or false"),
        ({"temporal_path": "lookup"}, "temporal_path is 'lookup', expected one of quantized, table"),
        (
            {"text_encoder": "w4a4"},
            "text_encoder is 'w4a4', expected one of int8-weight-only, w8a8 or nothing",
        ),
        ({"migration_exponent": 1.5}, "migration_exponent is 1.5, expected auto, or a number from 0 to 1"),
        ({"migration_exponent": "best"}, "migration_exponent is 'best', expected a number or one of auto"),
    ],
)
def test_a_wrong_quantizer_is_refused(given: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe_from_dict(fields(**given))


@pytest.mark.parametrize(
    "given",
    [
        {"migration_exponent": 0.5, "vae_decoder": "w8a8"},
        {"attention_bits": 8, "softmax_bits": 8, "precision": "bfloat16"},
        {"temporal_path": "table"},
    ],
    ids=str,
)
def test_quantizers_are_read(given: dict) -> None:
    recipe = recipe_from_dict(fields(**given))
    assert given.items() <= vars(recipe).items() and recipe_from_dict(to_dict(recipe)) == recipe

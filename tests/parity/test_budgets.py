"""Budgets and gates: what a file may say, and what a figure has to meet."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.errors import ConfigError
from quest_deploy.parity.budgets import Budget, check_names, load_budget
from quest_deploy.parity.gates import Gate
from quest_deploy.parity.ladder import recipe_name


@pytest.mark.parametrize("recipe", ["w8a8", "w4a8", "w4a4"])
def test_packaged_budget_gates_each_recipe(recipe: str) -> None:
    budget = load_budget(None, recipe)
    assert None not in (budget.noise_snr_db_min, budget.image_psnr_db_min, budget.image_ssim_min)


def test_a_recipe_overrides_the_top_level(tmp_path: Path) -> None:
    path = tmp_path / "budget.yaml"
    path.write_text("noise_snr_db_min: 30\nimage_ssim_min: 0.9\nrecipes: {w4a4: {noise_snr_db_min: 10}}")
    assert load_budget(path, "w4a4") == Budget(noise_snr_db_min=10, image_ssim_min=0.9)
    assert load_budget(path, "w8a8") == Budget(noise_snr_db_min=30, image_ssim_min=0.9)


def test_every_mistake_in_a_budget_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "budget.yaml"
    path.write_text("snr: 3\nimage_ssim_min: high\nrecipes: {w4a4: 7, w8a8: {image_psnr_db_min: .nan}}")
    with pytest.raises(ConfigError) as error:
        load_budget(path, "w8a8")
    for part in ("snr is unknown", "'high'", "recipes.w4a4", "recipes.w8a8.image_psnr_db_min is nan"):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"recipes: [unclosed", "not valid YAML"),
        (b"", "empty file"),
        (b"- 1\n", "got a list"),
        (b"\xff\xfe\x00", "binary data"),
        (b"image_ssim_min: yes\n", "expected a number"),
        (b"image_ssim_min: 2\n", "between -1 and 1"),
        (b"a: &a [*a]\n", "unknown"),
        (b"image_ssim_min: 0.9\nimage_ssim_min: 0.1\n", "image_ssim_min is in lines 1 and 2, expected once"),
        (b"recipes: {2026-11-28: {image_ssim_min: 0.9}}\n", "got a date for a name, expected text"),
        (b"recipes: {8: {image_ssim_min: 0.9}}\n", "got a int for a name, expected text"),
        (b"recipes: {2026-13-45: {image_ssim_min: 0.9}}\n", "not valid YAML"),
        (b"x: !!python/object/apply:os.system ['false']\n", "not valid YAML"),
    ],
)
def test_a_corrupt_budget_is_a_config_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "budget.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_budget(path, "w8a8")


NAMES = {
    "of the recipe": ("recipes: {mine: {image_ssim_min: 0.9}}", True),
    "of the recipe, and another's": ("recipes: {mine: {image_ssim_min: 0.9}, yours: {}}", True),
    "none": ("image_ssim_min: 0.9", True),
    "of a packaged recipe, with floors for all": ("image_ssim_min: 0.9\nrecipes: {w4a4: {}}", True),
    "of a packaged recipe alone": ("recipes: {w4a4: {image_ssim_min: 0.9}}", False),
    "mistyped": ("recipes: {mien: {image_ssim_min: 0.9}}", False),
    "mistyped, with floors for all": ("image_ssim_min: 0.1\nrecipes: {mien: {image_ssim_min: 0.9}}", False),
}


@pytest.mark.parametrize(("content", "accepted"), NAMES.values(), ids=NAMES)
def test_a_name_must_stand_for_something(content: str, accepted: bool, tmp_path: Path) -> None:
    path = tmp_path / "budget.yaml"
    path.write_text(content)
    with contextlib.nullcontext() if accepted else pytest.raises(ConfigError, match="expected mine"):
        check_names(path, {"mine"})


def test_names_are_no_matter_where_nothing_is_quantized(tmp_path: Path) -> None:
    path = tmp_path / "budget.yaml"
    path.write_text("recipes: {mine: {image_ssim_min: 0.9}}")
    check_names(path, set())


@pytest.mark.parametrize(
    ("content", "name"),
    [({"recipe": "w4a8"}, "w4a8"), ({"recipe": {"name": "w4a4"}}, "w4a4"), ({}, "custom")],
)
def test_recipe_name_is_read_in_either_form(content: dict[str, Any], name: str) -> None:
    assert recipe_name(content) == name


@pytest.mark.parametrize(
    ("measured", "at_least", "passed"),
    [
        (50.0, True, True),
        (49.9, True, False),
        (math.nan, True, False),
        (math.nan, False, False),
        (None, True, None),
    ],
)
def test_a_gate_is_inclusive_and_fails_on_nan(
    measured: float | None, at_least: bool, passed: bool | None
) -> None:
    made = Gate(rung="onnx", kind="deployment", quantity="x", measured=measured, limit=50, at_least=at_least)
    assert made.passed is passed

"""Figures that documents quote are those of the committed results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from quest_deploy.files import read_json

RECIPES = ("w8a8", "w4a8", "w4a4")
SHOWN = ("minmax", "calibrated", "quest")


def results(repository: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = read_json(repository / "benchmarks" / "results" / f"{name}.json")
    return content


def mean(rows: dict[str, Any], row: str, figure: str) -> str:
    return f"{rows[row][figure]['mean']:.1f}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_table_of_the_readme(repository: Path, recipe: str) -> None:
    rows = results(repository, "quality")["recipes"][recipe]["rows"]
    text = (repository / "README.md").read_text(encoding="utf-8")
    (line,) = re.findall(rf"^\| {recipe.upper()} \|.*$", text, re.MULTILINE)
    wanted = [mean(rows, row, figure) for figure in ("raw_snr_db", "psnr_db") for row in SHOWN]
    assert re.findall(r"([\d.]+) dB", line) == wanted


def test_leads_over_the_next_baseline(repository: Path) -> None:
    leads = []
    for recipe in RECIPES:
        found = results(repository, "baselines")["recipes"][recipe]["differences"]
        leads.append(f"{min(one['raw_snr_db']['mean'] for one in found.values()):.1f}")
    text = (repository / "README.md").read_text(encoding="utf-8")
    assert f"by {leads[0]}, {leads[1]} and {leads[2]} dB of noise SNR" in " ".join(text.split())


def test_gains_of_the_digits(repository: Path) -> None:
    gain = {
        (model, recipe): f"+{found['differences']['quest - calibrated']['raw_snr_db']['mean']:.1f}"
        for model, recipes in results(repository, "families")["models"].items()
        for recipe, found in recipes.items()
    }
    text = " ".join((repository / "README.md").read_text(encoding="utf-8").split())
    assert (
        f"QuEST over calibration {gain['digits-class', 'w4a4']} (by class) and {gain['digits', 'w4a4']} dB "
        f"(unconditional) of noise SNR at W4A4, {gain['digits-class', 'w4a8']} and {gain['digits', 'w4a8']} dB at W4A8"
    ) in text


def test_digits_of_the_examples(repository: Path) -> None:
    models = results(repository, "families")["models"]
    psnr = {
        recipe: [
            mean(models[model][recipe]["rows"], "quest", "psnr_db") for model in ("digits-class", "digits")
        ]
        for recipe in ("w4a8", "w4a4")
    }
    text = " ".join((repository / "examples" / "README.md").read_text(encoding="utf-8").split())
    said = ", ".join(f"{' and '.join(pair)} dB at {recipe.upper()}" for recipe, pair in psnr.items())
    assert f"image PSNR {said}" in text

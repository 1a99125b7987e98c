"""The page: self-contained, escaped, readable in both themes."""

from __future__ import annotations

import copy
import re
import xml.etree.ElementTree as ET
from typing import Any

import pytest

from quest_deploy.analyze import figures
from quest_deploy.analyze.page import number, render


@pytest.fixture(scope="module")
def page(document: dict[str, Any]) -> str:
    return render(document)


def test_page_loads_nothing_from_elsewhere(page: str) -> None:
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("#", "data:")) for source in sources)
    assert "@import" not in page


def test_every_plot_is_well_formed_svg(page: str) -> None:
    plots = re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)
    assert len(plots) >= 8
    for svg in plots:
        ET.fromstring(svg)


def test_plots_follow_the_theme(page: str) -> None:
    stand_ins = [color for color in figures.VARIABLES if color in page]
    assert stand_ins == []
    assert "var(--c1)" in page
    assert "#000000" not in re.sub(r"data:[^\"]*", "", page)


def test_names_are_escaped(document: dict[str, Any], quick_plots: None) -> None:
    changed = copy.deepcopy(document)
    changed["model"]["path"] = "<script>alert(1)</script>"
    assert "<script>" not in render(changed)


def test_page_without_a_checkpoint(document: dict[str, Any], quick_plots: None) -> None:
    changed = copy.deepcopy(document)
    changed["checkpoint"] = changed["activations"]["after"] = changed["histograms"]["after"] = None
    changed["temporal"]["checkpoint"] = changed["network"]["checkpoint"] = None
    page = render(changed)
    assert "after finetuning" not in page.lower().replace("before finetuning means", "")


def test_page_of_a_model_without_time(document: dict[str, Any], quick_plots: None) -> None:
    changed = copy.deepcopy(document)
    changed["temporal"]["embedding"] = None
    assert "Which time is it" not in render(changed)


def test_page_of_weights_alone(document: dict[str, Any], quick_plots: None) -> None:
    changed = copy.deepcopy(document)
    changed["sensitivity"]["bits"] = ["w4"]
    for layer in changed["sensitivity"]["layers"]:
        layer["damage"] = {"w4": layer["damage"]["w4"]}
    changed["network"]["predicted_snr_db"] = None
    assert "Most sensitive at W4" in render(changed)


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0"), (0.001234, "1.2e-03"), (12.3456, "12.35")]
)
def test_numbers_are_readable(value: float | None, text: str) -> None:
    assert number(value) == text


def test_timesteps_of_continuous_schedules_are_short() -> None:
    shown = {"distance": [[0.1, 0.2], [0.2, 0.1]], "nearest": [0, 1], "mistaken": 0.0}
    figure = figures.confusion_maps({"start": {"confusion": shown}, "checkpoint": None}, [877.909, 0.0271849])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["878", "0.0272"]


def test_plots_of_a_single_layer_show_it_and_their_labels() -> None:
    before = {"channel_imbalance": 8.0, "timestep_imbalance": 2.0, "kurtosis": 3.0}
    for axes in figures.imbalance_scatter({"conv": before}, None).axes:
        assert axes.lines[0].get_marker() == "o"
    series = {"by_timestep": {"min": [-1.0, -2.0], "max": [1.0, 2.0]}}
    figure = figures.range_by_timestep({"conv": series}, [900.0, 1.0], ["conv"])
    figure.draw_without_rendering()
    label = figure.axes[-1].yaxis.label.get_window_extent()
    assert figure.bbox.contains(*label.min) and figure.bbox.contains(*label.max)


def test_legends_lie_outside_of_what_is_plotted() -> None:
    layers = [{"name": "conv", "role": "other", "damage": {"w4": {"snr_db": 20.0}}}]
    sensitivity = {"bits": ["w4"], "layers": layers}
    for figure in (
        figures.sensitivity_by_depth(sensitivity, ["conv"]),
        figures.sensitivity_bars(sensitivity, "w4"),
    ):
        assert figure.legends and figure.axes[0].get_legend() is None


def test_before_and_after_are_one_statistic(document: dict[str, Any], quick_plots: None) -> None:
    changed = copy.deepcopy(document)
    start = changed["network"]["start"] = {**changed["network"]["start"], "step_snr_db": 9.8, "snr_db": 10.2}
    changed["network"]["checkpoint"] = start
    lead = re.search(r'class="lead">(.*?)</p>', render(changed), flags=re.DOTALL)
    assert lead is not None
    before, after = re.findall(r"([\d.]+) dB", lead[1])
    assert before == after == f"{start['step_snr_db']:.1f}"


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        ("w4", "Layers whose weight alone is quantized to 4 bits."),
        ("a8", "Layers whose input alone is quantized to 8 bits."),
        ("w8a4", "Layers whose weight is quantized to 8 bits and whose input is quantized to 4 bits."),
    ],
)
def test_what_was_quantized_is_told(
    document: dict[str, Any], quick_plots: None, bits: str, words: str
) -> None:
    changed = copy.deepcopy(document)
    changed["sensitivity"]["bits"] = [bits]
    for layer in changed["sensitivity"]["layers"]:
        layer["damage"] = {bits: layer["damage"]["w4"]}
    page = render(changed)
    assert words in page
    chosen = "where their input alone is quantized to 8" if bits == "a8" else "whose ranges change most with"
    assert f"Inputs of the layers {'that suffer most ' if bits == 'a8' else ''}{chosen}" in page

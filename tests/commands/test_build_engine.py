"""Options of `build-engine`, before anything is built."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from quest_deploy.commands import main
from quest_deploy.commands.build_engine import parse_profile
from quest_deploy.config import ProfileConfig, ShapeRange


def test_a_profile_has_ranges_or_single_sizes() -> None:
    assert parse_profile("batch=1:2:4,height=768,sequence=77:77:154") == ProfileConfig(
        batch=ShapeRange(min=1, opt=2, max=4),
        height=ShapeRange(min=768, opt=768, max=768),
        sequence=ShapeRange(min=77, opt=77, max=154),
    )


@pytest.mark.parametrize(
    "text",
    ["", "batch", "batch=1:2", "depth=3", "batch=a", "batch=1,batch=2", "batch=-1", "batch=" + "9" * 5000],
)
def test_a_profile_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(
        click.UsageError, match="expected each of batch, height, width, sequence at most once"
    ):
        parse_profile(text)


def said(folder: Path, *options: str) -> str:
    """Standard error of a command whose ONNX directory is missing, so that nothing is built."""
    return (
        CliRunner()
        .invoke(main, ["build-engine", str(folder / "none"), "-o", str(folder / "out"), *options])
        .stderr
    )


@pytest.mark.parametrize("size", ["2147483648", "9" * 4000], ids=["33 bits", "many digits"])
@pytest.mark.parametrize("option", ["--max-batch", "--opt-width", "--profile"])
def test_sizes_that_tensorrt_cannot_count_are_refused(option: str, size: str, tmp_path: Path) -> None:
    if option == "--profile":
        size = f"batch={size[:10]}"
    message = said(tmp_path, option, size)
    assert f"{option}" in message and "expected sizes of at most 2147483647" in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("options", "ignored"),
    [
        (["--max-batch", "4"], "--max-batch 4"),
        (["--min-height", "64", "--opt-height", "96", "--max-height", "96"], "--min-height 64"),
        (["--profile", "batch=1:2:2"], "the bounds of --profile batch=1:2:2"),
        (["--profile", "batch=2", "--opt-batch", "4", "--max-batch", "4"], None),
        ([], None),
    ],
    ids=["batch", "height", "profile", "optima alone", "nothing"],
)
def test_static_names_what_it_ignores(options: list[str], ignored: str | None, tmp_path: Path) -> None:
    lines = [line for line in said(tmp_path, "--static", *options).splitlines() if "ignored" in line]
    assert len(lines) == (ignored is not None)
    assert ignored is None or lines[0].endswith(f"ignored: {ignored}")
    assert "ignored" not in said(tmp_path, *options)


@pytest.mark.parametrize(
    ("options", "source"),
    [
        (["--min-batch", "5", "--max-batch", "4"], "--min-batch, --opt-batch, --max-batch"),
        (["--opt-width", "64", "--max-width", "32"], "--min-width, --opt-width, --max-width"),
        (["--profile", "height=8:4:8"], "--profile: height"),
    ],
    ids=["batch", "width", "profile"],
)
def test_a_range_that_does_not_rise_is_told_by_its_options(
    options: list[str], source: str, tmp_path: Path
) -> None:
    assert said(tmp_path, *options).startswith(f"Error: {source}: shape range ")

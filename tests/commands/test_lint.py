"""Exit codes, JSON and tables of `quest-deploy lint`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.cells import cell_len
from rich.text import Text

from quest_deploy.commands import main
from quest_deploy.commands.lint import render
from quest_deploy.export.lint import lint as run_lint
from tests.export.lint.patterns import PATTERNS


def run(folder: Path, pattern: str, *options: str) -> Result:
    path = folder / "model.onnx"
    path.write_bytes(PATTERNS[pattern]().SerializeToString())
    return CliRunner().invoke(main, ["lint", str(path), *options])


@pytest.mark.parametrize(
    ("pattern", "target", "code"),
    [
        ("conv_w8a8", "tensorrt-rtx", 0),
        ("matmul_w8_only", "tensorrt-rtx", 0),
        ("conv_w4a8", "tensorrt-rtx", 3),
        ("conv_w8_uint8_zero", "tensorrt-rtx", 3),
        ("conv_w8_uint8_zero", "onnxruntime", 0),
    ],
)
def test_exit_code(tmp_path: Path, pattern: str, target: str, code: int) -> None:
    assert run(tmp_path, pattern, "--target", target).exit_code == code


def test_bad_input_is_exit_code_1(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["lint", str(tmp_path)])
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("Error: ")


@pytest.mark.parametrize(
    "value", ["height", "height=", "height=big", "=4", "batch=0", "batch=99999999999999999999"]
)
def test_a_bad_dimension_is_a_usage_error(tmp_path: Path, value: str) -> None:
    assert run(tmp_path, "conv_w8a8", "--dim", value).exit_code == 2


def test_a_dimension_that_no_graph_has_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "conv_w8a8", "--dim", "heigth=4", "--dim", "batch=2")
    assert done.exit_code == 1
    assert done.stderr == "Error: dimensions: got heigth, batch, expected none: every size is fixed\n"


def test_json_is_one_object(tmp_path: Path) -> None:
    data = json.loads(run(tmp_path, "matmul_w4_block64_a8", "--json").stdout)
    assert data["ok"] is False
    assert data["breaks"] is True
    assert data["layers"][0]["operands"] == ["int8", "int4/64"]
    assert data["layers"][0]["reasons"] == ["block-scale-of-weight"]
    assert data["summary"]["share_of_macs"]["breaks"] == 1


def test_table_names_layer_and_reason(tmp_path: Path) -> None:
    text = run(tmp_path, "conv_w8_only").output
    assert "conv_1" in text
    assert "the activation is not quantized" in " ".join(text.split())
    assert "float 100.0%" in text


def test_products_in_int8_are_listed_on_request(tmp_path: Path) -> None:
    assert "conv_3" not in run(tmp_path, "conv_w8a8").output
    assert "conv_3" in run(tmp_path, "conv_w8a8", "--all").output


def with_a_long_name(folder: Path) -> tuple[Path, str]:
    model = PATTERNS["conv_w8a8"]()
    (node,) = [node for node in model.graph.node if node.op_type == "Conv"]
    node.name = "/".join(f"block_{index}" for index in range(40))
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path, node.name


def test_a_row_is_one_whole_line_where_output_is_no_terminal(tmp_path: Path) -> None:
    path, name = with_a_long_name(tmp_path)
    lines = CliRunner().invoke(main, ["lint", str(path), "--all"]).stdout.splitlines()
    (line,) = [line for line in lines if name in line]
    assert "int8" in line
    assert not any(line.endswith(" ") for line in lines)


def test_a_row_is_as_wide_as_the_terminal_and_cuts_no_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = with_a_long_name(tmp_path)
    monkeypatch.setenv("COLUMNS", "90")
    lines = render(run_lint(path), show_all=True, terminal=True).splitlines()
    assert all(cell_len(Text.from_ansi(line).plain) <= 90 for line in lines)
    assert "…" not in "".join(lines)
    assert "block_39" in "".join(lines)


def test_whether_standard_output_is_a_terminal_decides_and_not_standard_error(tmp_path: Path) -> None:
    """Rows were as wide as the terminal that logs went to."""
    path, name = with_a_long_name(tmp_path)
    leader, follower = os.openpty()
    try:
        command = [sys.executable, "-m", "quest_deploy.commands", "lint", str(path), "--all"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=follower, check=True, text=True)
    finally:
        os.close(leader)
        os.close(follower)
    assert name in done.stdout

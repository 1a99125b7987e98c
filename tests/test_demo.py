"""The demo: which commands it runs, and what it adds when it is run again. (That they work is `make demo`.)"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import click
import pytest

from quest_deploy.commands import main


@pytest.fixture(scope="module")
def demo(repository: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", repository / "scripts" / "demo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["demo"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_every_stage_is_a_valid_call_of_the_command(demo: ModuleType, tmp_path: Path) -> None:
    for stage in demo.stages(tmp_path, "w4a8"):
        verb, *arguments = stage.arguments
        command = main.get_command(click.Context(main), verb)
        assert command is not None
        command.make_context(
            verb, arguments
        )  # parses; raises click.UsageError for an option that does not exist


def test_stages_make_what_the_next_ones_read(demo: ModuleType, tmp_path: Path) -> None:
    made = {str(demo.MODEL)}
    for stage in demo.stages(tmp_path, "w4a8"):
        read = {word for word in stage.arguments[1:] if word.startswith(str(tmp_path))} - {str(stage.output)}
        assert read <= made
        made.add(str(stage.output))


def test_first_run_overwrites_nothing(demo: ModuleType, tmp_path: Path) -> None:
    assert {flag for stage in demo.stages(tmp_path, "w4a8") for flag in demo.flags(stage)} == {"--resume"}


def test_second_run_replaces_finished_outputs(demo: ModuleType, tmp_path: Path) -> None:
    _, stage, *_ = demo.stages(tmp_path, "w4a8")
    stage.output.mkdir()
    (stage.output / "manifest.json").write_text("{}")
    assert demo.flags(stage) == ("--overwrite",)


def test_summary_tells_nothing_of_an_earlier_run(demo: ModuleType, tmp_path: Path) -> None:
    report = {"rungs": [{"name": "onnx", "against_reference": {"image_psnr_db": {"mean": 27.0}}}]}
    planned = demo.stages(tmp_path, "w4a4")
    for stage in planned:
        stage.output.mkdir()
    (tmp_path / "parity" / "report.json").write_text(json.dumps(report))

    def summary(**codes: int) -> dict:
        done = [
            demo.Outcome(stage=name, command="", exit_code=code, seconds=1.0, peak_memory_bytes=1)
            for name, code in codes.items()
        ]
        return demo.summarize(tmp_path, "w4a4", done, planned)

    stopped = summary(finetune=0, generate=1)
    assert stopped["size_bytes"].keys() == {"model", "checkpoint"} and stopped["image_psnr_db"] == {}
    assert summary(parity=demo.OVER_BUDGET)["image_psnr_db"] == {"onnx": 27.0}


MEASURE_TWO_STAGES = """
import pathlib, sys
sys.path.insert(0, sys.argv[1])
import demo
sys.executable = sys.argv[2] + "/python"
for size in (200_000_000, 1):
    stage = demo.Stage(name="x", arguments=(str(size),), output=pathlib.Path(sys.argv[2]) / "x")
    print(demo.run(stage).peak_memory_bytes)
"""


def test_peak_memory_is_that_of_the_stage_alone(repository: Path, tmp_path: Path) -> None:
    """In a small process, as the demo is: Linux counts the parent's pages until the child has started its program."""
    command = tmp_path / "quest-deploy"
    command.write_text(f"#!{sys.executable}\nimport sys\nx = bytearray(int(sys.argv[1]))\n")
    command.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_TWO_STAGES, str(repository / "scripts"), str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    large, small = map(int, done.stdout.split())
    assert large > small + 150_000_000


def test_sizes_are_summed_per_component(demo: ModuleType, tmp_path: Path) -> None:
    for name, size in (("unet/a", 3), ("unet/b/c", 4), ("manifest.json", 5)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert demo.sizes(tmp_path) == {"total": 12, "unet": 7}

"""What may go wrong around a build: damaged files by the thousand, full disks, killed and racing processes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import BuildConfig
from quest_deploy.engines import load_engines
from quest_deploy.engines.trt_build import build_engine
from quest_deploy.errors import ArtifactError, ConfigError, QuestDeployError
from tests.commands.test_storage import COMMAND, run_verb

FLIPS = 500
DAMAGED_GRAPHS = 12


def test_of_two_builds_into_one_directory_one_is_told_to_wait(tiny_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    together = threading.Barrier(2)

    def build(_: int) -> str:
        together.wait()
        try:
            build_engine(tiny_onnx, tmp_path / "engines", BuildConfig())
        except ConfigError as error:
            return str(error)
        return "built"

    with ThreadPoolExecutor(2) as pool:
        built, refused = sorted(pool.map(build, range(2)), key=lambda said: said != "built")
    assert built == "built"
    assert "another build-engine" in refused
    assert "wait until it has ended, or give another directory" in refused
    assert read_artifact(tmp_path / "engines", stage="engines")
    assert [path.name for path in tmp_path.iterdir()] == ["engines"]


@pytest.fixture(scope="module", params=["onnx", "engines"])
def artifact(
    request: pytest.FixtureRequest, tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("faults") / request.param
    if request.param == "onnx":
        shutil.copytree(tiny_onnx, folder)
    else:
        pytest.importorskip("tensorrt_rtx")
        build_engine(tiny_onnx, folder, BuildConfig())
    return folder


def heavy_files(artifact: Path) -> list[Path]:
    return sorted(path for path in artifact.rglob("model.*") if path.is_file())


def test_every_flipped_bit_is_refused(artifact: Path) -> None:
    chance = random.Random(0)
    for _ in range(FLIPS):
        file = chance.choice(heavy_files(artifact))
        whole = file.read_bytes()
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=f"{file.parent.name}/{file.name} has changed"):
            load_engines(artifact)
        file.write_bytes(whole)
    assert read_artifact(artifact)


def test_every_truncated_file_is_refused(artifact: Path) -> None:
    chance = random.Random(1)
    for file in heavy_files(artifact):
        whole = file.read_bytes()
        for length in (0, 1, chance.randrange(2, len(whole) - 1), len(whole) - 1):
            file.write_bytes(whole[:length])
            with pytest.raises(ArtifactError, match=f"{file.parent.name}/{file.name} is (truncated|empty)"):
                load_engines(artifact)
        file.write_bytes(whole)
    assert read_artifact(artifact)


def test_disk_that_fills_up_while_an_engine_is_written(tiny_onnx: Path, tmp_path: Path) -> None:
    """Full for real, on a tmpfs that has room for the first engine and not for the second."""
    pytest.importorskip("tensorrt_rtx")
    done = run_verb("size=600k", tmp_path / "mount", ["build-engine", str(tiny_onnx)])
    assert (done.returncode, done.stdout) == (1, "")
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"Error: cannot use '{tmp_path / 'mount'}") and "the disk is full" in last


@pytest.fixture
def building(tiny_onnx: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process of its own that is building into tmp_path/engines."""
    pytest.importorskip("tensorrt_rtx")
    process = start(tiny_onnx, tmp_path / "engines")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".engines.partial-*/*/model.plan")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    yield process
    process.kill()
    process.communicate()


def start(onnx_dir: Path, output: Path) -> subprocess.Popen[str]:
    words = [*COMMAND, "build-engine", str(onnx_dir), "-o", str(output), "--json"]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_build_leaves_nothing_that_looks_finished_and_the_next_one_works(
    building: subprocess.Popen[str], tiny_onnx: Path, tmp_path: Path
) -> None:
    building.kill()
    building.communicate()
    assert not (tmp_path / "engines").exists()
    for partial in tmp_path.glob(".engines.partial-*"):
        assert not (partial / "manifest.json").exists()
    artifact = build_engine(tiny_onnx, tmp_path / "engines", BuildConfig())
    assert read_artifact(artifact.path, verify=True)
    assert os.listdir(tmp_path) == ["engines"]


def test_killed_rebuild_leaves_the_engines_that_were_there(tiny_onnx: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    before = build_engine(tiny_onnx, tmp_path / "engines", BuildConfig(optimization_level=0))
    words = [*COMMAND, "build-engine", str(tiny_onnx), "-o", str(tmp_path / "engines"), "--overwrite"]
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".engines.partial-*/*/model.plan")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert read_artifact(tmp_path / "engines", verify=True).digest == before.digest


def test_second_process_that_builds_into_one_directory_is_told_to_wait(
    building: subprocess.Popen[str], tiny_onnx: Path, tmp_path: Path
) -> None:
    building.send_signal(signal.SIGSTOP)
    second = start(tiny_onnx, tmp_path / "engines")
    printed, _ = second.communicate(timeout=60)
    assert second.returncode == 1
    message = json.loads(printed)["error"]["message"]
    assert f"another build-engine (process {building.pid}) is writing '{tmp_path / 'engines'}'" in message
    building.send_signal(signal.SIGCONT)
    building.communicate(timeout=60)
    assert building.returncode == 0
    assert read_artifact(tmp_path / "engines", verify=True)
    assert os.listdir(tmp_path) == ["engines"]


def test_damaged_graphs_of_another_tool_build_or_end_in_an_error_of_ours(
    tiny_onnx: Path, tmp_path: Path
) -> None:
    """Nobody vouches for such files by hashes: TensorRT's own parser sees some of them."""
    pytest.importorskip("tensorrt_rtx")
    chance = random.Random(2)
    for number in range(DAMAGED_GRAPHS):
        source = shutil.copytree(tiny_onnx, tmp_path / f"onnx-{number}")
        (source / "manifest.json").unlink()
        (source / "quest.json").unlink()
        file = source / "unet" / "model.onnx"
        whole = bytearray(file.read_bytes())
        if number % 2:
            whole[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        else:
            del whole[chance.randrange(len(whole)) :]
        file.write_bytes(whole)
        output = tmp_path / f"engines-{number}"
        with contextlib.suppress(QuestDeployError):  # any other exception, a crash too, fails this test
            build_engine(source, output, BuildConfig())
        assert not output.exists() or read_artifact(output, verify=True)

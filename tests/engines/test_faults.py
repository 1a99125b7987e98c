"""A thousand damaged graphs and engines: every one is refused before a runtime sees it."""

from __future__ import annotations

import random
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import BuildConfig
from quest_deploy.engines import load_engines
from quest_deploy.engines.trt_build import build_engine
from quest_deploy.errors import ArtifactError, ConfigError

FLIPS = 500


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

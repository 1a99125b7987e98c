"""A thousand damaged graphs and engines: every one is refused before a runtime sees it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from quest_deploy.artifacts import read_artifact
from quest_deploy.config import BuildConfig
from quest_deploy.engines import load_engines
from quest_deploy.engines.trt_build import build_engine
from quest_deploy.errors import ArtifactError

FLIPS = 500


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

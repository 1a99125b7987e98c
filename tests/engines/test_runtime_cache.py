from __future__ import annotations

import os
from pathlib import Path

import pytest

from quest_deploy.artifacts import read_artifact, write_artifact
from quest_deploy.engines.runtime_cache import RuntimeCacheFile
from quest_deploy.engines.trt_plan import LoadedPlan
from quest_deploy.engines.trt_runtime import TensorRTEngine
from tests.engines.simulated_trt import (
    SPEC,
    SimulatedConfig,
    SimulatedEngine,
    make_memory,
    run,
    simulate_cuda,
    simulated_library,
)

PLAN = "ab" * 32


def opened(folder: Path, plan: str = PLAN) -> tuple[RuntimeCacheFile, SimulatedConfig]:
    config = SimulatedConfig()
    return RuntimeCacheFile(config, folder, plan), config


def test_kernels_come_back_in_the_next_process(tmp_path: Path) -> None:
    opened(tmp_path)[0].save()
    _, config = opened(tmp_path)
    assert config.used is config.cache and config.cache.taken == b"kernels"


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other plan"])
def test_damaged_cache_is_not_shown_to_the_library_and_is_replaced(tmp_path: Path, damage: str) -> None:
    opened(tmp_path, "cd" * 32 if damage == "other plan" else PLAN)[0].save()
    path = tmp_path / ".runtime-cache"
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    path.write_bytes({"cut": content[:-1], "empty": b""}.get(damage, content))
    file, config = opened(tmp_path)
    assert config.cache.taken is None
    file.save()
    assert opened(tmp_path)[1].cache.taken == b"kernels"


def test_unchanged_cache_is_not_written_again(tmp_path: Path) -> None:
    opened(tmp_path)[0].save()
    before = (tmp_path / ".runtime-cache").stat().st_ino
    opened(tmp_path)[0].save()
    assert (tmp_path / ".runtime-cache").stat().st_ino == before


def test_directory_that_cannot_be_written_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    opened(tmp_path)[0].save()
    assert os.listdir(tmp_path) == []


def test_a_cache_that_the_library_does_not_give_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, config = opened(tmp_path)
    monkeypatch.setattr(config.cache, "serialize", lambda: None)
    file.save()
    assert os.listdir(tmp_path) == []


def test_cache_is_saved_when_the_plan_is_closed_and_is_no_part_of_the_artifact(tmp_path: Path) -> None:
    def write(*, overwrite: bool = False) -> None:
        with write_artifact(
            tmp_path / "engines", stage="engines", config={"backend": "tensorrt-rtx"}, overwrite=overwrite
        ) as writer:
            (writer.path / "unet").mkdir()
            (writer.path / "unet" / "model.plan").write_bytes(b"plan")

    write()
    cuda, library = SimulatedEngine(), simulated_library(lambda log, plan: None)
    plan = LoadedPlan(SPEC.name, library, cuda)
    plan.compile_at_run_time(library, tmp_path / "engines" / "unet", PLAN)
    plan.create_context()
    plan.close()
    assert (tmp_path / "engines" / "unet" / ".runtime-cache").is_file()
    (tmp_path / "engines" / "unet" / ".runtime-cache-0badcafe").touch()  # of a process that was killed
    assert read_artifact(tmp_path / "engines").manifest.files.keys() == {"unet/model.plan"}
    write(overwrite=True)
    assert os.listdir(tmp_path / "engines" / "unet") == ["model.plan"]


def test_kernels_of_new_shapes_are_written_when_they_have_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service is killed, or runs for months: it does not come to close its engines."""
    simulate_cuda(monkeypatch)
    cuda, library = SimulatedEngine(), simulated_library(lambda log, plan: None)
    plan = LoadedPlan(SPEC.name, library, cuda)
    plan.compile_at_run_time(library, tmp_path, PLAN)
    engine = TensorRTEngine(SPEC, plan, make_memory())
    assert os.listdir(tmp_path) == []
    run(engine, 1)
    assert opened(tmp_path)[0].loaded == b"kernels"
    cuda.config.cache.content = b"kernels, and more"
    run(engine, 1, 1)
    assert opened(tmp_path)[0].loaded == b"kernels"
    run(engine, 2)
    assert opened(tmp_path)[0].loaded == b"kernels, and more"


def test_contexts_get_user_memory_and_kernels_that_stay() -> None:
    cuda, library = SimulatedEngine(), simulated_library(lambda log, plan: None)
    plan = LoadedPlan(SPEC.name, library, cuda)
    plan.create_context()
    plan.compile_at_run_time(library, Path("nowhere"), PLAN)
    plan.create_context()
    assert cuda.made_with == ["user", cuda.config]
    assert cuda.config.strategy == "user"
    assert cuda.config.dynamic_shapes_kernel_specialization_strategy == "eager"

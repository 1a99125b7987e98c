from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from quest_deploy.config import BuildConfig
from quest_deploy.engines.timing_cache import check_timing_cache, load_timing_cache, save_timing_cache
from quest_deploy.engines.trt_build import build_engine, make_job
from quest_deploy.errors import ConfigError


class Cache:
    """A timing cache whose content is a set of words; another device's starts with '!'."""

    def __init__(self, content: bytes) -> None:
        self.words = set(content.decode().split())

    def combine(self, other: Cache, ignore_mismatch: bool) -> bool:
        if "!" in other.words and not ignore_mismatch:
            return False
        self.words |= other.words
        return True

    def serialize(self) -> bytes:
        return " ".join(sorted(self.words)).encode()


class Config:
    """The part of IBuilderConfig that deals with timing caches."""

    def __init__(self, content: bytes = b"") -> None:
        self.cache = Cache(content)

    def create_timing_cache(self, content: bytes) -> Cache | None:
        return None if content.startswith(b"corrupt") else Cache(content)

    def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
        if "!" in cache.words and not ignore_mismatch:
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> Cache:
        return self.cache


def test_saved_timings_are_loaded_by_the_next_build(tmp_path: Path) -> None:
    save_timing_cache(Config(b"conv gemm"), tmp_path / "cache")
    config = Config()
    assert load_timing_cache(config, tmp_path / "cache")
    assert config.cache.words == {"conv", "gemm"}


def test_timings_of_another_process_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    save_timing_cache(Config(b"conv"), path)
    save_timing_cache(Config(b"gemm"), path)
    assert Cache(path.read_bytes()).words == {"conv", "gemm"}


def test_missing_file_gives_an_empty_cache_without_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config(b"old")
    assert not load_timing_cache(config, tmp_path / "cache")
    assert config.cache.words == set()
    assert not caplog.records


@pytest.mark.parametrize("content", [b"corrupt bytes", b"! conv"], ids=["corrupt", "other device"])
def test_unusable_file_is_warned_about_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    path = tmp_path / "cache"
    path.write_bytes(content)
    config = Config()
    with caplog.at_level(logging.WARNING):
        assert not load_timing_cache(config, path)
    assert "cannot use" in caplog.text
    config.cache.words.add("new")
    save_timing_cache(config, path)
    assert path.read_bytes() == b"new"


def test_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    save_timing_cache(Config(b"conv"), path)

    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        save_timing_cache(Config(b"gemm"), path)
    monkeypatch.undo()
    assert path.read_bytes() == b"conv"
    assert sorted(item.name for item in tmp_path.iterdir()) == ["cache", "cache.lock"]


def test_a_file_that_can_be_written_or_does_not_exist_yet_is_taken(tmp_path: Path) -> None:
    (tmp_path / "cache").write_bytes(b"conv")
    check_timing_cache(tmp_path / "cache")
    check_timing_cache(tmp_path / "new" / "cache")


@pytest.mark.parametrize(
    ("name", "words"),
    [("file/cache", "a part of the path is a file"), ("folder", "is a directory, expected a file")],
)
def test_a_place_without_room_for_a_file_is_refused_before_building(
    tmp_path: Path, name: str, words: str
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    config = BuildConfig(backend="tensorrt", timing_cache=str(tmp_path / name))
    with pytest.raises(ConfigError, match=f"--timing-cache: .*{words}.*; choose another path"):
        make_job(tmp_path, tmp_path, {}, config)


@pytest.mark.parametrize("name", ["onnx/cache", "engines/deep/cache", "engines"])
def test_a_place_whose_files_have_digests_is_refused_before_anything_else(tmp_path: Path, name: str) -> None:
    config = BuildConfig(backend="tensorrt", timing_cache=str(tmp_path / name))
    with pytest.raises(
        ConfigError, match="lies in '.*', whose files no build may change; choose a path outside"
    ):
        build_engine(tmp_path / "onnx", tmp_path / "engines", config)
    assert list(tmp_path.iterdir()) == []


SAVE = """
import sys
from pathlib import Path
from quest_deploy.engines.timing_cache import save_timing_cache
from tests.engines.test_timing_cache import Config

for number in range(int(sys.argv[3])):
    save_timing_cache(Config(f"{sys.argv[2]}-{number}".encode()), Path(sys.argv[1]))
"""


def saving(path: Path, name: str, times: int) -> subprocess.Popen[bytes]:
    """A process that adds timings of its own to the cache again and again."""
    return subprocess.Popen([sys.executable, "-c", SAVE, str(path), name, str(times)])


def test_processes_that_save_at_the_same_time_lose_no_timings(tmp_path: Path) -> None:
    path, names, times = tmp_path / "cache", ("a", "b", "c"), 40
    processes = [saving(path, name, times) for name in names]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0]
    words = {f"{name}-{number}" for name in names for number in range(times)}
    assert Cache(path.read_bytes()).words == words


def test_killed_process_leaves_a_whole_file_and_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    process = saving(path, "killed", 100_000)
    while not path.exists():
        assert process.poll() is None
    process.kill()
    process.wait()
    assert all(word.startswith("killed-") for word in Cache(path.read_bytes()).words)
    save_timing_cache(Config(b"next"), path)
    assert "next" in Cache(path.read_bytes()).words

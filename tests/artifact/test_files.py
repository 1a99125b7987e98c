"""Hashes and JSON that artifacts are made of."""

from __future__ import annotations

import errno
import os
import pwd
import subprocess
import time
from pathlib import Path

import pytest

from quest_deploy import files
from quest_deploy.artifacts import read_artifact
from quest_deploy.errors import ArtifactError
from tests.artifact.conftest import make, names


def test_hash_file_is_sha256(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"abc" * (1 << 19))
    expected = subprocess.run(
        ["sha256sum", tmp_path / "x"], capture_output=True, text=True, check=True
    ).stdout.split()[0]
    assert files.hash_file(tmp_path / "x") == expected


def test_hash_directory_sees_names_and_contents_and_follows_links(tmp_path: Path) -> None:
    digests = []
    for name, file, content in [("a", "x", "1"), ("b", "x", "1"), ("c", "y", "1"), ("d", "x", "2")]:
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
        digests.append(files.hash_directory(tmp_path / name))
    (tmp_path / "e").mkdir()
    (tmp_path / "e" / "x").symlink_to(tmp_path / "a" / "x")
    assert digests[0] == digests[1] == files.hash_directory(tmp_path / "e")
    assert len(set(digests)) == 3


def test_unchanged_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a")
    age(path)
    read_artifact(path)
    monkeypatch.setattr(files, "hash_file", lambda path: pytest.fail(f"hashed {path} again"))
    read_artifact(path)


def test_verify_hashes_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(tmp_path / "a")
    age(path)
    read_artifact(path)
    monkeypatch.setattr(files, "hash_file", lambda path: "0" * 64)
    read_artifact(path)
    with pytest.raises(ArtifactError, match="has changed"):
        read_artifact(path, verify=True)


def test_change_right_after_a_read_is_seen(tmp_path: Path) -> None:
    """The mtime of a young file may not tell two changes apart, so its digest is not remembered."""
    path = make(tmp_path / "a")
    file = path / "unet" / "model.onnx"
    before = file.stat()
    read_artifact(path)
    file.write_text("veights")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(ArtifactError, match="has changed"):
        read_artifact(path)


def test_digest_of_a_young_file_is_not_remembered(tmp_path: Path, cache_home: Path) -> None:
    read_artifact(make(tmp_path / "a"))
    assert names(cache_home) == []


@pytest.mark.parametrize("content", ["{", "[1]", '{"1:2:3:4:5": 7}', "\x00"])
def test_corrupt_digest_cache_is_ignored(tmp_path: Path, cache_home: Path, content: str) -> None:
    path = make(tmp_path / "a")
    (cache_home / "quest-deploy").mkdir()
    (cache_home / "quest-deploy" / "digests.json").write_text(content)
    read_artifact(path)


def test_unusable_cache_directory_is_ignored(tmp_path: Path, cache_home: Path) -> None:
    (cache_home / "quest-deploy").write_text("a file where the directory should be")
    path = make(tmp_path / "a")
    age(path)
    read_artifact(path)


def test_user_without_a_home_has_no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container's user may have neither HOME nor an entry in /etc/passwd."""

    def find_nobody(uid: int) -> pwd.struct_passwd:
        raise KeyError(uid)

    path = make(tmp_path / "a")
    age(path)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", find_nobody)
    monkeypatch.chdir(tmp_path)
    read_artifact(path)
    assert (files.digest_cache_path(), names(tmp_path)) == (None, ["a"])


def age(path: Path) -> None:
    """Make the files old enough for their digests to be remembered."""
    past = time.time() - 60
    for file in path.rglob("*"):
        os.utime(file, (past, past))


# JSON


def test_write_json_is_sorted_and_strict(tmp_path: Path) -> None:
    files.write_json(tmp_path / "x.json", {"b": float("inf"), "a": (1, Path("p"))})
    assert (tmp_path / "x.json").read_text() == '{\n  "a": [\n    1,\n    "p"\n  ],\n  "b": null\n}\n'
    assert names(tmp_path) == ["x.json"]


def test_write_json_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "x.json").write_text("old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArtifactError, match="the disk is full"):
        files.write_json(tmp_path / "x.json", {})
    assert names(tmp_path) == ["x.json"]
    assert (tmp_path / "x.json").read_text() == "old"


def test_hash_directory_follows_linked_directories_and_no_circles(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "weights").write_text("1")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "unet").symlink_to(tmp_path / "shared")
    (tmp_path / "model" / "circle").symlink_to(tmp_path / "model")
    assert files.list_files(tmp_path / "model", follow=True) == ["unet/weights"]
    before = files.hash_directory(tmp_path / "model")
    (tmp_path / "shared" / "weights").write_text("2")
    assert files.hash_directory(tmp_path / "model") != before


def test_a_copy_of_a_read_only_directory_can_be_deleted(tmp_path: Path) -> None:
    (tmp_path / "source" / "inner").mkdir(parents=True)
    (tmp_path / "source" / "inner" / "file").write_text("x")
    (tmp_path / "source" / "left").write_text("out")
    for path in (tmp_path / "source" / "inner" / "file", tmp_path / "source" / "inner", tmp_path / "source"):
        path.chmod(0o555)
    files.copy_tree(tmp_path / "source", tmp_path / "copy", lambda folder, names: {"left"} & set(names))
    assert files.list_files(tmp_path / "copy") == ["inner/file"]
    new = tmp_path / "new"
    new.mkdir()
    assert all((tmp_path / "copy" / name).stat().st_mode == new.stat().st_mode for name in ("", "inner"))


def test_text_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("mine")

    def refuse(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(ArtifactError, match="disk is full"):
        files.write_text(file, "new")
    assert file.read_text() == "mine" and [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]

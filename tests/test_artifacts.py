"""Each promise of quest_deploy.artifacts."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quest_deploy import files
from quest_deploy.artifacts import (
    MANIFEST_NAME,
    check_output,
    read_artifact,
    refuse_pickle,
    stage_of,
    write_artifact,
)
from quest_deploy.errors import ArtifactError, StaleArtifactError

CONFIG = {"target": "onnxruntime", "opset": 21}


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A digest cache of the test's own."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


def make(output: Path, *, stage: str = "onnx", text: str = "weights", overwrite: bool = False) -> Path:
    with write_artifact(output, stage=stage, config=CONFIG, overwrite=overwrite) as writer:
        (writer.path / "unet").mkdir()
        (writer.path / "unet" / "model.onnx").write_text(text)
        (writer.path / "model_index.json").write_text("{}")
    return output


def fail_inside(output: Path, error: BaseException) -> None:
    """Leave the body of write_artifact, half done, with `error`."""
    with write_artifact(output, stage="onnx", config=CONFIG, overwrite=True) as writer:
        (writer.path / "half").write_text("x")
        raise error


def link_inside(output: Path, target: Path) -> None:
    """Write an artifact with a symbolic link in it."""
    with write_artifact(output, stage="onnx", config=CONFIG) as writer:
        (writer.path / "x").symlink_to(target)


def edit_manifest(path: Path, **changes: object) -> None:
    manifest = json.loads((path / MANIFEST_NAME).read_text())
    manifest.update(changes)
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))


def names(path: Path) -> list[str]:
    return sorted(item.name for item in path.iterdir())


# Round trip


def test_read_gives_what_was_written(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "a", stage="onnx", config=CONFIG, inputs={"model": "ff"}) as writer:
        (writer.path / "x.bin").write_bytes(b"abc")
        writer.details["seconds"] = 1.5
    manifest = read_artifact(tmp_path / "a", stage="onnx").manifest
    assert (manifest.stage, manifest.config, manifest.inputs) == ("onnx", CONFIG, {"model": "ff"})
    assert manifest.details == {"seconds": 1.5}
    assert manifest.files["x.bin"].size_bytes == 3
    assert manifest.tools["python"].startswith("3.")


def test_digest_depends_on_content_and_not_on_place(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    other = make(tmp_path / "other", text="other weights")
    assert read_artifact(one).digest == read_artifact(two).digest != read_artifact(other).digest


def test_manifest_is_byte_identical_for_the_same_content(tmp_path: Path) -> None:
    one, two = make(tmp_path / "one"), make(tmp_path / "two")
    assert (one / MANIFEST_NAME).read_bytes() == (two / MANIFEST_NAME).read_bytes()


def test_directory_mode_follows_the_umask(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.mkdir()
    assert make(tmp_path / "a").stat().st_mode == plain.stat().st_mode


def test_missing_parents_are_made(tmp_path: Path) -> None:
    read_artifact(make(tmp_path / "x" / "y" / "a"))


def test_empty_output_directory_is_used(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    read_artifact(make(tmp_path / "a"))


def test_symbolic_link_as_output_keeps_the_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    make(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    read_artifact(tmp_path / "real")


# Damage is found, and named


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        pytest.param(lambda f: f.unlink(), r"unet/model.onnx is missing", id="missing"),
        pytest.param(lambda f: f.write_text("w"), r"truncated \(1 bytes, expected 7\)", id="truncated"),
        pytest.param(lambda f: f.write_text("weights!"), r"too long \(8 bytes, expected 7\)", id="longer"),
        pytest.param(
            lambda f: f.write_text("veights"), r"unet/model.onnx has changed \(sha256", id="bit-flip"
        ),
        pytest.param(lambda f: f.with_name("x").write_text(""), r"unet/x is not in the manifest", id="extra"),
    ],
)
def test_damage_is_named(tmp_path: Path, damage: object, message: str) -> None:
    path = make(tmp_path / "a")
    damage(path / "unet" / "model.onnx")  # type: ignore[operator]
    with pytest.raises(ArtifactError, match=message) as caught:
        read_artifact(path)
    assert "quest-deploy export" in str(caught.value)


def test_hidden_files_are_tolerated(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    (path / ".DS_Store").write_text("")
    read_artifact(path)


@pytest.mark.parametrize("content", ["", "{", '{"schema_version": 1', "[]", "null", "\x00\x01"])
def test_corrupt_manifest_is_refused(tmp_path: Path, content: str) -> None:
    path = make(tmp_path / "a")
    (path / MANIFEST_NAME).write_text(content)
    with pytest.raises(ArtifactError, match="manifest.json"):
        read_artifact(path)


def test_manifest_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    whole = (path / MANIFEST_NAME).read_bytes().rstrip()
    for length in range(0, len(whole), 7):
        (path / MANIFEST_NAME).write_bytes(whole[:length])
        with pytest.raises(ArtifactError):
            read_artifact(path)


def test_manifest_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    (path / MANIFEST_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ArtifactError, match="byte 0 of 3 is not UTF-8"):
        read_artifact(path)


def test_newer_schema_says_upgrade(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    edit_manifest(path, schema_version=2)
    with pytest.raises(StaleArtifactError, match="schema version 2, this quest-deploy reads 1; upgrade"):
        read_artifact(path)


@pytest.mark.parametrize("version", [0, "1", None, 1.5])
def test_wrong_schema_version_is_refused(tmp_path: Path, version: object) -> None:
    path = make(tmp_path / "a")
    edit_manifest(path, schema_version=version)
    with pytest.raises(ArtifactError, match="expected 1"):
        read_artifact(path)


@pytest.mark.parametrize("field", ["stage", "config", "details", "inputs", "tools", "files"])
def test_manifest_field_of_wrong_type_is_named(tmp_path: Path, field: str) -> None:
    path = make(tmp_path / "a")
    edit_manifest(path, **{field: 3})
    with pytest.raises(ArtifactError, match=f"'{field}' is 3"):
        read_artifact(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "unet/../../x", "a\\..\\b", "./x", "a//b"])
def test_manifest_names_outside_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    path = make(tmp_path / "a")
    edit_manifest(path, files={name: {"sha256": "0" * 64, "size_bytes": 1}})
    with pytest.raises(ArtifactError, match="expected a plain path inside the directory"):
        read_artifact(path)


def test_file_replaced_by_a_link_to_outside_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    outside = tmp_path / "outside"
    (path / "unet" / "model.onnx").rename(outside)
    (path / "unet" / "model.onnx").symlink_to(outside)
    with pytest.raises(ArtifactError, match="link to a place outside"):
        read_artifact(path)


def test_writing_a_symbolic_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("x")
    with pytest.raises(ArtifactError, match="symbolic link"):
        link_inside(tmp_path / "a", tmp_path / "target")
    assert names(tmp_path) == ["target"]


# What lies at a path


def test_wrong_stage_says_what_makes_the_right_one(tmp_path: Path) -> None:
    path = make(tmp_path / "a", stage="images")
    with pytest.raises(ArtifactError, match=r"stage 'images', expected stage 'onnx'.*quest-deploy export"):
        read_artifact(path, stage="onnx")


def test_diffusers_model_is_a_model(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    assert stage_of(tmp_path) == "model"
    with pytest.raises(ArtifactError, match=r"diffusers model, expected stage 'checkpoint'.*finetune"):
        read_artifact(tmp_path, stage="checkpoint")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        pytest.param(lambda p: None, "does not exist", id="missing"),
        pytest.param(lambda p: p.mkdir(), "neither a manifest.json", id="empty directory"),
        pytest.param(lambda p: p.write_text("x"), "is a file", id="file"),
    ],
)
def test_what_is_no_artifact_says_so(tmp_path: Path, prepare: object, message: str) -> None:
    path = tmp_path / "a"
    prepare(path)  # type: ignore[operator]
    for read in (stage_of, read_artifact):
        with pytest.raises(ArtifactError, match=message if read is stage_of else "manifest.json"):
            read(path)


@pytest.mark.parametrize("file", ["unet/model.onnx", "unet/model.plan", "quest.json"])
def test_artifact_that_lost_its_manifest_does_not_pass_for_a_model(tmp_path: Path, file: str) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("model_index.json", file):
        (tmp_path / name).write_text("{}")
    with pytest.raises(ArtifactError, match="has no manifest.json, only files that look like an artifact's"):
        stage_of(tmp_path)


@pytest.mark.parametrize("suffix", [".ckpt", ".pth", ".pt", ".bin", ".PT"])
def test_pickles_are_refused_with_a_conversion_hint(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"\x80\x02")
    with pytest.raises(ArtifactError, match=r"is a pickle.*convert.*save_file"):
        refuse_pickle(path)
    with pytest.raises(ArtifactError, match="is a pickle"):
        stage_of(path)


# Output that must not be replaced


def test_existing_artifact_needs_overwrite(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    with pytest.raises(ArtifactError, match="add --overwrite"):
        make(path, text="new")
    make(path, text="new", overwrite=True)
    assert (read_artifact(path).path / "unet" / "model.onnx").read_text() == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
def test_output_appears_by_renaming(tmp_path: Path, overwrite: bool) -> None:
    """A copy would be half there for a while, and would keep files of the older artifact."""
    if overwrite:
        make(tmp_path / "a")
    with write_artifact(tmp_path / "a", stage="onnx", config=CONFIG, overwrite=overwrite) as writer:
        (writer.path / "x").write_text("x")
        inode = writer.path.stat().st_ino
    assert (tmp_path / "a").stat().st_ino == inode
    assert names(tmp_path / "a") == ["manifest.json", "x"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_user_files_are_never_deleted(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("x")
    with pytest.raises(ArtifactError, match="is not empty and holds no artifact"):
        make(tmp_path / "a", overwrite=overwrite)
    assert names(tmp_path / "a") == ["thesis.tex"]


def test_overwrite_spares_a_file_that_the_user_added(tmp_path: Path) -> None:
    path = make(tmp_path / "a")
    (path / ".notes").write_text("mine")
    with pytest.raises(ArtifactError, match=r"also holds '.notes'"):
        make(path, overwrite=True)
    assert (path / ".notes").exists()


def test_artifact_of_another_stage_is_not_overwritten(tmp_path: Path) -> None:
    path = make(tmp_path / "a", stage="images")
    with pytest.raises(ArtifactError, match="stage 'images', this would be 'onnx'"):
        make(path, overwrite=True)


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        make(tmp_path / "a", overwrite=True)


@pytest.mark.parametrize("output", ["file/a", "file/x/a"])
def test_output_below_a_file_is_refused_before_the_body_runs(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match=r"file': a part of the path is a file, expected a directory"):
        check_output(tmp_path / output, stage="onnx")


def test_output_is_checked_before_the_body_runs(tmp_path: Path) -> None:
    make(tmp_path / "a")
    with pytest.raises(ArtifactError), write_artifact(tmp_path / "a", stage="onnx", config=CONFIG):
        pytest.fail("the body ran")


# Interrupted and failing writes


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, ArtifactError])
def test_whatever_ends_the_body_leaves_the_old_artifact_alone(
    tmp_path: Path, error: type[BaseException]
) -> None:
    path = make(tmp_path / "a", text="old")
    with pytest.raises(error):
        fail_inside(path, error())
    assert names(tmp_path) == ["a"]
    assert (read_artifact(path).path / "unet" / "model.onnx").read_text() == "old"


def test_failure_removes_the_parents_it_made(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        fail_inside(tmp_path / "x" / "y" / "a", RuntimeError())
    assert names(tmp_path) == []


def start_writer(output: Path) -> subprocess.Popen[str]:
    """A process inside the body of write_artifact that waits there."""
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom quest_deploy.artifacts import write_artifact\n"
        "with write_artifact(Path(sys.argv[1]), stage='onnx', config={}) as writer:\n"
        "    (writer.path / 'half').write_text('x')\n    print('inside', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(output)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    return process


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "a")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert names(tmp_path) == []


def test_kill_leaves_a_sibling_that_the_next_write_removes(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "a")
    process.kill()
    process.communicate(timeout=30)
    assert [name.startswith(".a.partial-") for name in names(tmp_path)] == [True]
    make(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_the_sibling_of_a_living_process_is_kept(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "a")
    try:
        make(tmp_path / "a")
        assert len(names(tmp_path)) == 2
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_killed_between_the_two_renames_gets_the_old_artifact_back(tmp_path: Path) -> None:
    make(tmp_path / "a", text="old")
    (tmp_path / "a").rename(tmp_path / ".a.replaced-0")
    with pytest.raises(RuntimeError):
        fail_inside(tmp_path / "a", RuntimeError())
    assert (read_artifact(tmp_path / "a").path / "unet" / "model.onnx").read_text() == "old"


# Storage that refuses

WRITE_TOO_MUCH = """
import sys
from pathlib import Path
from quest_deploy.artifacts import write_artifact
from quest_deploy.errors import ArtifactError
output = Path(sys.argv[1])
try:
    with write_artifact(output, stage="onnx", config={}) as writer:
        if sys.argv[2] == "python":
            (writer.path / "big").write_bytes(bytes(1 << 20))
        else:
            import numpy, safetensors.numpy
            safetensors.numpy.save_file({"w": numpy.zeros(1 << 20, "uint8")}, writer.path / "big.safetensors")
except ArtifactError as error:
    print(error)
print(sorted(p.name for p in output.parent.iterdir()) if output.parent.exists() else [])
"""


def run_in_mount(options: str, tmp_path: Path, writer: str) -> str:
    """Run WRITE_TOO_MUCH with its output on a tmpfs mounted in a mount namespace of its own (needs root)."""
    mount = tmp_path / "mount"
    mount.mkdir()
    script = f'mount -t tmpfs -o {options} none "$0" && exec "$1" -c "$2" "$0/a" "$3"'
    command = ["unshare", "--mount", "sh", "-c", script, str(mount), sys.executable, WRITE_TOO_MUCH, writer]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare (util-linux)")
    if "permitted" in done.stderr or "denied" in done.stderr:
        pytest.skip(f"may not mount here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("writer", ["python", "safetensors"])
def test_full_disk_is_named_and_nothing_is_left(tmp_path: Path, writer: str) -> None:
    """Full for real: a tmpfs of 64 KiB, 1 MiB written to it (by Python, and by safetensors' Rust)."""
    output = run_in_mount("size=64k", tmp_path, writer)
    assert "the disk is full; free some space" in output
    assert output.endswith("[]\n")


def test_read_only_file_system_is_named(tmp_path: Path) -> None:
    """The output lies on a tmpfs that is mounted read-only."""
    assert "the file system is read-only; choose another" in run_in_mount("ro", tmp_path, "python")


def test_file_size_limit_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    """Works without root: RLIMIT_FSIZE lets the kernel refuse the write in the middle of a file."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE_TOO_MUCH, str(tmp_path / "a"), "python"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536)),
    )
    assert "file-size limit" in done.stdout, done.stderr
    assert done.stdout.endswith("[]\n")


def test_permission_denied_is_named(tmp_path: Path) -> None:
    """Root may write anywhere, so the refusal is made: mkdir reports EACCES."""
    if os.geteuid() == 0:
        error = files.storage_error(PermissionError(errno.EACCES, "Permission denied", "/srv/a"), tmp_path)
        assert str(error).startswith("cannot use '/srv/a': permission denied")
        return
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="permission denied"):
        make(tmp_path / "a")


def test_failed_copy_names_the_target(tmp_path: Path) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/in/config.json", None, "/out/config.json")
    assert str(files.storage_error(error, tmp_path)).startswith(
        "cannot use '/out/config.json': the disk is full"
    )


# Hashes


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


def test_digest_of_a_young_file_is_not_remembered(tmp_path: Path) -> None:
    read_artifact(make(tmp_path / "a"))
    assert not files.digest_cache_path().exists()


@pytest.mark.parametrize("content", ["{", "[1]", '{"1:2:3:4:5": 7}', "\x00"])
def test_corrupt_digest_cache_is_ignored(tmp_path: Path, content: str) -> None:
    path = make(tmp_path / "a")
    files.digest_cache_path().parent.mkdir(parents=True)
    files.digest_cache_path().write_text(content)
    read_artifact(path)


def test_unusable_cache_directory_is_ignored(tmp_path: Path, cache_home: Path) -> None:
    (cache_home / "quest-deploy").write_text("a file where the directory should be")
    path = make(tmp_path / "a")
    age(path)
    read_artifact(path)


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

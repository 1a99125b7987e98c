"""What a reader is promised: content as written, damage named, and anything else called what it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quest_deploy.artifacts import MANIFEST_NAME, read_artifact, refuse_pickle, stage_of, write_artifact
from quest_deploy.errors import ArtifactError, StaleArtifactError
from tests.artifact.conftest import CONFIG, edit_manifest, link_inside, make, names

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


def test_onnx_of_another_tool_is_onnx_with_the_hashes_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("model_index.json", "unet/model.onnx"):
        (tmp_path / name).write_text("{}")
    assert stage_of(tmp_path) == "onnx"
    artifact = read_artifact(tmp_path, stage="onnx")
    assert sorted(artifact.manifest.files) == ["model_index.json", "unet/model.onnx"]
    (tmp_path / "unet" / "model.onnx").write_text("[]")
    assert read_artifact(tmp_path).digest != artifact.digest


@pytest.mark.parametrize("file", ["unet/model.plan", "quest.json"])
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


@pytest.mark.parametrize("put", [lambda path: None, lambda path: path.write_bytes(b"")], ids=["none", "file"])
def test_what_is_no_directory_is_told_both_kinds(put: Callable[[Path], object], tmp_path: Path) -> None:
    put(tmp_path / "place")
    with pytest.raises(ArtifactError, match=r"a manifest\.json .* or a model_index\.json"):
        stage_of(tmp_path / "place")

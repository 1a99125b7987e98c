"""What a writer is promised: all or nothing, and nothing of the user's is ever deleted."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from quest_deploy.artifacts import (
    MANIFEST_NAME,
    artifact_digest,
    check_output,
    read_artifact,
    write_artifact,
)
from quest_deploy.errors import ArtifactError, ConfigError, StaleArtifactError
from quest_deploy.files import hash_directory
from tests.artifact.conftest import CONFIG, fail_inside, make, names

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


@pytest.mark.parametrize("content", ["{", '{"schema_version": 2}'], ids=["truncated", "newer"])
def test_output_whose_manifest_tells_nothing_is_left_alone_and_the_message_says_to_delete_it(
    tmp_path: Path, content: str
) -> None:
    make(tmp_path / "a")
    (tmp_path / "a" / MANIFEST_NAME).write_text(content)
    with pytest.raises(
        ArtifactError, match=r"a' cannot be replaced: .*manifest\.json'.* delete it and run the same"
    ):
        make(tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / MANIFEST_NAME).read_text() == content


def test_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    with pytest.raises(ArtifactError, match="is a file"):
        make(tmp_path / "a", overwrite=True)


@pytest.mark.parametrize("output", ["file/a", "file/x/a"])
def test_output_below_a_file_is_refused_before_the_body_runs(tmp_path: Path, output: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match=r"file': a part of the path is a file, expected a directory"):
        check_output(tmp_path / output, stage="onnx")


def test_mount_point_as_output_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing can be renamed to it, which showed only after the work."""
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == tmp_path / "volume")
    (tmp_path / "volume").mkdir()
    with pytest.raises(ArtifactError, match="volume' is a mount point; give a directory inside it"):
        check_output(tmp_path / "volume", stage="onnx")
    check_output(tmp_path / "volume" / "a", stage="onnx")


def test_root_directory_as_output_is_refused() -> None:
    with pytest.raises(ArtifactError, match="output '/' is a mount point"):
        check_output(Path("/"), stage="onnx")


@pytest.mark.parametrize("target", ["link", "missing"], ids=["loop", "dangling"])
@pytest.mark.parametrize("output", ["link", "link/a"])
def test_link_to_nothing_as_output_is_refused(tmp_path: Path, target: str, output: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / target)
    with pytest.raises(ArtifactError, match="link' is a symbolic link to nothing"):
        check_output(tmp_path / output, stage="onnx")


@pytest.mark.parametrize("output", [".", ".."])
def test_working_directory_as_output_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """Its replacement would leave the shell in a deleted directory, where '.' is not the result."""
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    with pytest.raises(ArtifactError, match=f"output '{output}' is or holds the working directory"):
        check_output(Path(output), stage="onnx")


def test_output_through_a_missing_directory_is_refused(tmp_path: Path) -> None:
    """Only resolved it is a place: once written, it is not found by the name that was given."""
    (tmp_path / "there").mkdir()
    check_output(tmp_path / "there" / ".." / "x", stage="onnx")
    with pytest.raises(ArtifactError, match="goes through '.*/missing', which is no directory"):
        check_output(tmp_path / "missing" / ".." / "x", stage="onnx")


@pytest.mark.parametrize("output", ["images", "unet/images"])
def test_output_inside_an_artifact_is_refused(tmp_path: Path, output: str) -> None:
    """A file that its manifest does not list would make the whole artifact unusable."""
    path = make(tmp_path / "onnx")
    with pytest.raises(ArtifactError, match=f"lies in '{path}', which has a manifest.json; choose"):
        check_output(path / output, stage="images")


def test_output_inside_a_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ArtifactError, match=f"lies in '{tmp_path}', which has a model_index.json; choose"):
        check_output(tmp_path / "unet" / "images", stage="images")


def test_output_beside_the_manifest_of_a_web_page_is_taken(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "page", "icons": []}')
    check_output(tmp_path / "models" / "onnx", stage="onnx")


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
    assert [name.rpartition("-")[0] for name in names(tmp_path)] == ["", ".a.partial"]
    make(tmp_path / "a")
    assert names(tmp_path) == ["a"]


def test_what_a_living_process_writes_nobody_else_does(tmp_path: Path) -> None:
    process = start_writer(tmp_path / "a")
    try:
        left = names(tmp_path)
        with pytest.raises(ConfigError, match=rf"another quest-deploy \(process {process.pid}\) is writing"):
            make(tmp_path / "a")
        assert names(tmp_path) == left
        make(tmp_path / "b")
    finally:
        process.kill()
        process.communicate(timeout=30)


def test_killed_between_the_two_renames_gets_the_old_artifact_back(tmp_path: Path) -> None:
    make(tmp_path / "a", text="old")
    (tmp_path / "a").rename(tmp_path / ".a.replaced-0")
    with pytest.raises(RuntimeError):
        fail_inside(tmp_path / "a", RuntimeError())
    assert (read_artifact(tmp_path / "a").path / "unet" / "model.onnx").read_text() == "old"


@pytest.mark.parametrize("left", ["replaced", "partial"])
def test_what_another_output_left_is_not_taken_for_a_pattern(tmp_path: Path, left: str) -> None:
    other = tmp_path / f".a1.{left}-0"
    make(other)
    make(tmp_path / "a[12]")
    make(tmp_path / "a?")
    assert names(tmp_path) == [other.name, "a?", "a[12]"]


def test_what_a_name_like_a_pattern_left_is_removed(tmp_path: Path) -> None:
    make(tmp_path / ".a[1].partial-0")
    make(tmp_path / "a[1]")
    assert names(tmp_path) == ["a[1]"]


# What lies beside an output


def test_a_container_layer_that_renames_no_directories_is_replaced_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path / "a")
    rename = os.rename

    def refuse(source: object, target: object) -> None:
        if Path(str(source)) == path:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        rename(source, target)  # type: ignore[arg-type]

    monkeypatch.setattr("os.rename", refuse)
    make(path, text="new", overwrite=True)
    assert (read_artifact(path).path / "unet" / "model.onnx").read_text() == "new"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("renames", [1, 2])
def test_an_interrupt_behind_either_rename_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    path = make(tmp_path / "a")
    rename, done = os.rename, []

    def interrupt(source: object, target: object) -> None:
        rename(source, target)  # type: ignore[arg-type]
        done.append(source)
        if len(done) == renames:
            raise KeyboardInterrupt

    monkeypatch.setattr("os.rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        make(path, text="new", overwrite=True)
    text = (read_artifact(path).path / "unet" / "model.onnx").read_text()
    assert text == ("new" if renames == 2 else "weights")


def test_an_older_output_that_comes_back_is_not_replaced_unasked(tmp_path: Path) -> None:
    make(tmp_path / "a").rename(tmp_path / ".a.replaced-0123")
    entered = []
    with pytest.raises(ArtifactError, match="add --overwrite"):
        with write_artifact(tmp_path / "a", stage="onnx", config=CONFIG):
            entered.append(True)
    assert not entered and read_artifact(tmp_path / "a")


def test_an_input_that_changed_while_it_was_read_is_told_and_nothing_written(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    known = read_artifact(source).digest
    places = {"inputs": {"onnx": known}, "sources": {"onnx": (source, artifact_digest)}}
    with write_artifact(tmp_path / "a", stage="engines", config=CONFIG, **places):
        pass
    with pytest.raises(StaleArtifactError, match="'.*source' was changed while it was read"):
        with write_artifact(tmp_path / "b", stage="engines", config=CONFIG, **places):
            make(source, text="new", overwrite=True)
    assert names(tmp_path) == ["a", "source"]


def test_a_model_with_another_tools_graph_beside_its_weights_is_the_same_model(tmp_path: Path) -> None:
    model = tmp_path / "model"
    (model / "unet").mkdir(parents=True)
    (model / "model_index.json").write_text("{}")
    for name in ("model.onnx", "diffusion_pytorch_model.safetensors"):
        (model / "unet" / name).write_text(name)
    inputs = {"source": hash_directory(model)}
    with write_artifact(
        tmp_path / "a",
        stage="checkpoint",
        config=CONFIG,
        inputs=inputs,
        sources={"source": (model, hash_directory)},
    ):
        pass
    assert read_artifact(tmp_path / "a").manifest.inputs == inputs

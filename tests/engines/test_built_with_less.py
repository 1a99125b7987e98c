"""Engines that were built with less, for want of memory: when they are built again, and when they are kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from quest_deploy.artifacts import Artifact
from quest_deploy.config import BuildConfig
from quest_deploy.engines.trt_build import build_engine
from quest_deploy.errors import ArtifactError

pytest.importorskip("tensorrt_rtx")


def built_with_less(engines: Artifact, limit_gb: float | None, *, is_told: bool = True) -> None:
    """Have the manifest say that memory did not suffice for the U-Net."""
    manifest = engines.path / "manifest.json"
    content = json.loads(manifest.read_text())
    content["config"]["memory_limit_gb"] = limit_gb
    for report in content["details"]["components"].values():
        report["memory_limit_gb"] = limit_gb
        if not is_told:
            del report["memory_limit_gb"]
    content["details"]["components"]["unet"]["fallback"] = ["the optimal shapes alone"]
    manifest.write_text(json.dumps(content))


@pytest.mark.parametrize("limit_gb", [None, 30.0])
def test_what_was_built_with_less_is_built_again_where_more_memory_may_be_taken(
    engines: Artifact, tmp_path: Path, jobs: list[list[str]], limit_gb: float | None
) -> None:
    built_with_less(engines, 20.0)
    config = BuildConfig(memory_limit_gb=limit_gb)
    with pytest.raises(
        ArtifactError, match=r"\(unet: it was built with less, for want of memory\); add --overwrite"
    ):
        build_engine(tmp_path / "onnx", engines.path, config)
    built = build_engine(tmp_path / "onnx", engines.path, config, overwrite=True)
    assert jobs == [["unet"]] and "fallback" not in built.manifest.details["components"]["unet"]


@pytest.mark.parametrize(("before_gb", "limit_gb"), [(20.0, 20.0), (20.0, 10.0), (None, None), (None, 20.0)])
def test_what_was_built_with_less_is_kept_aloud_where_no_more_memory_may_be_taken(
    engines: Artifact,
    tmp_path: Path,
    jobs: list[list[str]],
    caplog: pytest.LogCaptureFixture,
    before_gb: float | None,
    limit_gb: float | None,
) -> None:
    built_with_less(engines, before_gb)
    build_engine(tmp_path / "onnx", engines.path, BuildConfig(memory_limit_gb=limit_gb))
    assert not jobs
    assert "unet: kept as it was built for want of memory, with the optimal shapes alone" in caplog.text


@pytest.mark.parametrize("first_gb", [20.0, None])
@pytest.mark.parametrize("is_told", [True, False], ids=["of this version", "of an earlier version"])
def test_what_is_kept_under_another_limit_keeps_its_own(
    engines: Artifact, tmp_path: Path, jobs: list[list[str]], first_gb: float | None, is_told: bool
) -> None:
    built_with_less(engines, first_gb, is_told=is_told)
    source = tmp_path / "onnx"
    (source / "manifest.json").unlink()
    (source / "quest.json").unlink()
    kept = build_engine(source, engines.path, BuildConfig(memory_limit_gb=10.0), overwrite=True)
    assert kept.manifest.config["memory_limit_gb"] == 10.0
    build_engine(source, engines.path, BuildConfig(memory_limit_gb=first_gb))
    assert not jobs

"""A second build into the same directory: what is kept, what is built again, and what is said about it."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from quest_deploy.artifacts import Artifact, read_artifact
from quest_deploy.build_config import HardwareCompatibility
from quest_deploy.commands.inspect import describe
from quest_deploy.config import BuildConfig, ProfileConfig, ShapeRange, to_dict
from quest_deploy.engines import trt_build
from quest_deploy.engines.libraries import Gpu
from quest_deploy.engines.replace import with_plans
from quest_deploy.engines.run_record import read_runs, record_run
from quest_deploy.engines.trt_build import build_engine
from quest_deploy.engines.up_to_date import companions_digest, differences, graph_digest, in_words
from quest_deploy.errors import ArtifactError, StaleArtifactError
from quest_deploy.manifest import FileEntry, Manifest
from tests.engines.conftest import unet

pytest.importorskip("tensorrt_rtx")


def test_engines_that_are_up_to_date_are_left_alone(
    engines: Artifact, tmp_path: Path, jobs: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    again = build_engine(tmp_path / "onnx", engines.path, BuildConfig())
    assert again.digest == engines.digest and not jobs
    assert "is up to date" in caplog.text


def test_only_what_changed_is_built_again_and_the_reason_is_said(
    engines: Artifact,
    make_onnx: Callable[..., Path],
    tmp_path: Path,
    jobs: list[list[str]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    (tmp_path / "onnx").rename(tmp_path / "before")
    changed = make_onnx(unet=unet(np.random.default_rng(7)).SerializeToString())
    with pytest.raises(
        ArtifactError, match=r"not up to date \(unet: its ONNX graph or weights changed\); add --overwrite"
    ):
        build_engine(changed, engines.path, BuildConfig())
    kept = (engines.path / "vae_decoder" / "model.plan").read_bytes()
    built = build_engine(changed, engines.path, BuildConfig(), overwrite=True)
    assert jobs == [["unet"]]
    assert "not up to date: unet: its ONNX graph or weights changed" in caplog.text
    assert (built.path / "vae_decoder" / "model.plan").read_bytes() == kept
    before, after = engines.manifest.details["components"], built.manifest.details["components"]
    assert after["vae_decoder"] == before["vae_decoder"] and after["unet"] != before["unet"]
    assert read_artifact(built.path, verify=True).digest == built.digest


def test_a_changed_tokenizer_builds_nothing(
    engines: Artifact, make_onnx: Callable[..., Path], tmp_path: Path, jobs: list[list[str]]
) -> None:
    (tmp_path / "onnx").rename(tmp_path / "before")
    again = make_onnx()
    manifest = dataclasses.replace(
        engines.manifest, details={**engines.manifest.details, "companions_digest": "x"}
    )
    found = trt_build.changes(
        dataclasses.replace(engines, manifest=manifest),
        read_artifact(again),
        trt_build.all_profiles(again, BuildConfig()),
        BuildConfig(),
    )
    assert found == {"other files": "they changed in the ONNX directory"}
    assert not jobs


def test_a_build_that_ends_while_another_begins_is_what_the_other_judges(
    engines: Artifact,
    make_onnx: Callable[..., Path],
    tmp_path: Path,
    jobs: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = (tmp_path / "onnx").rename(tmp_path / "before")
    changed = make_onnx(unet=unet(np.random.default_rng(7)).SerializeToString())
    locked = trt_build.locked

    def after_another(*args):
        monkeypatch.setattr(trt_build, "locked", locked)
        build_engine(before, engines.path, BuildConfig(static=True), overwrite=True)
        return locked(*args)

    monkeypatch.setattr(trt_build, "locked", after_another)
    build_engine(changed, engines.path, BuildConfig(), overwrite=True)
    # The decoder that was there first would have done; the text encoder is the same for all three.
    assert jobs == [["unet", "vae_decoder"], ["unet", "vae_decoder"]]


def test_engines_that_were_built_again_meanwhile_are_not_mixed_with_plans_for_the_old_ones(
    engines: Artifact, tmp_path: Path
) -> None:
    build_engine(tmp_path / "onnx", engines.path, BuildConfig(static=True), overwrite=True)
    with pytest.raises(StaleArtifactError, match="built again by another process meanwhile; run the same"):
        with_plans(engines, tmp_path / "refitted", {}, {})
    assert not (tmp_path / "refitted").exists()


def test_engines_that_are_kept_keep_what_their_runs_left(
    engines: Artifact, make_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    place = dict.fromkeys(("gpu", "compute_capability", "driver", "library_version"), "1")

    def left(engines: Artifact) -> list[str]:
        """The components with a run record and kernels of their plan."""
        return [
            name
            for name in ("text_encoder", "unet", "vae_decoder")
            if read_runs(engines.path / name, engines.manifest.files[f"{name}/model.plan"].sha256)
            and (engines.path / name / ".runtime-cache").exists()
        ]

    for name in engines.manifest.details["components"]:
        record_run(engines.path / name, engines.manifest.files[f"{name}/model.plan"].sha256, place)
        (engines.path / name / ".runtime-cache").write_text(name)
    (tmp_path / "onnx").rename(tmp_path / "before")
    onnx = make_onnx(unet=unet(np.random.default_rng(7)).SerializeToString())
    again = build_engine(onnx, engines.path, BuildConfig(), overwrite=True)
    assert left(again) == ["text_encoder", "vae_decoder"]
    replaced = with_plans(
        again, again.path, {"vae_decoder": again.path / "unet/model.plan"}, {}, overwrite=True
    )
    assert left(replaced) == ["text_encoder"]
    assert not (replaced.path / "vae_decoder" / ".runtime-cache").exists()
    assert not [name for name in replaced.manifest.files if "runtime" in name]


def changes(built_once: tuple[Artifact, Path], before: BuildConfig, after: BuildConfig) -> str:
    """What is not up to date for `after` in engines that were built with `before`, by their manifest."""
    engines, onnx = built_once
    source = read_artifact(onnx)
    reports = engines.manifest.details["components"]
    details = trt_build.make_details(source, trt_build.all_profiles(onnx, before), before, reports)
    config = json.loads(json.dumps(to_dict(before)))
    manifest = dataclasses.replace(engines.manifest, config=config, details=details)
    old = dataclasses.replace(engines, manifest=manifest)
    return in_words(trt_build.changes(old, source, trt_build.all_profiles(onnx, after), after))


def profiles(*images: int) -> tuple[ProfileConfig, ...]:
    return tuple(ProfileConfig(batch=ShapeRange(min=1, opt=one, max=one)) for one in images)


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ({"compute_capabilities": ("8.6", "12.0")}, {"compute_capabilities": ("12.0", "8.6")}, ""),
        (
            {"compute_capabilities": ("8.6", "12.0")},
            {"compute_capabilities": ("8.6",)},
            "text_encoder, unet, vae_decoder: it was built for 8.6, 12.0, this is 8.6",
        ),
        ({"more_profiles": profiles(2, 3)}, {"more_profiles": profiles(3, 2)}, ""),
        (
            {"batch": profiles(1)[0].batch, "more_profiles": profiles(2)},
            {"batch": profiles(2)[0].batch, "more_profiles": profiles(1)},
            "text_encoder, unet, vae_decoder: other shapes are asked for",
        ),
    ],
    ids=["compute capabilities", "one capability", "profiles", "first profile"],
)
def test_an_order_that_means_nothing_makes_no_difference(
    built_once: tuple[Artifact, Path], before: dict, after: dict, words: str
) -> None:
    assert changes(built_once, BuildConfig(**before), BuildConfig(**after)) == words


ONE = ShapeRange(min=1, opt=1, max=1)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            BuildConfig(optimization_level=1),
            "text_encoder, unet, vae_decoder: optimization_level was None, is 1",
        ),
        (BuildConfig(batch=ONE), "text_encoder, unet, vae_decoder: other shapes are asked for"),
        (
            BuildConfig(compute_capabilities=("8.6",)),
            "text_encoder, unet, vae_decoder: it was built for 8.0, 8.6, 8.9, 12.0 and later, this is 8.6",
        ),
        (
            BuildConfig(more_profiles=(ProfileConfig(height=ShapeRange(min=32, opt=32, max=32)),)),
            "unet, vae_decoder: other shapes are asked for",
        ),
    ],
)
def test_the_first_difference_is_named(
    built_once: tuple[Artifact, Path], config: BuildConfig, words: str
) -> None:
    engines, onnx = built_once
    profiles = trt_build.all_profiles(onnx, config)
    assert in_words(trt_build.changes(engines, read_artifact(onnx), profiles, config)) == words


def test_engines_whose_manifest_has_the_words_of_earlier_versions_are_up_to_date(
    built_once: tuple[Artifact, Path],
) -> None:
    engines, onnx = built_once
    details = engines.manifest.details | {"compute_capability": "8.0 and later"}
    earlier = dataclasses.replace(engines, manifest=dataclasses.replace(engines.manifest, details=details))
    profiles = trt_build.all_profiles(onnx, BuildConfig())
    assert trt_build.changes(earlier, read_artifact(onnx), profiles, BuildConfig()) == {}


@pytest.fixture(scope="module")
def built_once(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, Path]:
    return build_engine(tiny_onnx, tmp_path_factory.mktemp("once") / "engines", BuildConfig()), tiny_onnx


def test_another_library_is_named(built_once: tuple[Artifact, Path]) -> None:
    engines, onnx = built_once
    found = differences(
        engines.manifest,
        read_artifact(onnx).manifest,
        {"unet": []},
        {},
        options=(),
        library="TensorRT for RTX 9.9",
        target={},
    )
    version = engines.manifest.details["library_version"]
    assert found == {"unet": f"it was built with TensorRT for RTX {version}, this is TensorRT for RTX 9.9"}


def test_another_driver_matters_to_engines_for_one_gpu_alone(
    built_once: tuple[Artifact, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, onnx = built_once
    old = {**engines.manifest.details, "driver": "535.1"}
    engines = dataclasses.replace(engines, manifest=dataclasses.replace(engines.manifest, details=old))
    monkeypatch.setattr(trt_build, "driver_version", lambda: "580.2")
    monkeypatch.setattr(trt_build, "target_of", lambda config: {})
    library = trt_build.import_tensorrt("tensorrt-rtx")
    monkeypatch.setattr(trt_build, "import_tensorrt", lambda backend: library)
    monkeypatch.setattr(trt_build, "title_of", lambda backend: "TensorRT for RTX")

    def why(**options) -> str:
        config = BuildConfig(**options)
        profiles = trt_build.all_profiles(onnx, config)
        return in_words(trt_build.changes(engines, read_artifact(onnx), profiles, config))

    assert why(backend="tensorrt").endswith(": it was built under driver 535.1, this is 580.2")
    assert "driver" not in why(backend="tensorrt", hardware_compatible="ampere-plus")
    assert why() == ""


@pytest.mark.parametrize(
    ("compatible", "capability", "words"),
    [
        ("none", "8.6", "it was built for NVIDIA RTX A4000, this is NVIDIA X"),
        ("same-compute-capability", "8.6", ""),
        ("same-compute-capability", "8.9", "it was built for 8.6, any GPU, this is 8.9, any GPU"),
        ("ampere-plus", "8.9", ""),
    ],
)
def test_engines_for_other_gpus_are_up_to_date_on_them(
    built_once: tuple[Artifact, Path],
    monkeypatch: pytest.MonkeyPatch,
    compatible: HardwareCompatibility,
    capability: str,
    words: str,
) -> None:
    engines, onnx = built_once
    config = BuildConfig(backend="tensorrt", hardware_compatible=compatible)
    library = trt_build.import_tensorrt("tensorrt-rtx")
    monkeypatch.setattr(trt_build, "import_tensorrt", lambda backend: library)

    def on(name: str, capability: str) -> None:
        monkeypatch.setattr(trt_build, "gpus", lambda: [Gpu(name=name, compute_capability=capability)])

    on("NVIDIA RTX A4000", "8.6")
    details = engines.manifest.details | trt_build.target_of(config) | {"library": "TensorRT"}
    written = json.loads(json.dumps(to_dict(config)))
    manifest = dataclasses.replace(engines.manifest, details=details, config=written)
    on("NVIDIA X", capability)
    source, profiles = read_artifact(onnx), trt_build.all_profiles(onnx, config)
    found = trt_build.changes(dataclasses.replace(engines, manifest=manifest), source, profiles, config)
    assert set(found.values()) == ({words} if words else set())


def test_damaged_engines_are_not_used_again(
    engines: Artifact, tmp_path: Path, jobs: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    plan = engines.path / "unet" / "model.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    build_engine(tmp_path / "onnx", engines.path, BuildConfig(), overwrite=True)
    assert "nothing of the engines that are there is used again" in caplog.text
    assert len(jobs[0]) == 3


@pytest.mark.parametrize(
    "components",
    [
        None,
        {"unet": "x"},
        {"unet": {}},
        {"unet": {"size_bytes": 1, "seconds": 1, "verified": True, "fallback": 3}},
    ],
    ids=["none", "text", "empty", "fallback"],
)
def test_engines_whose_manifest_is_damaged_are_not_used_again(
    built_once: tuple[Artifact, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, components: object
) -> None:
    path = shutil.copytree(built_once[0].path, tmp_path / "engines")
    content = json.loads((path / "manifest.json").read_text())
    content["details"]["components"] = components
    (path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match="exists already; add --overwrite"):
        build_engine(built_once[1], path, BuildConfig())
    assert "the manifest is damaged" in caplog.text


def test_engines_without_a_plan_are_damaged(
    built_once: tuple[Artifact, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = shutil.copytree(built_once[0].path, tmp_path / "engines")
    content = json.loads((path / "manifest.json").read_text())
    del content["files"]["unet/model.plan"]
    (path / "manifest.json").write_text(json.dumps(content))
    (path / "unet" / "model.plan").unlink()
    with pytest.raises(ArtifactError, match="exists already; add --overwrite"):
        build_engine(built_once[1], path, BuildConfig())
    assert "'unet/model.plan' is not among its files; the manifest is damaged" in caplog.text
    with pytest.raises(
        ArtifactError, match="'unet/model.plan' is not among its files; the manifest is damaged"
    ):
        describe(path)


def test_engines_of_a_version_without_an_option_are_what_its_default_makes(
    engines: Artifact, tmp_path: Path, jobs: list[list[str]]
) -> None:
    manifest = engines.path / "manifest.json"
    content = json.loads(manifest.read_text())
    for name in ("strip_weights", "auto_fallback", "compute_capabilities"):
        del content["config"][name]
    manifest.write_text(json.dumps(content))
    build_engine(tmp_path / "onnx", engines.path, BuildConfig())
    assert not jobs
    with pytest.raises(ArtifactError, match="strip_weights was False, is True"):
        build_engine(tmp_path / "onnx", engines.path, BuildConfig(strip_weights=True))


def test_weights_beside_a_graph_are_its_own_whatever_their_names(engines: Artifact) -> None:
    def source(weights: str, text: str) -> Manifest:
        hashes = {
            "unet/model.onnx": "g",
            "unet/weights.pb": weights,
            "unet/onnx__MatMul_1": "w",
            "unet/config.json": text,
            "scheduler/scheduler_config.json": text,
        }
        files = {name: FileEntry(sha256=digest, size_bytes=1) for name, digest in hashes.items()}
        return dataclasses.replace(engines.manifest, files=files)

    assert graph_digest(source("a", "x"), "unet") != graph_digest(source("b", "x"), "unet")
    assert graph_digest(source("a", "x"), "unet") == graph_digest(source("a", "y"), "unet")
    assert companions_digest(source("a", "x")) == companions_digest(source("b", "x"))
    assert companions_digest(source("a", "x")) != companions_digest(source("a", "y"))

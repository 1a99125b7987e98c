"""Real TensorRT for RTX engines, built without a GPU."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from quest_deploy.artifacts import Artifact, read_artifact
from quest_deploy.config import BuildConfig, ProfileConfig, ProgressEvent, ShapeRange
from quest_deploy.engines import trt_build
from quest_deploy.engines.libraries import gpus
from quest_deploy.engines.trt_build import build_engine, make_details
from quest_deploy.errors import ArtifactError, ConfigError, EngineBuildError, MissingDependencyError

pytest.importorskip("tensorrt_rtx")

COMPONENTS = {"text_encoder", "unet", "vae_decoder"}


@pytest.fixture(scope="module")
def built(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, list[ProgressEvent]]:
    """Engines of the tiny pipeline, and the progress that was reported meanwhile."""
    events: list[ProgressEvent] = []
    output = tmp_path_factory.mktemp("built") / "engines"
    return build_engine(tiny_onnx, output, BuildConfig(), progress=events.append), events


def workers() -> list[psutil.Process]:
    """Building processes of this one that live; others test beside it."""
    own = {child.pid for child in psutil.Process().children(recursive=True)}
    return [
        process
        for process in psutil.process_iter(["cmdline", "status"])
        if "quest_deploy.engines.trt_worker" in (process.info["cmdline"] or [])
        and process.info["status"] != psutil.STATUS_ZOMBIE
        and process.pid in own
    ]


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def test_every_component_has_a_plan(built: tuple[Artifact, list[ProgressEvent]]) -> None:
    plans = [name for name in built[0].manifest.files if name.endswith("model.plan")]
    assert {Path(name).parent.name for name in plans} == COMPONENTS
    assert all(built[0].manifest.files[name].size_bytes > 1000 for name in plans)


def test_manifest_says_with_what_and_for_what(built: tuple[Artifact, list[ProgressEvent]]) -> None:
    import tensorrt_rtx

    details = built[0].manifest.details
    assert details["library"] == "TensorRT for RTX"
    assert details["library_version"] == tensorrt_rtx.__version__
    assert details["target_gpu"] == "any (ahead of time)"
    assert details["precision"] == "int8 (Q/DQ), fp32 elsewhere"


def test_manifest_passes_on_what_the_export_tells_of_loras(tiny_onnx: Path) -> None:
    told = {"source": "0" * 64, "loras": [{"file": "style.safetensors", "scale": 0.5, "sha256": "1" * 64}]}
    source = read_artifact(tiny_onnx)
    assert "merged" not in make_details(source, {}, BuildConfig(), {})
    manifest = dataclasses.replace(source.manifest, details={**source.manifest.details, "merged": told})
    details = make_details(dataclasses.replace(source, manifest=manifest), {}, BuildConfig(), {})
    assert details["merged"] == told


def test_manifest_ties_each_plan_to_its_onnx_file(
    built: tuple[Artifact, list[ProgressEvent]], tiny_onnx: Path
) -> None:
    source = read_artifact(tiny_onnx)
    assert built[0].manifest.inputs == {"onnx": source.digest}
    for name, component in built[0].manifest.details["components"].items():
        assert component["onnx_sha256"] == source.manifest.files[f"{name}/model.onnx"].sha256


def test_manifest_lists_profiles_and_flags(built: tuple[Artifact, list[ProgressEvent]]) -> None:
    unet = built[0].manifest.details["components"]["unet"]
    assert unet["profiles"][0]["sample"] == {"min": [1, 4, 8, 8], "opt": [2, 4, 8, 8], "max": [8, 4, 8, 8]}
    assert "TF32" not in unet["builder_flags"]


@pytest.mark.skipif(bool(gpus()), reason="this machine can verify its engines")
def test_engines_that_no_gpu_has_loaded_are_not_called_verified(
    built: tuple[Artifact, list[ProgressEvent]],
) -> None:
    assert built[0].manifest.details["verified"] is False


def test_companions_are_copied_and_graphs_are_not(built: tuple[Artifact, list[ProgressEvent]]) -> None:
    names = set(built[0].manifest.files)
    assert {"model_index.json", "quest.json", "unet/config.json", "tokenizer/vocab.json"} <= names
    assert not [name for name in names if "onnx" in name]


def test_progress_rises_to_its_total(built: tuple[Artifact, list[ProgressEvent]]) -> None:
    completed = [event.completed for event in built[1]]
    assert completed == sorted(completed)
    assert completed[-1] == built[1][-1].total == 300


def test_dynamic_sizes_build(tiny_onnx: Path, tmp_path: Path) -> None:
    sizes = ShapeRange(min=8, opt=16, max=64)
    artifact = build_engine(tiny_onnx, tmp_path / "engines", BuildConfig(height=sizes, width=sizes))
    profile = artifact.manifest.details["components"]["vae_decoder"]["profiles"][0]
    assert profile["latent_sample"]["max"] == [4, 4, 32, 32]


def refused(error: type[Exception], match: str, source: Path, output: Path, **options: object) -> None:
    """Check that building fails with a message and leaves nothing beside `output`."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(error, match=match):
        build_engine(source, output, BuildConfig(**options))
    assert sorted(output.parent.iterdir()) == before


def test_builder_options_reach_the_builder_and_the_manifest(tiny_onnx: Path, tmp_path: Path) -> None:
    one = ShapeRange(min=1, opt=1, max=1)
    size = ShapeRange(min=32, opt=32, max=32)
    config = BuildConfig(
        batch=one,
        more_profiles=(ProfileConfig(batch=one, height=size),),
        optimization_level=0,
        workspace_mb=512,
        compute_capabilities=("8.6", "12.0"),
        weight_streaming=True,
    )
    details = build_engine(tiny_onnx, tmp_path / "engines", config).manifest.details
    unet, text = details["components"]["unet"], details["components"]["text_encoder"]
    assert "WEIGHT_STREAMING" in unet["builder_flags"]
    assert [profile["sample"]["max"][2] for profile in unet["profiles"]] == [8, 16]
    assert len(text["profiles"]) == 1  # it does not see sizes
    assert details["compute_capability"] == "8.6, 12.0"


def test_a_workspace_that_no_kernel_fits_is_refused_in_tensorrt_s_own_words(
    make_onnx: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(EngineBuildError, match="workspace"):
        build_engine(make_onnx(), tmp_path / "engines", BuildConfig(workspace_mb=1))
    assert not (tmp_path / "engines").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimization_level": 6}, "optimization_level is 6, expected 0 to 5"),
        ({"workspace_mb": 0}, "workspace_mb is 0, expected 1 to 2147483647"),
        ({"workspace_mb": 2**31}, "workspace_mb is 2147483648, expected 1 to 2147483647"),
        (
            {"memory_limit_gb": math.inf},
            "memory_limit_gb is inf, expected more than 0 and at most 1000000000",
        ),
        (
            {"memory_limit_gb": 1e308},
            "memory_limit_gb is 1e.308, expected more than 0 and at most 1000000000",
        ),
        ({"compute_capabilities": ("86",)}, "compute_capabilities has 86, expected numbers such as 8.6"),
        ({"backend": "tensorrt", "compute_capabilities": ("8.6",)}, "is for TensorRT for RTX"),
        ({"hardware_compatible": "ampere-plus"}, "hardware_compatible is for TensorRT"),
        ({"version_compatible": True}, "version_compatible is for TensorRT"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BuildConfig(**options)


def test_a_compute_capability_that_the_library_does_not_have_is_refused_with_those_it_has(
    tiny_onnx: Path, tmp_path: Path
) -> None:
    match = r"compute capability 9\.9: TensorRT for RTX .* builds for .*8\.6, .*12\.0.* alone; pass --compute"
    refused(ConfigError, match, tiny_onnx, tmp_path / "engines", compute_capabilities=("8.6", "9.9"))


def test_weights_cast_from_four_bits_are_refused_before_building(
    make_onnx: Callable[..., Path], four_bit_unet: Callable[..., bytes], tmp_path: Path
) -> None:
    source = make_onnx(unet=four_bit_unet(cast=True))
    match = r"unet: 1 weights are stored in 4 bits .*'conv'.* export --target tensorrt-rtx"
    refused(EngineBuildError, match, source, tmp_path / "engines")


def test_a_failed_build_removes_the_folders_it_made(
    make_onnx: Callable[..., Path], four_bit_unet: Callable[..., bytes], tmp_path: Path
) -> None:
    source = make_onnx(unet=four_bit_unet(cast=True))
    with pytest.raises(EngineBuildError):
        build_engine(source, tmp_path / "new" / "deep" / "engines", BuildConfig())
    assert not (tmp_path / "new").exists()


def test_graph_that_does_not_parse_is_refused_in_tensorrt_s_own_words(
    make_onnx: Callable[..., Path], asymmetric_unet: bytes, tmp_path: Path
) -> None:
    match = "unet: TensorRT for RTX .* cannot build .*zero.?point"
    refused(EngineBuildError, match, make_onnx(unet=asymmetric_unet), tmp_path / "engines")


def test_graph_that_parses_but_does_not_build_is_refused_in_tensorrt_s_own_words(
    make_onnx: Callable[..., Path],
    four_bit_unet: Callable[..., bytes],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trt_build, "check_graph", lambda *args: None)
    source = make_onnx(unet=four_bit_unet(cast=True))
    refused(EngineBuildError, "unet: .* cannot build .*datatype Int4", source, tmp_path / "engines")


def test_graph_with_other_inputs_is_refused(
    make_onnx: Callable[..., Path], tiny_onnx: Path, tmp_path: Path
) -> None:
    source = make_onnx(unet=(tiny_onnx / "vae_decoder" / "model.onnx").read_bytes())
    match = r"unet: .*takes \['latent_sample'\], expected \['encoder_hidden_states', 'sample', 'timestep'\]"
    refused(EngineBuildError, match, source, tmp_path / "engines")


def test_file_that_is_not_onnx_is_an_artifact_error(make_onnx: Callable[..., Path], tmp_path: Path) -> None:
    source = make_onnx(vae_decoder=b"\xff" * 100)
    refused(ArtifactError, "model.onnx' is not an ONNX file", source, tmp_path / "engines")


def test_truncated_graph_is_named(make_onnx: Callable[..., Path], tmp_path: Path) -> None:
    source = make_onnx()
    graph = source / "unet" / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-10])
    refused(ArtifactError, "unet/model.onnx is truncated", source, tmp_path / "engines")


def test_model_directory_is_refused_with_the_command_to_run(model_dir: Path, tmp_path: Path) -> None:
    refused(ArtifactError, "quest-deploy export", model_dir, tmp_path / "engines")


def test_size_that_does_not_divide_is_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    height = ShapeRange(min=18, opt=18, max=18)
    refused(ConfigError, "height: got 18 pixels", tiny_onnx, tmp_path / "engines", height=height)


def test_missing_library_is_refused_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    refused(
        MissingDependencyError, r"quest-deploy\[tensorrt-rtx\]", tmp_path / "nothing", tmp_path / "engines"
    )


def test_tensorrt_without_a_gpu_points_to_the_flavour_that_needs_none(
    monkeypatch: pytest.MonkeyPatch, tiny_onnx: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr(trt_build, "check_tensorrt", lambda backend: None)
    monkeypatch.setattr(trt_build, "gpus", list)
    refused(
        MissingDependencyError, "--backend tensorrt-rtx", tiny_onnx, tmp_path / "engines", backend="tensorrt"
    )


def test_existing_engines_stay_when_a_new_build_fails(
    built: tuple[Artifact, list[ProgressEvent]],
    make_onnx: Callable[..., Path],
    four_bit_unet: Callable[..., bytes],
) -> None:
    output = built[0].path
    with pytest.raises(EngineBuildError):
        build_engine(make_onnx(unet=four_bit_unet(cast=True)), output, BuildConfig(), overwrite=True)
    assert read_artifact(output, verify=True).digest == built[0].digest


def test_timing_cache_is_ignored_aloud_where_there_is_none(
    tiny_onnx: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = BuildConfig(timing_cache=str(tmp_path / "cache"))
    with caplog.at_level(logging.WARNING):
        job = trt_build.make_job(tiny_onnx, tmp_path, {}, config)
    assert job["timing_cache"] is None
    assert "is ignored" in caplog.text


def test_timing_cache_of_tensorrt_is_an_absolute_path(tmp_path: Path) -> None:
    config = BuildConfig(backend="tensorrt", timing_cache="cache")
    assert trt_build.make_job(tmp_path, tmp_path, {}, config)["timing_cache"] == str(Path("cache").absolute())


def test_killed_worker_is_an_error_that_leaves_nothing(tiny_onnx: Path, tmp_path: Path) -> None:
    def kill(event: ProgressEvent) -> None:
        for process in workers():
            process.kill()

    with pytest.raises(EngineBuildError, match="SIGKILL"):
        build_engine(tiny_onnx, tmp_path / "engines", BuildConfig(), progress=kill)
    assert not [path for path in tmp_path.iterdir() if "engines" in path.name]


BUILD = """
import json, sys
from pathlib import Path
from quest_deploy.config import BuildConfig
from quest_deploy.engines.trt_build import build_engine, make_details

def report(event):
    print(event.completed, flush=True)
    sys.stdin.readline()  # holds the build where it is

build_engine(Path(sys.argv[1]), Path(sys.argv[2]), BuildConfig(), progress=report)
"""


@pytest.fixture
def held_build(tiny_onnx: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of a build into tmp_path/engines."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD, str(tiny_onnx), str(tmp_path / "engines")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert process.stdout is not None
    assert process.stdout.readline()
    yield process
    process.kill()
    process.communicate()


def test_interrupt_leaves_neither_files_nor_processes(
    held_build: subprocess.Popen[str], tmp_path: Path
) -> None:
    children = psutil.Process(held_build.pid).children()
    assert [path for path in tmp_path.iterdir() if "partial" in path.name]
    held_build.send_signal(signal.SIGINT)
    held_build.communicate(timeout=20)
    assert held_build.returncode != 0
    assert not [child for child in children if child.is_running()]
    assert not [path for path in tmp_path.iterdir() if "engines" in path.name]


def test_worker_exits_when_its_parent_is_killed(held_build: subprocess.Popen[str]) -> None:
    children = psutil.Process(held_build.pid).children()
    assert children
    held_build.kill()
    held_build.communicate(timeout=20)
    wait_until(lambda: not [c for c in children if c.is_running() and c.status() != psutil.STATUS_ZOMBIE])


def test_a_name_that_is_no_text_is_told_before_building(tiny_onnx: Path, tmp_path: Path) -> None:
    path = shutil.copytree(tiny_onnx, tmp_path / "caf\udce9")
    with pytest.raises(ArtifactError, match="the name is not UTF-8 text, which TensorRT needs"):
        build_engine(path, tmp_path / "engines", BuildConfig())
    assert not (tmp_path / "engines").exists()

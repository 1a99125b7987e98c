"""Falling back, with real engines of TensorRT for RTX and simulated times: nothing here ran on a GPU."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from quest_deploy import auto_fallback, fallback_trial
from quest_deploy.artifacts import Artifact, read_artifact
from quest_deploy.auto_fallback import RESULT, build_engine
from quest_deploy.commands import main
from quest_deploy.config import BuildConfig, Dtype, ExportConfig, Mode
from quest_deploy.engines import ladder
from quest_deploy.engines.inspector import EngineLayer
from quest_deploy.engines.layer_times import LayerTimes
from quest_deploy.engines.libraries import gpus
from quest_deploy.engines.trt_build import PLAN_NAME, build_one
from quest_deploy.errors import ArtifactError, ConfigError, MissingDependencyError, StaleArtifactError
from quest_deploy.export.quantized import graph_products, without_quantizers
from quest_deploy.export.to_onnx import export
from tests.engines.conftest import write_onnx

pytest.importorskip("tensorrt_rtx")

CONFIG = BuildConfig(auto_fallback=True)
CONV, MATMUL = "Conv#3", "MatMul#7"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_onnx(tmp_path_factory.mktemp("fallback") / "onnx").path


class SimulatedTimes:
    """Stands in for the GPU: milliseconds of the convolution and of the MatMul, by engine."""

    def __init__(self, **ms: tuple[float, float]) -> None:
        self.ms = ms
        self.timed: list[str] = []

    def __call__(self, plan: Path, spec: object, config: BuildConfig) -> LayerTimes:
        assert plan.stat().st_size > 1000
        engine = next((part for part in plan.parts if part in ("float", "mixed")), "low")
        self.timed.append(engine)
        layers = [
            EngineLayer(name=name, kind="", precision="int8", weights="int8", tactic="", sources=(name,))
            for name in (CONV, MATMUL)
        ]
        return LayerTimes(layers=tuple(layers), ms=dict(zip((CONV, MATMUL), self.ms[engine], strict=True)))


def simulate(monkeypatch: pytest.MonkeyPatch, **ms: tuple[float, float]) -> SimulatedTimes:
    found = SimulatedTimes(**ms)
    monkeypatch.setattr(auto_fallback, "check_measurable", lambda output: None)
    monkeypatch.setattr(fallback_trial, "time_layers", found)
    return found


def result_of(artifact: Artifact) -> dict:
    return artifact.manifest.details["components"]["unet"][RESULT]


def plan_of(artifact: Artifact) -> str:
    return artifact.manifest.files[f"unet/{PLAN_NAME}"].sha256


def test_names_are_those_of_the_graph(source: Path) -> None:
    assert [one.name for one in graph_products(source / "unet" / "model.onnx")] == [CONV, MATMUL]


def test_slower_products_are_left_in_floats_and_named_with_both_times(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    times = simulate(monkeypatch, low=(1.0, 0.2), float=(0.5, 0.4), mixed=(0.5, 0.2))
    with caplog.at_level(logging.INFO):
        engines = build_engine(source, tmp_path / "engines", CONFIG)
    found = result_of(engines)
    assert found["left_in_float"] == [CONV]
    assert found["slower"] == [{"products": [CONV], "low_ms": 1.0, "float_ms": 0.5}]
    assert (found["low_ms"], found["float_ms"], found["mixed_ms"]) == pytest.approx((1.2, 0.9, 0.7))
    assert times.timed == ["low", "float", "mixed"]
    assert f"{CONV}: 1.000 ms in low precision, 0.500 ms in floats" in caplog.text
    assert RESULT not in engines.manifest.details["components"]["vae_decoder"]
    assert read_artifact(engines.path, verify=True).digest == engines.digest


def test_engine_is_kept_where_the_whole_does_not_become_faster(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = build_engine(source, tmp_path / "plain", BuildConfig())
    simulate(monkeypatch, low=(1.0, 0.2), float=(0.5, 0.4), mixed=(0.5, 0.9))
    engines = build_engine(source, tmp_path / "engines", CONFIG)
    assert result_of(engines)["left_in_float"] == []
    sizes = [one.manifest.files[f"unet/{PLAN_NAME}"].size_bytes for one in (plain, engines)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_without_anything_slower_no_third_engine_is_built(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = simulate(monkeypatch, low=(0.4, 0.2), float=(0.5, 0.4))
    found = result_of(build_engine(source, tmp_path / "engines", CONFIG))
    assert (found["mixed_ms"], found["slower"], times.timed) == (None, [], ["low", "float"])


def test_where_all_is_slower_the_engine_without_quantizers_serves(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = simulate(monkeypatch, low=(1.0, 1.0), float=(0.5, 0.4))
    found = result_of(build_engine(source, tmp_path / "engines", CONFIG))
    assert found["left_in_float"] == [CONV, MATMUL] and times.timed == ["low", "float"]


def test_the_same_command_again_measures_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, low=(1.0, 0.2), float=(0.5, 0.4), mixed=(0.5, 0.2))
    first = build_engine(source, tmp_path / "engines", CONFIG)
    times = simulate(monkeypatch)
    assert plan_of(build_engine(source, tmp_path / "engines", CONFIG)) == plan_of(first)
    assert times.timed == []


def test_without_the_option_such_engines_are_not_up_to_date(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, low=(1.0, 0.2), float=(0.5, 0.4), mixed=(0.5, 0.2))
    build_engine(source, tmp_path / "engines", CONFIG)
    with pytest.raises(ArtifactError, match=r"unet: some of its products were left in floats.*--overwrite"):
        build_engine(source, tmp_path / "engines", BuildConfig())


@pytest.mark.parametrize(("number", "timed"), [(1, []), (2, ["low"])], ids=["as asked for", "in floats"])
def test_engines_built_with_less_for_want_of_memory_are_not_compared_with_others(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
    timed: list[str],
) -> None:
    times, calls = simulate(monkeypatch, low=(1.0, 0.2), float=(0.5, 0.4)), []

    def build(job: dict[str, Any], *_: object, **__: object) -> dict[str, dict[str, Any]]:
        calls.append({})
        for component in job["components"]:
            Path(component["plan"]).write_bytes(bytes(2000))
            calls[-1][component["name"]] = {"seconds": 1.0, "size_bytes": 2000, "verified": False}
        if len(calls) == number:
            calls[-1]["unet"]["fallback"] = ["optimization level 0"]
        return calls[-1]

    monkeypatch.setattr(ladder, "build", build)
    engines = build_engine(source, tmp_path / "engines", CONFIG)
    report = engines.manifest.details["components"]["unet"]
    assert RESULT not in report and report.get("fallback", []) == ["optimization level 0"] * (number == 1)
    assert times.timed == timed
    assert (
        "unet: not measured: for want of memory" in caplog.text and "with optimization level 0" in caplog.text
    )


def test_what_goes_wrong_while_measuring_leaves_the_ordinary_engines(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch)

    def refuse(*_: object, **__: object) -> LayerTimes:
        raise StaleArtifactError("this GPU cannot load it")

    monkeypatch.setattr(fallback_trial, "time_layers", refuse)
    with pytest.raises(StaleArtifactError, match="--auto-fallback: this GPU cannot load it.*are whole"):
        build_engine(source, tmp_path / "engines", CONFIG)
    assert RESULT not in read_artifact(tmp_path / "engines").manifest.details["components"]["unet"]
    simulate(monkeypatch, low=(0.4, 0.2), float=(0.5, 0.4))
    assert RESULT in build_engine(source, tmp_path / "engines", CONFIG).manifest.details["components"]["unet"]


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_without_a_gpu_one_message_comes_before_the_build(source: Path, tmp_path: Path) -> None:
    words = ["build-engine", str(source), "-o", str(tmp_path / "engines"), "--auto-fallback"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "needs a GPU that can run them" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_without_a_gpu_engines_that_are_there_stay(source: Path, tmp_path: Path) -> None:
    before = build_engine(source, tmp_path / "engines", BuildConfig())
    with pytest.raises(MissingDependencyError, match="nothing was built or changed"):
        build_engine(source, tmp_path / "engines", CONFIG)
    assert read_artifact(tmp_path / "engines", verify=True).digest == before.digest


def test_engines_without_weights_cannot_be_measured() -> None:
    with pytest.raises(ConfigError, match="auto_fallback runs the engines it builds"):
        BuildConfig(auto_fallback=True, strip_weights=True)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("mode", "dtype"), [("int8", "fp16"), ("int4-weight-only", "fp16")])
def test_real_exports_build_without_all_their_quantizers_and_without_some(
    mode: Mode, dtype: Dtype, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    config = ExportConfig(target="tensorrt-rtx", mode=mode, dtype=dtype)
    source = export(tiny_checkpoint, tmp_path / "onnx", config)
    engines = build_engine(source.path, tmp_path / "engines", BuildConfig())
    report = engines.manifest.details["components"]["unet"]
    graph = source.path / "unet" / "model.onnx"
    removable = [one.name for one in graph_products(graph) if one.removable]
    assert len(removable) > 50
    for number, names in enumerate((removable, removable[::2])):
        place = tmp_path / str(number)
        without_quantizers(graph, names, place / "unet" / "model.onnx")
        left = {one.name for one in graph_products(place / "unet" / "model.onnx") if one.removable}
        assert left == {*removable} - {*names}
        assert build_one("unet", place, place, report["profiles"], BuildConfig())["size_bytes"] > 1000

"""Engines without weights: on a simulated runtime, and as far as the real builder goes without a driver."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from click.testing import CliRunner

from quest_deploy.artifacts import Artifact
from quest_deploy.commands import main
from quest_deploy.config import BuildConfig
from quest_deploy.engines import load_engines, refit
from quest_deploy.engines.libraries import gpus
from quest_deploy.engines.replace import with_plans
from quest_deploy.engines.trt_build import build_engine
from quest_deploy.engines.trt_worker import builder_arguments
from quest_deploy.errors import ArtifactError, EngineBuildError, MissingDependencyError, StaleArtifactError
from tests.engines.simulated_trt import simulated_library

pytest.importorskip("tensorrt_rtx")

WITHOUT_A_GPU = pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")


@pytest.fixture(scope="module")
def stripped(tiny_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Engines whose manifest says that they hold no weights: no machine without a GPU makes real ones."""
    folder = tmp_path_factory.mktemp("stripped")
    built = build_engine(tiny_onnx, folder / "built", BuildConfig())
    said = dict.fromkeys(built.manifest.details["components"], {"weights_stripped": True})
    return with_plans(built, folder / "engines", {}, said, weights_stripped=True)


class SimulatedStrippedEngine:
    """A plan whose weights may be left out of what is written."""

    def __init__(self) -> None:
        self.graph = ""
        self.excluded = {"weights"}

    def create_serialization_config(self) -> SimpleNamespace:
        return SimpleNamespace(clear_flag=self.excluded.discard)

    def serialize_with_config(self, config: SimpleNamespace) -> bytes:
        return b"no weights" if self.excluded else f"weights of {self.graph}".encode()


class SimulatedRefitter:
    """Refitter: takes weights once a parser has found them."""

    def __init__(self, engine: SimulatedStrippedEngine, log: object) -> None:
        self.engine = engine

    def refit_cuda_engine(self) -> bool:
        return bool(self.engine.graph)

    def get_missing_weights(self) -> list[str]:
        return [] if self.engine.graph else ["conv"]


class SimulatedParser:
    """OnnxParserRefitter."""

    def __init__(self, refitter: SimulatedRefitter, log: object) -> None:
        self.refitter = refitter

    def refit_from_file(self, path: str) -> bool:
        self.refitter.engine.graph = Path(path).parent.name
        return Path(path).is_file()


class RefusingParser(SimulatedParser):
    """One that finds no weights."""

    def refit_from_file(self, path: str) -> bool:
        return False


def simulate(monkeypatch: pytest.MonkeyPatch, parser: type = SimulatedParser) -> ModuleType:
    library = simulated_library(lambda log, plan: SimulatedStrippedEngine())
    library.Refitter, library.OnnxParserRefitter = SimulatedRefitter, parser  # type: ignore[attr-defined]
    library.SerializationFlag = SimpleNamespace(EXCLUDE_WEIGHTS="weights")  # type: ignore[attr-defined]
    monkeypatch.setattr(refit, "import_tensorrt", lambda backend: library)
    monkeypatch.setattr(refit, "gpus", lambda: ["simulated"])
    return library


def test_every_component_gets_the_weights_of_its_own_graph(
    stripped: Artifact, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch)
    done = refit.refit(stripped.path, tiny_onnx, tmp_path / "engines")
    for name, report in done.manifest.details["components"].items():
        content = (done.path / name / "model.plan").read_bytes()
        assert content == f"weights of {name}".encode()
        assert report["size_bytes"] == len(content) and report["verified"]
    assert done.manifest.details["weights_stripped"] is False
    assert done.manifest.config == stripped.manifest.config


def test_engines_that_have_their_weights_stay_as_they_are(
    stripped: Artifact, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch)
    partly = with_plans(stripped, tmp_path / "partly", {}, {"unet": {"weights_stripped": False}})
    done = refit.refit(partly.path, tiny_onnx, tmp_path / "engines")
    same = [name for name, entry in done.manifest.files.items() if entry == stripped.manifest.files[name]]
    assert [name for name in same if name.endswith(".plan")] == ["unet/model.plan"]


def test_in_place(
    stripped: Artifact, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch)
    path = shutil.copytree(stripped.path, tmp_path / "engines")
    assert not refit.refit(path, tiny_onnx, path, overwrite=True).manifest.details["weights_stripped"]


def test_the_build_command_again_after_refit_in_place_says_what_to_do_next(
    stripped: Artifact, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch)
    path = with_plans(stripped, tmp_path / "engines", {}, {}, config={"strip_weights": True}).path
    words = ["build-engine", str(tiny_onnx), "-o", str(path), "--strip-weights"]
    assert f"quest-deploy refit {path}" in CliRunner().invoke(main, words).output
    refit.refit(path, tiny_onnx, path, overwrite=True)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    assert f"quest-deploy generate {path}" in done.output and "refit" not in done.output


def test_weights_that_tensorrt_does_not_take_are_an_error_that_leaves_nothing(
    stripped: Artifact, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, RefusingParser)
    with pytest.raises(EngineBuildError, match=r"cannot put the weights of .*missing: conv.*--strip-weights"):
        refit.refit(stripped.path, tiny_onnx, tmp_path / "engines")
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_tensorrt_does_not_write_is_an_error(
    stripped: Artifact, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch)
    monkeypatch.setattr(SimulatedStrippedEngine, "serialize_with_config", lambda self, config: None)
    with pytest.raises(EngineBuildError, match=r"cannot put the weights of .*it gives no reason"):
        refit.refit(stripped.path, tiny_onnx, tmp_path / "engines")


def test_other_weights_are_refused(
    stripped: Artifact, make_onnx: Callable[..., Path], four_bit_unet: Callable[..., bytes], tmp_path: Path
) -> None:
    other = make_onnx(unet=four_bit_unet(cast=False))
    with pytest.raises(StaleArtifactError, match=r"unet: .* holds another graph or other weights"):
        refit.refit(stripped.path, other, tmp_path / "engines")


def changed_report(source: Artifact, path: Path, report: object) -> Path:
    """A copy of engines whose manifest says something else about the U-Net."""
    shutil.copytree(source.path, path)
    content = json.loads((path / "manifest.json").read_text())
    content["details"]["components"]["unet"] = report
    (path / "manifest.json").write_text(json.dumps(content))
    return path


def test_a_damaged_manifest_is_an_ordinary_error(stripped: Artifact, tiny_onnx: Path, tmp_path: Path) -> None:
    path = changed_report(stripped, tmp_path / "damaged", "x")
    with pytest.raises(
        ArtifactError, match=r"'unet' is 'x'; the manifest is damaged, make the engines again"
    ):
        refit.refit(path, tiny_onnx, tmp_path / "engines")


def test_engines_that_do_not_say_what_they_were_built_from_are_refused(
    stripped: Artifact, tiny_onnx: Path, tmp_path: Path
) -> None:
    report = dict(stripped.manifest.details["components"]["unet"])
    del report["graph_digest"]
    path = changed_report(stripped, tmp_path / "silent", report)
    with pytest.raises(StaleArtifactError, match=r"unet: .* holds another graph or other weights"):
        refit.refit(path, tiny_onnx, tmp_path / "engines")


def test_engines_with_weights_are_refused(tiny_onnx: Path, tmp_path: Path) -> None:
    build_engine(tiny_onnx, tmp_path / "built", BuildConfig())
    with pytest.raises(ArtifactError, match="hold their weights already"):
        refit.refit(tmp_path / "built", tiny_onnx, tmp_path / "engines")


def test_loading_engines_without_weights_says_what_to_run(stripped: Artifact) -> None:
    with pytest.raises(
        ArtifactError, match=rf"hold no weights; .*`quest-deploy refit {stripped.path} ONNX_DIR"
    ):
        load_engines(stripped.path)


@WITHOUT_A_GPU
def test_refit_without_a_gpu_is_one_message(stripped: Artifact, tiny_onnx: Path, tmp_path: Path) -> None:
    words = ["refit", str(stripped.path), str(tiny_onnx), "-o", str(tmp_path / "engines")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1 and len(done.stderr.splitlines()) == 1
    assert "needs the NVIDIA GPU that will run them" in done.stderr


@WITHOUT_A_GPU
def test_the_real_builder_cannot_leave_weights_out_without_a_driver(tiny_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingDependencyError, match=r"--strip-weights: TensorRT for RTX .* NVIDIA driver"):
        build_engine(tiny_onnx, tmp_path / "engines", BuildConfig(strip_weights=True))
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_does_not_parse_is_no_matter_of_the_driver(
    make_onnx: Callable[..., Path], asymmetric_unet: bytes, tmp_path: Path
) -> None:
    source = make_onnx(text_encoder=asymmetric_unet)
    with pytest.raises(EngineBuildError, match="text_encoder"):
        build_engine(source, tmp_path / "engines", BuildConfig(strip_weights=True))


def test_option_reaches_the_builder() -> None:
    import tensorrt_rtx as library

    assert builder_arguments(library, {"strip_weights": True}) == {"strip_plan": True}
    assert builder_arguments(library, {"strip_weights": False}) == {}


def test_the_library_has_what_refit_asks_for() -> None:
    import tensorrt_rtx as library

    assert hasattr(library.Refitter, "get_missing_weights") and hasattr(library.Refitter, "refit_cuda_engine")
    assert hasattr(library.OnnxParserRefitter, "refit_from_file")
    assert hasattr(library.ICudaEngine, "serialize_with_config")
    assert hasattr(library.ISerializationConfig, "clear_flag")
    assert "EXCLUDE_WEIGHTS" in library.SerializationFlag.__members__

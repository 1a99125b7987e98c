from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from quest_deploy import after_build, auto_fallback
from quest_deploy.after_build import Proof, compare, prove, prove_here
from quest_deploy.artifacts import read_artifact, write_artifact
from quest_deploy.commands import main
from quest_deploy.engines.inspector import DataType, EngineLayer
from quest_deploy.engines.libraries import gpus
from quest_deploy.engines.trt_plan import LoadedPlan
from quest_deploy.errors import ArtifactError, ConfigError, MissingDependencyError
from quest_deploy.export.lint.report import Execution, Layer
from tests.engines.simulated_trt import SPEC, SimulatedEngine, simulated_library


def promised(execution: Execution, name: str = "conv") -> Layer:
    return Layer(
        component="unet", name=name, op_type="Conv", operands=(), execution=execution, reasons=(), macs=None
    )


def built(precision: DataType, *sources: str, weights: DataType = "unknown") -> EngineLayer:
    return EngineLayer(
        name="layer", kind="", precision=precision, weights=weights, tactic="", sources=sources or ("conv",)
    )


@pytest.mark.parametrize(
    ("execution", "layer", "verdict"),
    [
        ("int8", built("int8"), "kept"),
        ("int8", built("fp16"), "worse"),
        ("int8", built("unknown"), "unknown"),
        ("float", built("fp16"), "kept"),
        ("float", built("int8"), "better"),
        ("int4 storage", built("fp16", weights="int4"), "kept"),
        ("int4 storage", built("fp16", weights="fp16"), "worse"),
        ("int4 storage", built("fp16"), "unknown"),
        ("int8", built("int8", "another"), "unknown"),
    ],
)
def test_verdict_follows_promise_and_precision(
    execution: Execution, layer: EngineLayer, verdict: str
) -> None:
    (row,) = compare([promised(execution)], [layer])
    assert row.verdict == verdict


def test_layer_that_names_no_precision_does_not_hide_one_that_does() -> None:
    layers = [built("fp32", "conv"), built("int8", "add", "conv"), built("unknown", "conv")]
    (row,) = compare([promised("int8")], layers)
    assert row.layer is layers[1] and row.verdict == "kept"


def test_proof_holds_where_nothing_is_worse_and_something_is_known() -> None:
    def proof(*precisions: DataType) -> Proof:
        rows = [row for one in precisions for row in compare([promised("int8")], [built(one)])]
        return Proof(rows=tuple(rows))

    assert proof("int8", "unknown")
    assert not proof("int8", "fp16")
    assert not proof("unknown")
    assert proof("int8", "fp16").to_json()["counts"] == {"kept": 1, "better": 0, "worse": 1, "unknown": 0}


def test_products_that_are_worse_than_promised_are_named() -> None:
    layers = [(promised("int8"), built("int8")), (promised("int8", "up.conv"), built("fp16", "up.conv"))]
    rows = [row for product, layer in layers for row in compare([product], [layer])]
    shown = Proof(rows=(*rows, *compare([promised("int8", "down.conv")], []))).describe()
    assert "of 3 products 1 run as lint promised, 0 in lower precision, 1 in higher; of 1 the" in shown
    assert shown.splitlines()[1:] == ["unet: up.conv was promised int8, and is fp16"]


def test_layers_are_told_of_engines_with_ranges_of_shapes_and_weights_that_may_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {"backend": "tensorrt", "weight_streaming": True}
    with write_artifact(tmp_path / "engines", stage="engines", config=config):
        pass
    cuda, library = SimulatedEngine(), simulated_library(lambda log, plan: None)
    plans = {"unet": LoadedPlan("unet", library, cuda)}
    monkeypatch.setattr(after_build, "check_gpu", lambda path: None)
    monkeypatch.setattr(after_build, "import_tensorrt", lambda backend: library)
    monkeypatch.setattr(after_build, "lint", lambda path, target: SimpleNamespace(layers=[promised("int8")]))
    monkeypatch.setattr(after_build, "plan_specs", lambda source: {"unet": SPEC})
    monkeypatch.setattr(after_build, "load_plans", lambda source, library, backend: plans)
    assert prove(tmp_path / "engines", tmp_path, backend="tensorrt").counts()["kept"] == 1
    assert cuda.weight_streaming_budget_v2 == 0


@pytest.mark.parametrize("loaded", [True, False])
def test_build_engine_tells_of_layers_where_the_gpu_loads_what_it_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: bool
) -> None:
    engines = tmp_path / "engines"
    with write_artifact(engines, stage="engines", config={"backend": "tensorrt-rtx"}) as writer:
        writer.details["verified"] = loaded
    proof = Proof(rows=tuple(compare([promised("int8")], [built("fp16")])))
    monkeypatch.setattr(auto_fallback, "build_engine", lambda *args, **options: read_artifact(engines))
    monkeypatch.setattr(after_build, "prove", lambda *args, **options: proof)
    done = CliRunner().invoke(main, ["build-engine", "onnx", "-o", str(engines), "--json"])
    assert done.exit_code == 0
    told = json.loads(done.stdout).get("layers")
    assert told == (json.loads(json.dumps(proof.to_json())) if loaded else None)


def test_layers_that_nobody_can_tell_of_do_not_fail_a_build(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise ArtifactError("TensorRT's engine inspector gave no JSON")

    with write_artifact(tmp_path / "engines", stage="engines", config={"backend": "tensorrt-rtx"}):
        pass
    monkeypatch.setattr(after_build, "prove", refuse)
    assert prove_here(read_artifact(tmp_path / "engines"), tmp_path) is None
    assert "inspector gave no JSON" in caplog.text


def test_engines_of_the_other_flavour_are_refused(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "engines", stage="engines", config={"backend": "tensorrt"}):
        pass
    with pytest.raises(ConfigError, match="backend is tensorrt-rtx, but the engines"):
        prove(tmp_path / "engines", tmp_path, backend="tensorrt-rtx")


@pytest.mark.skipif(bool(gpus()), reason="this machine has a GPU")
def test_without_a_gpu_there_is_no_proof(tmp_path: Path) -> None:
    with write_artifact(tmp_path / "engines", stage="engines", config={"backend": "tensorrt-rtx"}):
        pass
    with pytest.raises(MissingDependencyError, match="need an NVIDIA GPU"):
        prove(tmp_path / "engines", tmp_path, backend="tensorrt-rtx")

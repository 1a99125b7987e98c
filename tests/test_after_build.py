from __future__ import annotations

from pathlib import Path

import pytest

from quest_deploy.after_build import Proof, compare, prove
from quest_deploy.artifacts import write_artifact
from quest_deploy.engines.inspector import DataType, EngineLayer
from quest_deploy.engines.libraries import gpus
from quest_deploy.errors import ConfigError, MissingDependencyError
from quest_deploy.export.lint.report import Execution, Layer


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

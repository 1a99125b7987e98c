"""Codes of TensorRT engines, which ONNX Runtime simulates here: a test of the way there, and no result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from quest_deploy.artifacts import write_artifact
from quest_deploy.config import ParityConfig
from quest_deploy.engines import debug_engine
from quest_deploy.errors import EngineBuildError
from quest_deploy.parity import codes as parity_codes
from quest_deploy.parity import run as parity_run
from quest_deploy.parity.codes import FlipReport, compare_codes, engine_codes, take_codes, torch_codes
from tests.parity.test_codes import TinyDenoiser, probe, qdq_graph

SimulatedRuns = list[tuple[str, Path, int]]


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> SimulatedRuns:
    """What was run: backend, folder of the weights, and how many calls."""
    seen: SimulatedRuns = []

    def run_graph(
        graph: Any, weights: Path, calls: Sequence[Mapping[str, Tensor]], *, backend: str
    ) -> list[dict[str, Tensor]]:
        seen.append((backend, weights, len(calls)))
        return parity_codes._run_onnxruntime(graph, weights, calls)

    monkeypatch.setattr(debug_engine, "run_graph", run_graph)
    return seen


def test_an_engine_that_computes_the_same_has_the_same_codes(
    simulated: SimulatedRuns, tmp_path: Path
) -> None:
    upper = torch_codes(TinyDenoiser(), probe())
    found = engine_codes(
        qdq_graph(tmp_path / "model.onnx"), [probe(), probe()], [upper.codes] * 2, "tensorrt-rtx"
    )
    assert not isinstance(found, str)
    flips = compare_codes([upper, upper], found)
    assert isinstance(flips, FlipReport) and flips.total.differing == 0 and flips.unmatched == ()
    assert simulated == [("tensorrt-rtx", tmp_path, 2)]


def test_the_layer_where_an_engine_differs_is_named(simulated: SimulatedRuns, tmp_path: Path) -> None:
    upper = torch_codes(TinyDenoiser(), probe())
    found = engine_codes(qdq_graph(tmp_path / "model.onnx", error=0.05), [probe()], [upper.codes], "tensorrt")
    assert not isinstance(found, str)
    flips = compare_codes([upper], found)
    assert isinstance(flips, FlipReport)
    assert flips.worst.layer == "second" and flips.layers[0].flips.differing == 0


def pipeline(backend: str) -> Any:
    return SimpleNamespace(backend=backend, denoiser_spec=SimpleNamespace(name="unet"), path=Path("engines"))


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt-rtx"])
def test_without_the_graph_the_reason_says_what_to_add(backend: str) -> None:
    reason = take_codes(pipeline(backend), Any, ())  # type: ignore[arg-type]
    assert isinstance(reason, str) and "--debug-engines" in reason and "--via" in reason


def test_with_the_graph_the_engine_is_asked(
    simulated: SimulatedRuns, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "unet").mkdir()
    qdq_graph(tmp_path / "unet" / "model.onnx")
    given = parity_codes.Probe(component="", inputs=probe())
    monkeypatch.setattr(parity_codes, "make_probes", lambda *_: (given,))
    upper = torch_codes(TinyDenoiser(), probe())
    found = take_codes(pipeline("tensorrt-rtx"), Any, (), [upper.codes], tmp_path)  # type: ignore[arg-type]
    assert not isinstance(found, str)
    flips = compare_codes([upper], found)
    assert isinstance(flips, FlipReport) and flips.total.differing == 0


def rung(stage: str, digest: str, made_from: str = "") -> Any:
    return SimpleNamespace(
        rung=SimpleNamespace(stage=stage, digest=digest, inputs={"onnx": made_from}, path=Path(digest))
    )


def test_the_graph_is_the_one_that_the_engines_were_built_from(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fallback: list[str] = []
    monkeypatch.setattr(parity_run, "left_in_float", lambda path: fallback)
    above = [rung("model", "m"), rung("onnx", "other"), rung("onnx", "graph")]
    wanted, engines = ParityConfig(debug_engines=True), rung("engines", "e", "graph").rung
    assert parity_run.debug_source(engines, above, wanted) == Path("graph")
    assert parity_run.debug_source(engines, above, ParityConfig()) is None
    assert parity_run.debug_source(engines, above[:2], wanted) is None
    assert parity_run.debug_source(rung("onnx", "o", "graph").rung, above, wanted) is None
    fallback.append("unet")
    assert parity_run.debug_source(engines, above, wanted) is None
    assert "--auto-fallback left products of these engines in float" in caplog.text


def test_engines_that_fell_back_are_known_by_their_manifest(tmp_path: Path) -> None:
    components = {
        "unet": {"auto_fallback": {"left_in_float": ["conv_in"]}},
        "vae_decoder": {"auto_fallback": {}},
    }
    with write_artifact(tmp_path / "engines", stage="engines", config={}) as writer:
        writer.details["components"] = components
    assert parity_run.left_in_float(tmp_path / "engines") == ["unet"]


def test_a_debug_engine_that_cannot_be_built_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise EngineBuildError("unet: no kernel for an int8 output")

    monkeypatch.setattr(parity_run, "take_codes", refuse)
    upper = torch_codes(TinyDenoiser(), probe())
    found = parity_run._flips([upper], pipeline("tensorrt"), Any, SimpleNamespace(prompts=()), Path())  # type: ignore[arg-type]
    assert found == "no debug engine could be built: unet: no kernel for an int8 output"


def test_codes_are_taken_on_the_cpu(simulated: SimulatedRuns, tmp_path: Path) -> None:
    upper = torch_codes(TinyDenoiser(), probe())
    found = engine_codes(qdq_graph(tmp_path / "model.onnx"), [probe()], [upper.codes], "tensorrt")
    assert not isinstance(found, str)
    assert {codes.dtype for codes in found[0].codes.values()} == {torch.int8}

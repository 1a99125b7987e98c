"""The gate that a quantized export is held to: torch's codes are ONNX Runtime's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from quest_deploy.parity.codes import FlipReport, compare_codes, onnxruntime_codes, torch_codes


def assert_codes_agree(module: nn.Module, graph: Path, probes: Sequence[Mapping[str, Tensor]]) -> None:
    """Run `probes` through a wrapped component and its ONNX file, which is given torch's codes, and compare.

    Float operators between the products may round differently: DESIGN §7 allows one code in 10^4, by one.
    """
    upper = [torch_codes(module, probe) for probe in probes]
    lower = onnxruntime_codes(graph, probes, [run.codes for run in upper])
    assert not isinstance(lower, str), lower
    found = compare_codes(upper, lower)
    assert isinstance(found, FlipReport) and found.unmatched == ()
    assert found.total.differing <= 1e-4 * found.total.places and found.total.max_difference <= 1
    assert float(found.noise_snr_db.min()) >= 50

"""What the tables of export modes and of large exports say of results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import large, modes, stages
from benchmarks.settings import Settings
from tests.benchmarks import results as made_up


def cells(label: str) -> tuple[str, ...]:
    (table,) = modes.tables(made_up.modes())
    (row,) = [row for row in table.rows if row[1] == label]
    return row


def test_a_quantized_model() -> None:
    assert cells("int8, fp32") == (
        *("flux", "int8, fp32", "3 of 4", "75 %", "0 %", "25 %", "yes", "123.4", "1.0e-05"),
        *("2 MatMulIntegerToFloat", "3 of 4", "yes"),
    )


def test_what_fails_is_said() -> None:
    *_, gates, lowest, codes, fused, openvino, builds = cells("none, fp32")
    assert (gates, lowest, fused, openvino, builds) == (
        "**no**, VAE decoder SNR",
        "12.0",
        "none",
        "unsupported",
        "**no**",
    )
    assert codes not in ("0.0e+00", "yes")


def test_a_gate_that_was_not_measured_is_not_kept() -> None:
    result = made_up.modes()
    result["kinds"]["flux"]["int8, fp32"]["gates"]["noise SNR, same codes"] |= {
        "measured": None,
        "passed": None,
    }
    (table,) = modes.tables(result)
    assert table.rows[0][table.columns.index("gates kept")] == "**no**, noise SNR, same codes"


def test_rows_of_other_libraries_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"openvino": "1"}

    def measure(kind: str, variant: modes.Variant, folder: Path) -> dict[str, str]:
        folder.mkdir(parents=True, exist_ok=True)
        return versions.copy()

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(modes, "VARIANTS", modes.VARIANTS[:1])
    monkeypatch.setattr(modes, "measure", measure)
    monkeypatch.setattr(stages, "tool_versions", lambda: versions)
    for versions["openvino"] in ("1", "2"):
        row = modes.rows(Settings(quick=True), ["flux"])["flux"]["int8, fp32"]
        assert row["openvino"] == versions["openvino"]


@pytest.mark.parametrize(("peak", "kept"), [(2_000_000_000, "yes"), (8_000_000_000, "**no**")])
def test_a_large_export_is_held_to_its_limit(peak: int, kept: str) -> None:
    result = made_up.large()
    result["export"]["peak_memory_bytes"] = peak
    (table,) = large.tables(result)
    assert table.rows[0][-2:] == (kept, "1")

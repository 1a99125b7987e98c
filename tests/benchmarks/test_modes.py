"""What the tables of export modes and of large exports say of results."""

from __future__ import annotations

import pytest

from benchmarks import large, modes
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


@pytest.mark.parametrize(("peak", "kept"), [(2_000_000_000, "yes"), (8_000_000_000, "**no**")])
def test_a_large_export_is_held_to_its_limit(peak: int, kept: str) -> None:
    result = made_up.large()
    result["export"]["peak_memory_bytes"] = peak
    (table,) = large.tables(result)
    assert table.rows[0][-2:] == (kept, "1")

"""Other ways to quantize, on the same calibration data and judged like QuEST."""

from benchmarks.baselines.harness import NAME, run
from benchmarks.baselines.tables import tables

__all__ = ["NAME", "run", "tables"]

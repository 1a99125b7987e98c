"""Makes the checkout's `benchmarks` and `scripts` importable, which are not installed."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in sys.path:
    # Last: the checkout's `export` and `engines` must not hide anything.
    sys.path.append(ROOT)

"""Fixtures and settings that every test shares."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch or ONNX Runtime are imported: two threads are as fast as many on models this small, and give the same
# bits on every machine.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def reference_model() -> Path:
    """The bundled diffusers pipeline."""
    return ROOT / "reference-model" / "pipeline"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)
    np.random.seed(0)

"""diffusers and transformers, which expect one thread at a time: to import them, and to load models."""

from __future__ import annotations

import importlib
import threading
from typing import Any

LIBRARIES = ("diffusers", "transformers")

# Both put another module in their place when they have been imported. A thread that waits for that gets the first one,
# which has no classes.
_IMPORTING = threading.Lock()

LOADING = threading.RLock()
"""Held while models are loaded: meanwhile, accelerate leaves the parameters of all that any thread builds empty."""


def import_libraries() -> None:
    """Import both, before anything imports a part of them."""
    with _IMPORTING:
        for library in LIBRARIES:
            importlib.import_module(library)


def class_of(library: str, name: str) -> Any:
    """The class of that name in one of them; None where there is none."""
    with _IMPORTING:
        return getattr(importlib.import_module(library), name, None)

"""What TensorRT says, kept for messages."""

from __future__ import annotations

import functools
import logging
from typing import Any

logger = logging.getLogger(__name__)

LAST = 3
"""Errors that a message quotes: those behind them are what TensorRT made of the first."""


@functools.cache  # the first logger that TensorRT is given serves it until the process ends
def make_log(library: Any) -> Any:
    """A TensorRT logger that keeps errors, in its `errors`, for messages."""

    class Log(library.ILogger):
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (library.ILogger.Severity.ERROR, library.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(" ".join(message.split()))
                logger.debug("TensorRT: %s", message)

    return Log()


def last_words(library: Any) -> str:
    """The last errors that `library` logged, in brackets behind a space; empty where there were none."""
    errors = make_log(library).errors[-LAST:]
    return f" ({'; '.join(errors)})" if errors else ""

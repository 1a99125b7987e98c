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


def errors_so_far(library: Any) -> int:
    """How many errors `library` has logged; what a call adds to them is its own."""
    return len(make_log(library).errors)


def last_words(library: Any, since: int) -> str:
    """The last errors that `library` logged after its first `since`, in brackets behind a space; "" without any."""
    errors = make_log(library).errors[since:][-LAST:]
    return f" ({'; '.join(errors)})" if errors else ""

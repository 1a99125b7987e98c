"""What configurations check, so that everything wrong with one is reported at once."""

from __future__ import annotations

import math

from quest_deploy.errors import ConfigError


def raise_if_any(problems: list[str], what: str) -> None:
    """Raise one :class:`ConfigError` that lists every problem."""
    if problems:
        raise ConfigError(f"{what}: " + "; ".join(problems))


def one_of(problems: list[str], name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Note a problem where `value` is not one of `allowed`."""
    if value not in allowed:
        problems.append(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


def at_least(problems: list[str], minimum: float, **values: float) -> None:
    """Note a problem for each named value that is not finite, or below `minimum`."""
    for name, value in values.items():
        if not value >= minimum:
            problems.append(f"{name} is {value}, expected at least {minimum:g}")
        elif value == math.inf:
            problems.append(f"{name} is {value}, expected a finite number")

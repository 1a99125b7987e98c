"""What configurations check, so that everything wrong with one is reported at once."""

from __future__ import annotations

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
    """Note a problem for each named value below `minimum` (a NaN is below)."""
    problems.extend(
        f"{name} is {value}, expected at least {minimum:g}"
        for name, value in values.items()
        if not value >= minimum
    )

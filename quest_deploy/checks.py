"""What configurations check, so that everything wrong with one is reported at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Integral, Real

from quest_deploy.errors import ConfigError

# The largest seed that generators of torch take.
MAX_SEED = 2**64 - 1


def raise_if_any(problems: list[str], what: str) -> None:
    """Raise one :class:`ConfigError` that lists every problem."""
    if problems:
        raise ConfigError(f"{what}: " + "; ".join(problems))


def one_of(problems: list[str], name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Note a problem where `value` is not one of `allowed`."""
    if value not in allowed:
        problems.append(f"{name} is {value!r}, expected one of {', '.join(allowed)}")


def at_least(problems: list[str], minimum: float, **values: float) -> None:
    """Note a problem for each named value that is no finite number, or below `minimum`."""
    for name, value in values.items():
        if not _is_a(Real, value):
            problems.append(f"{name} is {value!r}, expected a number")
        elif not value >= minimum:
            problems.append(f"{name} is {value}, expected at least {minimum:g}")
        elif value == math.inf:
            problems.append(f"{name} is {value}, expected a finite number")


def whole_at_least(problems: list[str], minimum: int, **values: int) -> None:
    """Note a problem for each named value that is no whole number, or below `minimum`."""
    for name, value in values.items():
        if is_whole(value):
            at_least(problems, minimum, **{name: value})
        else:
            problems.append(f"{name} is {value!r}, expected a whole number")


def is_whole(value: object) -> bool:
    """Whether `value` is a whole number."""
    return _is_a(Integral, value)


def _is_a(kind: type, value: object) -> bool:
    """Whether `value` is a number of that kind: not True, nor text."""
    return isinstance(value, kind) and not isinstance(value, bool)


def seeds_fit(problems: list[str], seed: int, count: int) -> None:
    """Note a problem where `seed`, or one of the `count` - 1 after it, is none that torch takes."""
    before = len(problems)
    whole_at_least(problems, 0, seed=seed)
    if len(problems) > before:
        return
    last = MAX_SEED + 1 - max(1, count)
    if seed > last:
        problems.append(
            f"seed is {seed}, expected at most {last} (the last of {max(1, count)} may be 2^64 - 1)"
        )


def count_of(texts: object) -> int:
    """How many texts were given; 0 where they are not several (:func:`are_text` notes that)."""
    return len(texts) if isinstance(texts, Sequence) and not isinstance(texts, str) else 0


def are_text(problems: list[str], name: str, texts: Iterable[object] | None) -> None:
    """Note a problem for the first of `texts` that is not text: a terminal's bytes in another encoding than UTF-8.

    One text in place of several is a problem, too: its letters would pass for them.
    """
    if isinstance(texts, str) or not isinstance(texts, Iterable):
        problems.append(f"{name}s are {texts!r}, expected a tuple of texts: ({texts!r},)")
        return
    for text in texts:
        if not isinstance(text, str):
            problems.append(f"{name} is {text!r}, expected a text")
            return
        try:
            text.encode()
        except UnicodeEncodeError:
            problems.append(f"{name} {text!r} is not UTF-8 text, expected it in that encoding")
            return

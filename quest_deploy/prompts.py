"""Prompt lists: one prompt a line, `#` starts a comment line, blank lines are skipped."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Literal

from quest_deploy.errors import ConfigError

PromptList = Literal["calibration", "heldout"]


def load_prompts(path: Path | None = None, *, default: PromptList = "calibration") -> tuple[str, ...]:
    """Read the prompts of a file, or of a packaged list where no file is given.

    Args:
        path: A text file in UTF-8; None reads the packaged list.
        default: Which packaged list: `calibration` (256 prompts) or `heldout` (64). They are disjoint.

    Returns:
        The prompts in the file's order, surrounding white space removed.

    Raises:
        ConfigError: If the file is missing, is not text, or holds no prompt.
    """
    if path is None:
        packaged = resources.files("quest_deploy") / "data" / "prompts" / f"{default}.txt"
        return parse_prompts(packaged.read_text(encoding="utf-8"))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise not_text(path) from error
    except OSError as error:
        raise ConfigError(
            f"prompt file {path}: cannot be read ({error.strerror}); give a text file with one prompt a line"
        ) from error
    if "\0" in text:
        raise not_text(path)
    prompts = parse_prompts(text)
    if not prompts:
        raise ConfigError(
            f"prompt file {path}: got no prompt, expected one a line ('#' starts a comment line)"
        )
    return prompts


def parse_prompts(text: str) -> tuple[str, ...]:
    """Return the prompts in `text`: its lines without blank ones and comments."""
    lines = (line.strip() for line in text.removeprefix("\ufeff").splitlines())
    return tuple(line for line in lines if line and not line.startswith("#"))


def not_text(path: Path) -> ConfigError:
    """Return the error for a file that is not UTF-8 text."""
    return ConfigError(
        f"prompt file {path}: got binary data, expected UTF-8 text; convert it or give another file"
    )

"""What every verb shares: --json and --verbose, results on standard output, and errors as messages."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import click

from quest_deploy.artifacts import Artifact
from quest_deploy.errors import QuestDeployError
from quest_deploy.files import plain, storage_error

DONE = 0
ERROR = 1
OVER_BUDGET = 3
INTERRUPTED = 130
TERMINATED = 143

_TERMINAL = "quest_deploy.terminal"

NOTHING_LEFT = "nothing half-written was left; run the same command again"

# How torch tells of a process that is gone: by its own types, and in gloo's words.
_LOST_PEER, _PEER_CLOSED = ("DistNetworkError", "DistBackendError"), "Connection closed by peer"

logger = logging.getLogger("quest_deploy")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a verb found: `data` for --json, `text` for people."""

    data: dict[str, Any]
    text: str
    exit_code: int = DONE


class Terminated(BaseException):
    """SIGTERM, raised where the process is, so that unfinished artifacts are removed on the way out."""


output_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="DIR", help="Directory to make."
)
overwrite_option = click.option(
    "--overwrite", is_flag=True, help="Replace an artifact of the same kind that is there already."
)


def verb(
    *, when_interrupted: str = NOTHING_LEFT, together: bool = False
) -> Callable[[Callable[..., Result]], Callable[..., None]]:
    """Decorate the body of a command: it returns a :class:`Result` and raises :class:`QuestDeployError`.

    Args:
        when_interrupted: What to tell somebody who pressed Ctrl-C.
        together: Whether several processes may run it as one, of which the first alone prints the result.
    """

    def decorate(body: Callable[..., Result]) -> Callable[..., None]:
        @click.option(
            "--json", "as_json", is_flag=True, help="Print one JSON object; all else goes to stderr."
        )
        @click.option("-v", "--verbose", is_flag=True, help="Debug messages, and the traceback of an error.")
        @functools.wraps(body)
        def command(*, as_json: bool, verbose: bool, **options: Any) -> None:
            started = time.monotonic()
            number = int(os.environ.get("RANK", "0")) if together and "WORLD_SIZE" in os.environ else 0
            failure: tuple[str, str, int] | None = None
            _escape_what_streams_cannot_encode()
            click.get_current_context().meta[_TERMINAL] = sys.stdout is not None and sys.stdout.isatty()
            with _standard_output_for_the_result(), _terminated_as_exception(), _logs_on_stderr(verbose):
                try:
                    result = body(**options)
                except click.ClickException:
                    raise
                except (Exception, KeyboardInterrupt, Terminated) as error:
                    failure = _explain(error, when_interrupted, number)
                    if verbose:
                        with contextlib.suppress(OSError):
                            traceback.print_exc()
            if failure is not None:
                kind, message, code = failure
                _print(f"Error: {message}" if code == ERROR else message, err=True)
                if as_json and number == 0:
                    _print(json.dumps({"error": {"type": kind, "message": message}}))
                sys.exit(code)
            if number > 0:
                refused = None
            elif as_json:
                seconds = round(time.monotonic() - started, 3)
                found = plain({**result.data, "seconds": seconds})
                refused = _print(json.dumps(found, ensure_ascii=False, allow_nan=False))
            else:
                refused = _print(result.text)
            if refused is not None:
                message = (
                    f"Error: the result cannot be written to standard output ({refused.strerror}); send it elsewhere. "
                    "A directory that was to be made is there, whole"
                )
                _print(message, err=True)
                sys.exit(ERROR)
            _print("", err=True, nl=False)  # what the log left in the buffer
            sys.exit(result.exit_code)

        return command

    return decorate


def _escape_what_streams_cannot_encode() -> None:
    """Let names and prompts be printed whatever encoding the streams have, as Python does for standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _print(text: str, *, err: bool = False, nl: bool = True) -> OSError | None:
    """Write to standard output or error; what the operating system says where it refuses.

    A reader that closed its end of standard output, such as `head`, is left to click.
    """
    try:
        click.echo(text, err=err, nl=nl)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and not err:
            raise
        # What is left in the buffer Python would try to write again at the end, and exit with 120.
        with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), (sys.stderr if err else sys.stdout).fileno())
        return error
    return None


def result_to_terminal() -> bool:
    """Whether the result of the verb that runs goes to a terminal; its body sees standard error in that place."""
    return bool(click.get_current_context().meta[_TERMINAL])


def _explain(error: BaseException, when_interrupted: str, number: int = 0) -> tuple[str, str, int]:
    """Type, one message and exit code for whatever ended a verb, or its process of that number."""
    # A library that is being imported may raise an error of its own for it.
    signals = [one for one in _chain(error) if isinstance(one, KeyboardInterrupt | Terminated)]
    if signals and isinstance(signals[0], KeyboardInterrupt):
        return "Interrupted", f"Interrupted: {when_interrupted}", INTERRUPTED
    if signals:
        return "Terminated", f"Terminated: {when_interrupted}", TERMINATED
    kind, message, code = _explain_error(error)
    if any(type(one).__name__ in _LOST_PEER or _PEER_CLOSED in str(one) for one in _chain(error)):
        message = "another process of this run ended; see its message"
    return kind, message if number == 0 else f"process {number}: {message}", code


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it was raised for."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        yield one
        seen.add(id(one))
        one = one.__cause__ or one.__context__


def _explain_error(error: BaseException) -> tuple[str, str, int]:
    known = error if isinstance(error, QuestDeployError) else storage_error(error, Path.cwd())
    if known is not None:
        return type(known).__name__, str(known), ERROR
    first_line = (str(error).strip().splitlines() or ["no message"])[0]
    if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for this
        message = (
            f"the GPU's memory does not suffice ({first_line}); close other programs on it, or ask for less at a time: "
            "fewer or smaller images, a smaller --batch-size, or `memory_limit_gb` in a recipe"
        )
        return type(error).__name__, message, ERROR
    message = (
        f"unexpected {type(error).__name__}: {first_line}. This is a fault of quest-deploy: "
        "run the command again with -v for the traceback, and report it with the output of `quest-deploy doctor`"
    )
    return type(error).__name__, message, ERROR


@contextlib.contextmanager
def _standard_output_for_the_result() -> Iterator[None]:
    """Send what libraries print, from Python or from C++, to standard error."""
    _fill_closed_streams()
    with contextlib.ExitStack() as restore:
        restore.enter_context(contextlib.redirect_stdout(sys.stderr))
        saved = os.dup(1)
        restore.callback(os.close, saved)
        restore.callback(os.dup2, saved, 1)
        os.dup2(2, 1)
        yield


def _fill_closed_streams() -> None:
    """Open the null device as a standard stream that is closed, before a file gets its number, and what C++ prints."""
    for number in (1, 2):
        try:
            os.fstat(number)
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            if nowhere != number:
                os.close(nowhere)


@contextlib.contextmanager
def _terminated_as_exception() -> Iterator[None]:
    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _StderrHandler(logging.Handler):
    """Writes to whatever sys.stderr is at the time: a progress bar puts itself in its place.

    A line that cannot be written, on a full disk for one, ends no work.
    """

    def emit(self, record: logging.LogRecord) -> None:
        stream: TextIO | None = sys.stderr  # None where it was closed before Python started
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.write(self.format(record) + "\n")


@contextlib.contextmanager
def _logs_on_stderr(verbose: bool) -> Iterator[None]:
    """Show this package's log; the libraries' warnings are for developers and appear with --verbose."""
    handler = _StderrHandler()
    handler.setFormatter(
        logging.Formatter("%(levelname)s %(name)s: %(message)s" if verbose else "%(message)s")
    )
    if not verbose:
        # Both libraries read these once, when they are imported, which happens inside the verb.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG if verbose else logging.INFO)
    try:
        with warnings.catch_warnings():
            if not verbose:
                warnings.simplefilter("ignore")
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def artifact_result(artifact: Artifact, next_step: str = "", **data: Any) -> Result:
    """The result of a verb that wrote `artifact`."""
    manifest = artifact.manifest
    size_bytes = sum(entry.size_bytes for entry in manifest.files.values())
    text = f"{artifact.path}: {manifest.stage}, {len(manifest.files)} files, {format_size(size_bytes)}"
    return Result(
        data={
            "path": str(artifact.path),
            "stage": manifest.stage,
            "digest": artifact.digest,
            "size_bytes": size_bytes,
            "details": manifest.details,
            **data,
        },
        text=f"{text}\nNext: {next_step}" if next_step else text,
    )


def format_size(size_bytes: int) -> str:
    """`size_bytes` in the unit that reads best; decimal units, as disks are sold."""
    size = float(size_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def format_table(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns aligned on the left, two spaces apart."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))] if rows else []
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)

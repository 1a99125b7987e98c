"""What every verb does with results, errors, signals and the output of libraries."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
from typing import Any

import click
import pytest
import torch
from click.testing import CliRunner, Result

from quest_deploy.commands.verb import Result as VerbResult
from quest_deploy.commands.verb import Terminated, format_size, format_table, verb
from quest_deploy.errors import ConfigError


def run(body: object, *arguments: str) -> Result:
    command = click.command()(verb(when_interrupted="go on with --resume")(body))  # type: ignore[arg-type]
    return CliRunner().invoke(command, list(arguments))


def succeed() -> VerbResult:
    return VerbResult(data={"path": "x"}, text="x: done")


def fail_with(error: BaseException) -> object:
    def body() -> VerbResult:
        raise error

    return body


def test_text_goes_to_standard_output() -> None:
    done = run(succeed)
    assert (done.exit_code, done.stdout, done.stderr) == (0, "x: done\n", "")


def test_json_is_one_object() -> None:
    done = run(succeed, "--json")
    assert json.loads(done.stdout)["path"] == "x"
    assert json.loads(done.stdout)["seconds"] >= 0


def test_json_has_no_word_for_what_is_not_finite() -> None:
    done = run(lambda: VerbResult(data={"psnr": [float("inf"), float("nan"), 1.5]}, text=""), "--json")
    refuse = pytest.fail  # JavaScript and most other readers take no NaN
    assert json.loads(done.stdout, parse_constant=refuse)["psnr"] == [None, None, 1.5]


def test_exit_code_of_the_result_is_used() -> None:
    assert run(lambda: VerbResult(data={}, text="", exit_code=3)).exit_code == 3


def test_error_is_a_message_without_traceback() -> None:
    done = run(fail_with(ConfigError("steps is 0, expected at least 1")))
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == "Error: steps is 0, expected at least 1\n"


def test_error_with_json_is_on_both_streams() -> None:
    done = run(fail_with(ConfigError("steps is 0")), "--json")
    assert json.loads(done.stdout) == {"error": {"type": "ConfigError", "message": "steps is 0"}}
    assert done.stderr == "Error: steps is 0\n"


def test_verbose_adds_the_traceback() -> None:
    assert "Traceback" in run(fail_with(ConfigError("x")), "-v").stderr


def test_unexpected_error_says_how_to_report_it() -> None:
    done = run(fail_with(ZeroDivisionError("division by zero\nmore")))
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: unexpected ZeroDivisionError: division by zero. ")
    assert "-v for the traceback" in done.stderr
    assert "Traceback" not in done.stderr


def test_gpu_without_memory_left_is_no_fault_and_says_what_to_do() -> None:
    done = run(fail_with(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")))
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "Tried to allocate 2 GiB" in done.stderr and "--batch-size" in done.stderr


def test_storage_error_outside_artifacts_is_explained() -> None:
    done = run(fail_with(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/tmp/x")))
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "'/tmp/x': the disk is full" in done.stderr


def test_ctrl_c_is_130_and_says_how_to_go_on() -> None:
    done = run(fail_with(KeyboardInterrupt()))
    assert (done.exit_code, done.stderr) == (130, "Interrupted: go on with --resume\n")


def test_usage_error_is_2() -> None:
    assert run(fail_with(click.UsageError("give one"))).exit_code == 2
    assert run(succeed, "--nonsense").exit_code == 2


def test_what_libraries_print_goes_to_standard_error() -> None:
    """From Python and from below Python; in a process of its own, since pytest owns the streams here."""
    code = (
        "import os, click\nfrom quest_deploy.commands.verb import Result, verb\n"
        "def body():\n    print('python')\n    os.write(1, b'native\\n')\n"
        "    return Result(data={'a': 1}, text='result')\nclick.command()(verb()(body))()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "result\n")
    assert "python\n" in done.stderr and "native\n" in done.stderr


def test_log_of_this_package_is_on_standard_error() -> None:
    def body() -> VerbResult:
        logging.getLogger("quest_deploy.x").info("exporting unet")
        logging.getLogger("quest_deploy.x").debug("detail")
        return succeed()

    assert run(body).stderr == "exporting unet\n"
    assert "detail" in run(body, "-v").stderr


REPORT = """
import logging, click
from quest_deploy.commands.verb import Result, verb
def body():
    logging.getLogger("quest_deploy.x").info("at work")
    return Result(data={"prompt": "caf\u00e9 \u2026"}, text="caf\u00e9 \u2026")
click.command()(verb()(body))()
"""


def run_report(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """A verb that logs a line and has a result, in a process of its own with real streams."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    return subprocess.run([sys.executable, "-c", REPORT, *arguments], **streams)


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_result_that_cannot_be_written_is_one_message(arguments: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        done = run_report(*arguments, stdout=full)
    assert done.returncode == 1
    assert done.stderr == (
        "at work\nError: the result cannot be written to standard output (No space left on device); send it "
        "elsewhere. A directory that was to be made is there, whole\n"
    )


def test_log_that_cannot_be_written_ends_no_work() -> None:
    with open("/dev/full", "w") as full:
        done = run_report(stderr=full)
    assert (done.returncode, done.stdout) == (0, "café …\n")


def test_exit_code_of_an_error_stands_where_its_message_cannot_be_written() -> None:
    code = REPORT.replace("return Result", "raise KeyboardInterrupt\n    Result")
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code, "--json", "-v"], stdout=full, stderr=full)
    assert done.returncode == 130


def test_reader_that_left_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        done = run_report(stdout=pipe)
    assert (done.returncode, done.stderr) == (1, "at work\n")


def test_closed_streams_are_no_error() -> None:
    closed = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", sys.executable, "-c", REPORT]
    assert subprocess.run(closed).returncode == 0


def test_a_closed_standard_error_takes_no_work_and_no_result() -> None:
    """What libraries print there goes nowhere, in particular not into the result; progress is for nobody."""
    code = (
        "import os, click\nfrom quest_deploy.commands.progress import show_progress\n"
        "from quest_deploy.commands.verb import Result, verb\n"
        "def body():\n    with show_progress():\n        os.write(1, b'native\\n'), os.write(2, b'native\\n')\n"
        "    return Result(data={}, text='result')\nclick.command()(verb()(body))()\n"
    )
    closed = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-c", code]
    done = subprocess.run(closed, stdout=subprocess.PIPE, text=True)
    assert (done.returncode, done.stdout) == (0, "result\n")


@pytest.mark.parametrize(
    ("arguments", "text"), [((), "caf\xe9 \\u2026\n"), (("--json",), '"caf\xe9 \\u2026"')]
)
def test_what_an_encoding_lacks_is_escaped(arguments: tuple[str, ...], text: str) -> None:
    done = run_report(*arguments, env={**os.environ, "PYTHONIOENCODING": "latin-1"}, encoding="latin-1")
    assert done.returncode == 0, done.stderr
    assert text in done.stdout


def test_sigterm_unwinds_the_verb() -> None:
    """In a process of its own: the context manager must be left, and the exit code is 128 + 15."""
    code = (
        "import os, signal, click\nfrom contextlib import ExitStack\n"
        "from quest_deploy.commands.verb import Result, verb\n"
        "def body():\n    with ExitStack() as stack:\n"
        "        stack.callback(os.write, 2, b'cleaned\\n')\n        os.kill(os.getpid(), signal.SIGTERM)\n"
        "click.command()(verb()(body))()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.startswith("cleaned\nTerminated: nothing half-written was left")


@pytest.mark.parametrize(
    ("size_bytes", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (2_500_000_000, "2.5 GB")]
)
def test_format_size(size_bytes: int, text: str) -> None:
    assert format_size(size_bytes) == text


def test_format_table_aligns_columns() -> None:
    assert format_table([("a", "bb"), ("ccc", "d")]) == "a    bb\nccc  d"


class Raised(Exception):
    """A library's own error for whatever went wrong."""


@pytest.mark.parametrize(("signalled", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
@pytest.mark.parametrize("how", ["cause", "context"])
def test_a_signal_that_a_library_answers_with_an_error_of_its_own_is_a_signal(
    signalled: type[BaseException], code: int, how: str
) -> None:
    def body() -> VerbResult:
        try:
            raise signalled
        except BaseException as error:
            if how == "cause":
                raise Raised("cannot be imported") from error
            raise Raised("cannot be imported")  # noqa: B904

    done = run(body)
    assert done.exit_code == code
    assert "go on with --resume" in done.stderr


def run_process(body: object, number: int, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Result:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", str(number))
    command = click.command()(verb(together=True)(body))  # type: ignore[arg-type]
    return CliRunner().invoke(command, list(arguments))


@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_of_several_processes_the_first_prints_the_result(
    monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    assert "x" in run_process(succeed, 0, monkeypatch, *arguments).stdout
    worker = run_process(succeed, 1, monkeypatch, *arguments)
    assert (worker.exit_code, worker.stdout, worker.stderr) == (0, "", "")


def test_a_processs_error_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    done = run_process(fail_with(ConfigError("no such GPU")), 1, monkeypatch, "--json")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "", "Error: process 1: no such GPU\n")


def test_a_process_that_lost_another_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:2")
    told = "another process of this run ended; see its message\n"
    assert run_process(fail_with(gone), 1, monkeypatch).stderr == f"Error: process 1: {told}"
    assert run_process(fail_with(gone), 0, monkeypatch).stderr == f"Error: {told}"


def test_other_verbs_do_not_care_about_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert run(succeed).stdout == "x: done\n"

"""Measure quest-deploy on the bundled reference model, and write benchmarks/results/ and docs/results.md."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.environment import SOURCES, git
from benchmarks.merge import merged
from benchmarks.settings import ROOT, Settings
from benchmarks.stages import sources_digest
from benchmarks.tables import show
from quest_deploy.artifacts import write_json
from quest_deploy.quantize.recipe import PACKAGED

# The figures of a GPU come from another machine.
HERE = tuple(name for name in report.HEADINGS if name != "gpu")
# Of one recipe each, or of none.
FIXED = ("ablation", "analysis", "cpu_speed", "differences", "generation", "large", "modes", "order")
DESCRIPTION = """\
Measure quest-deploy on the bundled reference model, and write benchmarks/results/ and docs/results.md.

An interrupted run goes on where it stopped: what is finished lies under artifacts/bench/.
"""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "benchmark",
        nargs="?",
        default="all",
        choices=[*HERE, "all"],
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="see that it runs: three prompts, results under artifacts/bench/quick/",
    )
    parser.add_argument(
        "--recipes",
        type=recipes,
        metavar="NAME,...",
        help="measure only these, and leave what the result file has of others (default: all); without "
        f"{', '.join(FIXED)}",
    )
    parser.add_argument(
        "--checkpoints",
        type=lambda path: Path(path).resolve(),
        metavar="DIR",
        help="finetuned checkpoints, DIR/RECIPE; missing ones are made there (default: artifacts/bench/checkpoints)",
    )
    parsed = parser.parse_args(arguments)
    if parsed.recipes and parsed.benchmark in FIXED:
        parser.error(f"argument --recipes: {parsed.benchmark} measures what it is about and no others")
    return parsed


def recipes(text: str) -> tuple[str, ...]:
    """Names separated by commas."""
    names = tuple(name.strip().lower() for name in text.split(","))
    unknown = [name for name in names if name not in PACKAGED]
    if unknown:
        raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, expected some of {', '.join(PACKAGED)}")
    return names


def main() -> int:
    arguments = parse(sys.argv[1:])
    if arguments.benchmark == "all":
        return run_all(
            sys.argv[1:], HERE if arguments.recipes is None else [name for name in HERE if name not in FIXED]
        )
    os.chdir(ROOT)
    settings = Settings(
        recipes=arguments.recipes or PACKAGED, quick=arguments.quick, checkpoints=arguments.checkpoints
    )
    module = report.benchmark(arguments.benchmark)
    result = measured(module, settings)
    settings.results.mkdir(parents=True, exist_ok=True)
    file = settings.results / f"{module.NAME}.json"
    result = merged(file, result, getattr(module, "UNUSED_SETTINGS", ()))
    write_json(file, result)
    show(module.tables(result))
    if not settings.quick:
        report.write()
    return 0


def measured(module: Any, settings: Settings) -> dict[str, Any]:
    """A benchmark's result; of the commit that it began at, with changes, where the code changed while it ran."""
    commit, before = git("rev-parse", "HEAD"), sources_digest(SOURCES)
    result: dict[str, Any] = module.run(settings)
    if sources_digest(SOURCES) != before:
        result |= {"commit": commit, "uncommitted_changes": True}
    return result


def run_all(arguments: list[str], benchmarks: Sequence[str]) -> int:
    """Each benchmark in a process of its own, since one that holds torch cannot measure the memory of others.

    Returns:
        1 where one of them failed or was killed.
    """
    rest = [word for word in arguments if word != "all"]
    codes = [subprocess.call([sys.executable, "-m", "benchmarks", name, *rest]) for name in benchmarks]
    return int(any(codes))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        sys.exit(130)

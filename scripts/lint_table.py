"""Tries every test pattern of lint in the runtimes, and writes what they did into docs/lint.md.

    python -m scripts.lint_table [--random N]

Everything between the page's two markers is replaced. Takes a minute or two on an idle machine; needs tensorrt-rtx,
onnxruntime and openvino.
"""

from __future__ import annotations

import argparse
import datetime
import tempfile
from collections.abc import Mapping
from pathlib import Path

import onnx

from quest_deploy.export.lint import lint
from quest_deploy.export.lint.report import LintReport
from quest_deploy.export.lint.rules import RULES
from tests.export.lint.attempts import Outcome, attempt
from tests.export.lint.combinations import draw
from tests.export.lint.patterns import PATTERNS, WRONG_RESULTS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "lint.md"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
TARGETS = {"tensorrt-rtx": "TensorRT for RTX", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
FIRST_SEED = 3000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--random", type=int, default=200, help="random combinations beside the patterns")
    count = parser.parse_args().random
    patterns = {name: make() for name, make in PATTERNS.items()}
    drawn = dict(draw(seed) for seed in range(FIRST_SEED, FIRST_SEED + count))
    versions, tried, judged, agreement = {}, {}, {}, []
    for target, title in TARGETS.items():
        versions[target], tried[target] = attempt(target, patterns)
        judged[target] = look(patterns, target)
        _, outcomes = attempt(target, drawn)
        reports = look(drawn, target)
        agreement.append(
            f"| {title} {versions[target]} | {compare(target, tried[target], judged[target])} | "
            f"{compare(target, outcomes, reports)} |"
        )
    date = datetime.datetime.now(tz=datetime.timezone.utc).date().isoformat()
    blocks = [
        f"Tried on {date} by `python -m scripts.lint_table --random {count}`, on a CPU; TensorRT for RTX parses and "
        f"builds there, and runs nothing. Random combinations have the seeds from {FIRST_SEED} on.",
        "### Agreement\n\n"
        f"| runtime | {len(patterns)} patterns: agree (runtime refuses, or computes wrongly) | "
        f"{count} random combinations |\n|---|---|---|",
        "\n".join(agreement),
        "### Rules\n\n| rule | says |\n|---|---|",
        "\n".join(f"| `{rule.__name__.replace('_', '-')}` | {first_line(rule.__doc__)} |" for rule in RULES),
        "### Patterns\n\n"
        "*parses*, *builds*: TensorRT for RTX; *lint*: what it says for it. The last two columns: what the "
        "runtime made of the products when it ran them (INT8 kernels by name), and lint's verdict for it.\n\n"
        "| pattern | parses | builds | lint | ONNX Runtime: ran as / lint | OpenVINO: ran as / lint |\n"
        "|---|---|---|---|---|---|",
        "\n".join(row(name, tried, judged) for name in patterns),
    ]
    text = blocks[0]
    for block in blocks[1:]:
        text += ("\n" if block.startswith("| ") else "\n\n") + block
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{text}\n\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def look(models: Mapping[str, onnx.ModelProto], target: str) -> dict[str, LintReport]:
    """Lint of each model."""
    reports = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for name, model in models.items():
            path.write_bytes(model.SerializeToString())
            reports[name] = lint(path, target)
    return reports


def compare(target: str, outcomes: Mapping[str, Outcome], reports: Mapping[str, LintReport]) -> str:
    """How many verdicts agree, and how many models the runtime refuses, or is known to compute wrongly."""
    right = {
        name: outcome.works and (target, name) not in WRONG_RESULTS for name, outcome in outcomes.items()
    }
    agree = sum(report.breaks != right[name] for name, report in reports.items())
    return f"{agree} of {len(reports)} ({len(right) - sum(right.values())})"


def row(
    name: str, tried: Mapping[str, Mapping[str, Outcome]], judged: Mapping[str, Mapping[str, LintReport]]
) -> str:
    """One line of the table."""
    builder = tried["tensorrt-rtx"][name]
    cells = [f"`{name}`", *("yes" if flag else "**no**" for flag in (builder.parses, builder.works))]
    cells.append(verdict(judged["tensorrt-rtx"][name]))
    for target in ("onnxruntime", "openvino"):
        outcome = tried[target][name]
        kernels = ", ".join(outcome.kernels) or "–" if outcome.works else "**refused**"
        if (target, name) in WRONG_RESULTS:
            kernels += ", **computed wrongly**"
        cells.append(f"{kernels} / {verdict(judged[target][name])}")
    return "| " + " | ".join(cells) + " |"


def verdict(report: LintReport) -> str:
    """What lint says, in a few words."""
    if report.breaks:
        rules = dict.fromkeys(finding.rule for finding in report.findings if finding.breaks)
        return f"**breaks**: {', '.join(rules)}"
    kinds = ", ".join(dict.fromkeys(layer.execution for layer in report.layers)) or "no product"
    return (
        kinds
        if report
        else f"{kinds}; error: {next(f.rule for f in report.findings if f.severity == 'error')}"
    )


def first_line(text: str | None) -> str:
    """A docstring's first line."""
    return (text or "").strip().splitlines()[0]


if __name__ == "__main__":
    main()

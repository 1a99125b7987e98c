"""`quest-deploy lint`: what a runtime will make of a graph, before an engine is built. Exit code 3 on errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from quest_deploy.commands.verb import DONE, OVER_BUDGET, Result, result_to_terminal, verb
from quest_deploy.export.lint.targets import LINT_TARGETS

if TYPE_CHECKING:
    from rich.console import RenderableType

    from quest_deploy.export.lint.report import LintReport

_MARKS = {"int8": "green", "int4 storage": "cyan", "float": "yellow", "breaks": "bold red"}
_MAX_SIZE = 2**31 - 1
_SEVERITY = {"error": "bold red", "warning": "yellow", "info": "dim"}
_NO_TERMINAL_WIDTH = 100_000


@click.command(short_help="What a runtime will make of an ONNX graph.")
@click.argument("path", metavar="ONNX_DIR|FILE", type=click.Path(path_type=Path))
@click.option("--target", type=click.Choice(LINT_TARGETS), default="tensorrt-rtx", show_default=True)
@click.option(
    "--dim",
    "dimensions",
    multiple=True,
    metavar="NAME=SIZE",
    help="Size of a symbolic dimension, for counting; repeatable.  [default: the model's own, else 1]",
)
@click.option("--all", "show_all", is_flag=True, help="List every product, also those that run in INT8.")
@verb()
def lint(*, path: Path, target: str, dimensions: tuple[str, ...], show_all: bool) -> Result:
    """Say for every Conv, Gemm and MatMul whether it runs in INT8, with INT4 storage, in float, or breaks, and why.

    Nothing is built or run, and no weight but scales and zero-points is read, except to see that an artifact's files
    are what its manifest says. PATH may come from any exporter. Exit code 3 where the target refuses the graph or would
    compute other numbers.
    """
    from quest_deploy.export.lint import lint as run

    report = run(path, target, dimensions=parse_dimensions(dimensions))
    return Result(
        data=report.to_json(),
        text=render(report, show_all=show_all, terminal=result_to_terminal()),
        exit_code=DONE if report else OVER_BUDGET,
    )


def parse_dimensions(options: tuple[str, ...]) -> dict[str, int]:
    """``NAME=SIZE`` options as a dictionary."""
    sizes = {}
    for option in options:
        name, equals, size = option.partition("=")
        if not equals or not name.strip() or not size.strip().isdigit():
            raise click.BadParameter(f"got {option!r}, expected NAME=SIZE", param_hint="--dim")
        if len(size.strip()) > len(str(_MAX_SIZE)) or not 1 <= int(size) <= _MAX_SIZE:
            raise click.BadParameter(
                f"got {option!r}, expected a size of 1 to {_MAX_SIZE}", param_hint="--dim"
            )
        sizes[name.strip()] = int(size)
    return sizes


def render(report: LintReport, *, show_all: bool, terminal: bool) -> str:
    """The report as tables for a terminal; without colours, and one line a row, where there is none."""
    from rich.console import Console, Group

    blocks: list[RenderableType] = [*layer_table(report, show_all=show_all), *finding_table(report)]
    width = None if terminal else _NO_TERMINAL_WIDTH
    console = Console(force_terminal=terminal, width=width, highlight=False)
    with console.capture() as capture:
        console.print(Group(*blocks, *summary_lines(report)))
    return "\n".join(line.rstrip() for line in capture.get().splitlines()).rstrip()


def layer_table(report: LintReport, *, show_all: bool) -> list[RenderableType]:
    """Products that do not run in INT8, alike ones in one row; with `show_all` every product."""
    from rich.markup import escape
    from rich.table import Column, Table

    groups: dict[tuple[str, ...], list[str]] = {}
    for layer in report.layers:
        if show_all or layer.execution != "int8":
            single = (layer.name,) if show_all else ()
            key = (layer.component, layer.op_type, " x ".join(layer.operands), layer.execution)
            groups.setdefault((*key, "; ".join(layer.reasons), *single), []).append(layer.name)
    if not groups:
        return []
    headers = ("component", "operator", "operands", "runs as", "layers", "why")
    table = Table(*(Column(header, overflow="fold") for header in headers), box=None, pad_edge=False)
    for (component, op_type, operands, execution, reasons, *_), names in groups.items():
        count = names[0] if len(names) == 1 else f"{len(names)}, first {names[0]}"
        colour = f"[{_MARKS[execution]}]{execution}[/]"
        table.add_row(component, op_type, operands, colour, escape(count), escape(reasons))
    return [table, ""]


def finding_table(report: LintReport) -> list[RenderableType]:
    """What rules noticed, alike findings of one component in one row."""
    from rich.markup import escape
    from rich.table import Column, Table

    groups: dict[tuple[str, str, str], list[tuple[str, str]]] = {}
    for finding in report.findings:
        key = (finding.severity, finding.rule, finding.component)
        groups.setdefault(key, []).append((finding.node, finding.message))
    if not groups:
        return []
    headers = ("", "rule", "component", "where and what")
    table = Table(*(Column(header, overflow="fold") for header in headers), box=None, pad_edge=False)
    for (severity, rule, component), places in groups.items():
        node, message = places[0]
        more = f" (and {len(places) - 1} more)" if len(places) > 1 else ""
        text = f"{node}: {message}{more}" if node else f"{message}{more}"
        table.add_row(f"[{_SEVERITY[severity]}]{severity}[/]", rule, component, escape(text))
    return [table, ""]


def summary_lines(report: LintReport) -> list[str]:
    """Shares and verdict."""
    summary = report.summary()
    macs, unknown = summary["macs"], summary["layers_without_shapes"]
    parts = [
        f"{name} {summary['share_of_layers'][name]:.1%} ({summary['share_of_macs'][name]:.1%})"
        for name, share in summary["share_of_layers"].items()
        if share
    ]
    sizes = ", ".join(f"{name}={size}" for name, size in report.dimensions.items())
    at = f" at {sizes}" if sizes else ""
    missing = f"; {unknown} layers have no known shape" if unknown else ""
    counts = ", ".join(f"{severity} {count}" for severity, count in summary["findings"].items())
    verdict = (
        f"{report.target} refuses this" if report.breaks else "not refused" if report else "other numbers"
    )
    return [
        f"{summary['layers']} products, share of layers (of {macs / 1e9:.3g} G multiply-accumulates{at}): "
        f"{', '.join(parts) or 'none'}{missing}",
        f"{counts}: {verdict}",
    ]

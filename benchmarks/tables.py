"""Tables as data, so that the terminal and the document show the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table as RichTable

MISSING = "–"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A title, column names and rows of text. The first `labels` columns are left-aligned; `note` stands below."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    labels: int = 1

    def __post_init__(self) -> None:
        wrong = [row for row in self.rows if len(row) != len(self.columns)]
        if wrong:
            raise ValueError(f"table {self.title!r}: got {wrong[0]}, expected {len(self.columns)} cells")


def markdown(table: Table) -> str:
    """The table as GitHub's Markdown, below a heading."""
    lines = [f"### {table.title}", ""]
    lines.append(_line(table.columns))
    lines.append(_line(["---" if index < table.labels else "--:" for index in range(len(table.columns))]))
    lines += [_line(row) for row in table.rows]
    if table.note:
        lines += ["", table.note]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def show(tables: Sequence[Table]) -> None:
    """Print tables to the terminal."""
    console = Console()
    for table in tables:
        shown = RichTable(title=table.title, caption=table.note or None, caption_justify="left")
        for index, column in enumerate(table.columns):
            justify: Literal["left", "right"] = "left" if index < table.labels else "right"
            shown.add_column(column, justify=justify, overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)


def number(value: float | str | None, digits: int = 2) -> str:
    """A figure; reports have "identical" for an exact match and null where nothing was measured."""
    if value is None:
        return MISSING
    return value if isinstance(value, str) else f"{value:.{digits}f}"


def interval(value: Mapping[str, float | None] | None, digits: int = 2) -> str:
    """Mean and ends of an interval, with signs."""
    if value is None or value["mean"] is None:
        return MISSING
    ends = (MISSING if end is None else f"{end:+.{digits}f}" for end in (value["low"], value["high"]))
    return f"{value['mean']:+.{digits}f} ({' to '.join(ends)})"


def seconds(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.1f} s"


def megabytes(value: float | None) -> str:
    """Bytes as 10^6 of them."""
    return MISSING if value is None else f"{value / 1e6:,.2f} MB"


def yes(value: bool | None) -> str:
    return MISSING if value is None else "yes" if value else "**no**"

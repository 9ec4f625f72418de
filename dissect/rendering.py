"""How results look in a terminal: tables, sizes and lines, by rich. Nothing is computed here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.table import Table

__all__ = ["amount", "comparison_table", "console", "kilobytes", "notes", "pairs", "plan_table", "scores_table"]

_COLORS = {"exact": "green", "approximate": "yellow", "refused": "bold red"}
_WIDE = 140  # columns of a table that goes into a file or a pipe, where nothing says how many there are


def console() -> Console:
    """Standard output, for results."""
    return Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False, soft_wrap=not sys.stdout.isatty())


def notes() -> Console:
    """Standard error, for progress, remarks and errors."""
    return Console(stderr=True, width=None if sys.stderr.isatty() else _WIDE, highlight=False, soft_wrap=True)


def kilobytes(count: int) -> str:
    """A number of bytes as people read it: 936 kB, 1.95 MB (powers of ten)."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count} B"


def amount(count: float) -> str:
    """A large number as people read it: 745 M, 8.32 G."""
    for unit, size in (("T", 10**12), ("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.3g}"


def pairs(rows: Sequence[tuple[str, str]]) -> Table:
    """Names and values, one pair a line."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(escape(name), escape(value))
    return table


def plan_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """The plan, or any table whose verdicts (exact, approximate, refused) are to stand out."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in head:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(f"[{_COLORS[cell]}]{cell}[/]" if cell in _COLORS else escape(cell) for cell in row))
    return table


def comparison_table(rows: Sequence[tuple[str, Any]]) -> Table:
    """Latencies by name, one a line: anything with ``median``, ``p95`` (milliseconds) and ``rate`` (a second)."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("median", "p95", "frames/s"):
        table.add_column(name, justify="right")
    for name, latency in rows:
        table.add_row(escape(name), f"{latency.median:.2f} ms", f"{latency.p95:.2f} ms", f"{latency.rate:.1f}")
    return table


def scores_table(title: str, top: Sequence[tuple[str, float]], whole: float = 1.0) -> RenderableType:
    """The best labels with bars; a bar is full at ``whole``."""
    table = Table(box=None, title=escape(title), title_justify="left", show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_column(style="cyan")
    for label, score in top:
        share = max(0.0, min(1.0, score / whole)) if whole else 0.0
        table.add_row(escape(label), f"{score:.3f}", "█" * round(share * 40))
    return table

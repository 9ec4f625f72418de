"""How results look in a terminal: tables, sizes and lines, by rich. Nothing is computed here."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

__all__ = [
    "Bar",
    "Stages",
    "amount",
    "console",
    "kilobytes",
    "latency_table",
    "notes",
    "pairs",
    "plan_table",
    "print_comparison",
    "refusal_table",
    "report_table",
    "scores_table",
]

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


def plan_table(rows: Sequence[Any]) -> Table:
    """The plan, a line for each of its rows; kernel, stride and padding are those in time."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("layer", overflow="fold", min_width=16)
    table.add_column("operator", no_wrap=True)
    table.add_column("k/s/p", no_wrap=True)
    table.add_column("decision")
    table.add_column("", no_wrap=True)
    table.add_column("why")
    table.add_column("cache", no_wrap=True, justify="right", min_width=7)
    for row in rows:
        padding = None if row.padding is None else ",".join(str(side) for side in row.padding)
        sizes = "/".join(str(size) for size in (row.kernel, row.stride, padding) if size is not None)
        cells = (row.path or "-", row.op.removeprefix("aten."), sizes, row.decision)
        cache = kilobytes(row.cache_bytes) if row.cache_bytes else ""
        table.add_row(*map(escape, cells), _verdict(row.verdict), escape(row.reason), cache)
    return table


def refusal_table(rows: Sequence[Any]) -> Table:
    """The operators that cannot be streamed: where they are, what they are, and why."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("layer", "operator", "", "why"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(escape(row.path or "-"), escape(row.op), _verdict("refused"), escape(row.reason))
    return table


def _verdict(word: str) -> str:
    return f"[{_COLORS[word]}]{word}[/]" if word in _COLORS else escape(word)


def report_table(rows: Sequence[Any]) -> Table:
    """The checks of a verification: ``pair``, ``what``, ``error``, ``tolerance``, ``ok`` and ``note``."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for name in ("promise", "on", "error", "allowed", "", "remark"):
        table.add_column(name, overflow="fold")
    for row in rows:
        error, allowed = ("-" if value is None else f"{value:.1e}" for value in (row.error, row.tolerance))
        measured = row.error is None or row.tolerance == float("inf")  # told, and promised by nobody
        held = ("[yellow]measured[/]" if row.error is not None else "-") if measured else "[green]holds[/]"
        allowed = "-" if measured else allowed
        held = held if row.ok else "[bold red]BROKEN[/]"
        table.add_row(escape(row.pair), escape(row.what), error, allowed, held, escape(row.note))
    return table


def latency_table(rows: Sequence[tuple[str, Any]]) -> Table:
    """Latencies by name, one a line: anything with ``median``, ``p95`` (milliseconds) and ``rate`` (a second)."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    table.add_column("")
    for name in ("median", "p95", "frames/s"):
        table.add_column(name, justify="right")
    for name, latency in rows:
        table.add_row(escape(name), f"{latency.median:.2f} ms", f"{latency.p95:.2f} ms", f"{latency.rate:.1f}")
    return table


def print_comparison(out: Console, comparison: Any, remark: str = "") -> None:
    """A step against the sliding window, and what is to be said of it."""
    out.print(latency_table([("step", comparison.step), ("sliding window", comparison.window)]))
    where = comparison.runtime if comparison.runtime != "mixed" else "PyTorch and ONNX Runtime"
    text = f"A step is {comparison.times:.1f} times faster than the sliding window, here, in {where}."
    if comparison.times < 1:
        text = f"A step is slower than the sliding window, {1 / comparison.times:.1f} times, here, in {where}."
    out.print(text, markup=False)
    if remark:
        out.print(remark, markup=False)


class Stages:
    """A progress bar on standard error over the stages of a command; call it with the name of the next one."""

    def __init__(self, count: int) -> None:
        """Expect ``count`` stages."""
        self._bar = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._bar.add_task("", total=count, start=True)
        self._begun, self._name = False, ""

    def __call__(self, name: str) -> None:
        """The next stage begins."""
        if self._begun:
            self._bar.advance(self._task)
        self._begun, self._name = True, name
        self._bar.update(self._task, description=name)

    def detail(self, name: str) -> None:
        """What the stage is at."""
        self._bar.update(self._task, description=f"{self._name}: {name}")

    def print(self, out: Console, result: RenderableType) -> None:
        """Print to another console, out of the bar's way."""
        self._bar.stop()
        out.print(result)
        self._bar.start()

    def __enter__(self) -> Stages:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take it away."""
        self._bar.stop()


class Bar:
    """A progress bar on standard error over the steps of a training; ``total`` 0 says that nobody knows how many."""

    def __init__(self, name: str, total: int, shown: bool = True) -> None:
        """Name it; it stays away where ``shown`` is False or nobody looks."""
        self._bar = Progress(
            TextColumn("{task.description:<14}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
            disable=not (shown and sys.stderr.isatty()),
        )
        self._task = self._bar.add_task(name, total=total or None, note="")

    def start(self, done: int = 0) -> None:
        """Some steps were done before."""
        self._bar.update(self._task, completed=done)

    def advance(self, note: str = "") -> None:
        """One more step."""
        self._bar.update(self._task, advance=1, note=note)

    def __enter__(self) -> Bar:
        """Show it."""
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Take it away."""
        self._bar.stop()


def scores_table(title: str, top: Sequence[tuple[str, float]], whole: float = 1.0) -> RenderableType:
    """The best labels with bars under a title; a bar is full at ``whole``."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right")
    table.add_column(style="cyan")
    for label, score in top:
        share = max(0.0, min(1.0, score / whole)) if whole > 0 else 0.0
        table.add_row(escape(label), f"{score:.3f}", "█" * round(share * 40))
    return Group(Text(title, style="bold"), table)

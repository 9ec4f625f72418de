"""Measures several calls in turn, and says what came out: medians, quartiles, and ratios of one turn each.

The law: what is compared runs in one process, turn by turn, forwards and then backwards, so that whatever slows the
machine slows all of it. A ratio is the median over turns of the ratio within a turn. ``--clock cpu`` counts processor
time instead of the clock on the wall: with ``--threads 1`` that is what a step takes where nothing else runs, and it
says so on machines that others use, too.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Times", "arguments", "files", "machine", "paired", "peak", "ratio", "report", "table"]

Call = Callable[[], Any]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Times:
    """Milliseconds of one call, one sample a turn."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return float(np.median(self.samples))

    @property
    def quartiles(self) -> tuple[float, float]:
        low, high = np.percentile(self.samples, [25, 75])
        return float(low), float(high)

    def __str__(self) -> str:
        low, high = self.quartiles
        return f"{number(self.median)} ({number(low)} to {number(high)})"


def paired(
    calls: Mapping[str, Call], turns: int = 15, seconds: float = 60.0, clock: str = "wall", least: float = 0.05
) -> dict[str, Times]:
    """Time every call in each of ``turns`` turns (three at least, then while ``seconds`` last).

    A call shorter than ``least`` seconds is repeated within its turn, and the mean counts.
    """
    now = CLOCKS[clock]
    repeats = {}
    for name, call in calls.items():
        call()
        began = time.perf_counter()
        call()
        repeats[name] = int(np.clip(least / max(time.perf_counter() - began, 1e-6), 1, 200))
    samples: dict[str, list[float]] = {name: [] for name in calls}
    deadline = time.perf_counter() + seconds
    turn = 0
    while turn < 3 or (turn < turns and time.perf_counter() < deadline):
        for name in list(calls)[:: -1 if turn % 2 else 1]:
            call, count = calls[name], repeats[name]
            began = now()
            for _ in range(count):
                call()
            samples[name].append((now() - began) / count * 1e3)
        turn += 1
    return {name: Times(tuple(found)) for name, found in samples.items()}


def ratio(over: Times, under: Times) -> str:
    """How often ``over`` holds ``under``: the median of the turns, and their quartiles."""
    found = np.divide(over.samples, under.samples)
    low, high = np.percentile(found, [25, 75])
    return f"{np.median(found):.2f} ({low:.2f} to {high:.2f})"


def number(value: float) -> str:
    """Three digits."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def peak() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def machine(threads: int | None, clock: str = "wall") -> str:
    """The machine and what runs on it, in one line."""
    import onnxruntime
    import torch

    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return (
        f"{model}, {os.cpu_count()} cores, {threads or 'all'} thread(s) used, "
        f"{'processor' if clock == 'cpu' else 'wall-clock'} time, load {os.getloadavg()[0]:.1f}; {platform.system()}, "
        f"Python {platform.python_version()}, ONNX Runtime {onnxruntime.__version__}, PyTorch {torch.__version__}"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def arguments(description: str, **more: Any) -> argparse.Namespace:
    """The options that every script has; ``more`` are networks and others with their defaults."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of both runtimes")
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: processor time, for busy machines")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each comparison, about")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--files", type=Path, help="keep step models there, and use those that are there")
    for name, default in more.items():
        given: dict[str, Any] = {"nargs": "*"} if isinstance(default, list) else {}
        kind = type(default[0] if isinstance(default, list) else default)
        parser.add_argument(f"--{name}", type=kind, default=default, **given)
    parsed = parser.parse_args()
    import torch

    torch.set_num_threads(parsed.threads)
    return parsed


@contextmanager
def files(options: argparse.Namespace) -> Iterator[Path]:
    """The folder for step models: the one that was asked for, or one for the time of the block."""
    if options.files is not None:
        options.files.mkdir(parents=True, exist_ok=True)
        yield options.files
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def report(options: argparse.Namespace, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print the table with the machine's description, and write both as JSON where that is asked for."""
    about = machine(options.threads, options.clock)
    print(f"\n{about}\n\n{table(head, rows)}", flush=True)
    if options.json is not None:
        options.json.write_text(json.dumps({"machine": about, "head": list(head), "rows": [list(row) for row in rows]}))

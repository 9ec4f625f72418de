"""(d) A long stream: the last thousand steps take what the first thousand took, and memory stays where it was.

The first thousand steps after the warm-up are compared with the last thousand; since other programs may have been busy at
one end and not at the other, each block is also compared with a second runner, fresh, that steps beside it in turn.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from measuring import CLOCKS, arguments, number, report

import dissect
from dissect import zoo
from dissect.benchmarking import step_of

BLOCK = 1000


def resident() -> float:
    """Memory of this process now, in MB; Linux alone knows it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 1e6


def block(step: object, beside: object, clock: str) -> tuple[float, float]:
    """Mean milliseconds of a thousand steps, and of as many of the other runner's, in turns of ten."""
    now = CLOCKS[clock]
    spent = [0.0, 0.0]
    for turn in range(BLOCK // 10):
        for at in (0, 1) if turn % 2 else (1, 0):
            call = (step, beside)[at]
            began = now()
            for _ in range(10):
                call()  # type: ignore[operator]
            spent[at] += now() - began
    return spent[0] / BLOCK * 1e3, spent[1] / BLOCK * 1e3


def main() -> None:
    options = arguments("A long stream.", frames=100_000, width=8, presets=["d3d", "exact"])
    rows = []
    for preset in options.presets:
        network = zoo.resnet18(seed=0, width=options.width).eval()
        stream = dissect.convert(network, torch.randn(1, 3, 16, 112, 112), preset)
        with tempfile.TemporaryDirectory() as folder:
            path = stream.export(Path(folder) / "step.onnx")
            runner = dissect.Runner(path, providers="cpu", threads=options.threads)
            fresh = dissect.Runner(path, providers="cpu", threads=options.threads)
        step, beside = step_of(runner), step_of(fresh)
        for _ in range(stream.timing.warmup + 50):
            step()
            beside()
        began, before = time.perf_counter(), resident()
        first = block(step, beside, options.clock)
        while int(runner.frames[0]) < options.frames - BLOCK:
            step()
        fresh.reset()
        for _ in range(stream.timing.warmup):
            beside()
        last = block(step, beside, options.clock)
        after = resident()
        assert np.isfinite(runner.step(np.ones((3, 112, 112), np.float32))).all()
        rows.append(
            [
                preset,
                f"{int(runner.frames[0]):,}",
                number(first[0]),
                number(last[0]),
                f"{last[0] / first[0]:.3f}",
                f"{last[0] / last[1] / (first[0] / first[1]):.3f}",
                number(before),
                number(after),
            ]
        )
        print(*rows[-1], f"{time.perf_counter() - began:.0f} s", sep="  ", flush=True)
    head = ["preset", "frames", "first thousand, ms a step", "last thousand", "last over first"]
    report(options, [*head, "the same, over a fresh stream beside it", "memory before, MB", "after"], rows)


if __name__ == "__main__":
    main()

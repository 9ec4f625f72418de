"""(d) What the cost of a step follows, and what it does not: clip length, depth of the caches, batch, size of the frame.

A sliding window costs in proportion to its clip; a step does not know the clip's length. ``taps`` is the number of taps
that each temporal convolution keeps (an override of the plan), which sets the receptive field.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import arguments, number, paired, ratio, report
from torch import nn

import dissect
from dissect import zoo
from dissect.benchmarking import onnx_window, step_of


def opened(
    network: nn.Module, clip: torch.Tensor, threads: int, **options: Any
) -> tuple[dissect.Stream, dissect.Runner]:
    batch = options.pop("batch", 1)
    stream = dissect.convert(network, clip, **options)
    with tempfile.TemporaryDirectory() as folder:
        path = stream.export(Path(folder) / "step.onnx")
        return stream, dissect.Runner(path, batch, providers="cpu", threads=threads)


def clip(frames: int = 16, size: int = 112, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 3, frames, size, size, generator=torch.Generator().manual_seed(0))


def by_length(options: Any, network: nn.Module) -> None:
    calls, rows = {}, []
    for frames in (8, 16, 32, 64):
        _, runner = opened(network, clip(frames), options.threads, preset="d3d")
        calls[f"step {frames}"] = step_of(runner)
        calls[f"window {frames}"] = onnx_window(network, (clip(frames),), options.threads, "cpu")
    times = paired(calls, seconds=options.seconds, clock=options.clock)
    for frames in (8, 16, 32, 64):
        step, window = times[f"step {frames}"], times[f"window {frames}"]
        rows.append([str(frames), str(window), str(step), ratio(window, step)])
    report(options, ["frames of the clip", "window, ms", "step, ms", "times"], rows)


def one_by_one(options: Any, what: str, cases: dict[str, Callable[[], tuple[dissect.Stream, dissect.Runner]]]) -> None:
    made = {name: case() for name, case in cases.items()}
    times = paired(
        {name: step_of(runner) for name, (_, runner) in made.items()}, seconds=options.seconds, clock=options.clock
    )
    first = next(iter(times.values()))
    rows = [
        [
            name,
            str(stream.timing.receptive_field),
            f"{runner.cache_bytes / 1e6:.2f}",
            str(times[name]),
            number(times[name].median / runner.batch),
            ratio(times[name], first),
        ]
        for name, (stream, runner) in made.items()
    ]
    report(options, [what, "receptive field", "caches, MB", "step, ms", "ms a frame", "over the first"], rows)


def main() -> None:
    options = arguments("What the cost of a step follows.", parts=["length", "taps", "batch", "size"], width=64)
    options.json = None
    network = zoo.resnet18(seed=0, width=options.width).eval()
    threads = options.threads
    if "length" in options.parts:
        by_length(options, network)
    if "taps" in options.parts:
        cases = {
            f"{taps}": lambda taps=taps: opened(network, clip(), threads, overrides={"layer*.conv*": {"depth": taps}})
            for taps in (1, 2, 3)
        }
        one_by_one(options, "taps", cases)
    if "batch" in options.parts:
        cases = {
            f"{batch}": lambda batch=batch: opened(network, clip(), threads, batch=batch) for batch in (1, 2, 4, 8, 16)
        }
        one_by_one(options, "batch", cases)
    if "size" in options.parts:
        cases = {
            f"{size}x{size}": lambda size=size: opened(network, clip(size=size), threads)
            for size in (64, 112, 160, 224)
        }
        one_by_one(options, "frame", cases)


if __name__ == "__main__":
    main()

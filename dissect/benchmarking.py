"""Measures what a step costs, and what the sliding window costs that it replaces: on this machine, side by side.

Law: what is compared runs in turns, one after another, in the same runtime with the same threads, so that whatever
slows the machine slows both.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dissect.errors import DissectError
from dissect.quiet import quiet
from dissect.runner import Runner
from dissect.sessions import open_session

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Comparison", "Latency", "compare", "eager_step", "eager_window", "measure", "onnx_window", "step_of"]

Call = Callable[[], Any]


@dataclass(frozen=True)
class Latency:
    """The times of many calls, in milliseconds, in the order in which they were measured."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """Half of the calls took no longer, in milliseconds."""
        return float(np.median(self.samples))

    @property
    def p95(self) -> float:
        """19 of 20 calls took no longer, in milliseconds."""
        return float(np.percentile(self.samples, 95))

    @property
    def rate(self) -> float:
        """Calls a second, at the median."""
        return 1e3 / self.median

    def to_dict(self) -> dict[str, float]:
        """Median, p95 (milliseconds), calls a second and the number of calls."""
        return {"median_ms": self.median, "p95_ms": self.p95, "per_second": self.rate, "calls": len(self.samples)}


@dataclass(frozen=True)
class Comparison:
    """A step against one run of the sliding window, which does as much work for one more frame.

    ``runtime`` is what both ran in, "ONNX Runtime" or "PyTorch"; ``times`` is how often the window's time holds the
    step's: the median over turns, each of which measured both.
    """

    step: Latency
    window: Latency
    times: float
    runtime: str
    batch: int = 1

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers."""
        return {
            "step": self.step.to_dict(),
            "window": self.window.to_dict(),
            "times": self.times,
            "runtime": self.runtime,
            "batch": self.batch,
        }


def measure(call: Call, count: int = 200, warmup: int = 10, seconds: float = 60.0, frames: int = 1) -> Latency:
    """The latency of ``count`` calls, or of as many as ``seconds`` hold, after ``warmup`` calls that do not count.

    In the native cadence frames cost differently: a sample is then the mean over ``frames`` calls, a period.
    """
    for _ in range(warmup):
        call()
    samples: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(samples) < count and (not samples or time.perf_counter() < deadline):
        samples.append(_timed(call, frames))
    return Latency(tuple(samples))


def compare(
    step: Call,
    window: Call,
    runtime: str,
    turns: int = 20,
    steps: int = 10,
    seconds: float = 30.0,
    batch: int = 1,
    frames: int = 1,
) -> Comparison:
    """Measure ``steps`` steps and one window in each of ``turns`` turns (at least 3, then while ``seconds`` last).

    ``frames``: a sample of the step is the mean over so many calls, as for :func:`measure`.
    """
    for _ in range(3):
        step()
    window()
    of_step: list[float] = []
    of_window: list[float] = []
    ratios: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(ratios) < 3 or (len(ratios) < turns and time.perf_counter() < deadline):
        turn = [_timed(step, frames) for _ in range(-(-steps // frames))]
        of_window.append(_timed(window))
        of_step.extend(turn)
        ratios.append(of_window[-1] / float(np.median(turn)))
    return Comparison(Latency(tuple(of_step)), Latency(tuple(of_window)), float(np.median(ratios)), runtime, batch)


def step_of(runner: Runner, seed: int = 0) -> Call:
    """A call that steps the runner with frames of noise."""
    random = np.random.default_rng(seed)
    frames = []
    for spec in runner.inputs:
        shape = (runner.batch, *(int(size) for size in spec.shape[1:]))
        noise = random.random(shape)
        frames.append((noise * 255 if np.dtype(spec.dtype).kind in "iu" else noise).astype(spec.dtype))
    return lambda: runner.step(*frames)


def onnx_window(model: nn.Module, inputs: tuple[Any, ...], threads: int | None = None, providers: Any = None) -> Call:
    """A call that runs the whole clip network in ONNX Runtime, as a sliding window does for every new frame.

    Exports it to a folder that is gone when this returns. Raises :class:`~dissect.errors.DissectError` where
    torch cannot export it or ONNX Runtime cannot run it.
    """
    import torch
    from torch.utils import _pytree as pytree

    from dissect.capturing import copied

    with tempfile.TemporaryDirectory(prefix="dissect-") as folder:
        file = Path(folder) / "clip.onnx"
        try:
            with _silent():
                torch.onnx.export(model, copied(inputs), str(file), dynamo=True, verbose=False)
            session = open_session(file, providers, threads)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise DissectError(f"The clip network cannot be exported to ONNX: {lines[0]}") from error
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]
    names = [entry.name for entry in session.get_inputs()]
    if len(names) != len(leaves):
        raise DissectError("The clip network cannot be exported to ONNX: it lost one of its inputs there.")
    feed = {name: leaf.detach().cpu().numpy() for name, leaf in zip(names, leaves, strict=True)}
    return lambda: session.run(None, feed)


def eager_window(model: nn.Module, inputs: tuple[Any, ...]) -> Call:
    """A call that runs the clip network in PyTorch itself."""
    import torch

    from dissect.capturing import copied

    def call() -> Any:
        with torch.inference_mode():
            return model(*copied(inputs))  # a forward may change the list of its pathways

    return call


def eager_step(stream: Any, inputs: tuple[Any, ...]) -> Call:
    """A call that runs the step form in PyTorch itself, on the first frame of ``inputs`` again and again."""
    import torch
    from torch.utils import _pytree as pytree

    frame = stream.frame(inputs, 0)
    caches = stream.caches(next(leaf.shape[0] for leaf in pytree.tree_leaves(frame) if isinstance(leaf, torch.Tensor)))

    def call() -> Any:
        nonlocal caches
        with torch.inference_mode():
            output, *new = stream.step(*frame, *caches)
        caches = tuple(new)
        return output

    return call


def _timed(call: Call, times: int = 1) -> float:
    began = time.perf_counter()
    for _ in range(times):
        call()
    return (time.perf_counter() - began) / times * 1e3


@contextmanager
def _silent() -> Iterator[None]:
    """Nothing that torch's exporter prints, warns or logs reaches the user."""
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null), quiet():
        yield

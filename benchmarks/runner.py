"""What ``Runner.step`` costs beyond the run of its graph, and what threads that spin cost a camera.

First table: ``Runner.step`` against ``session.run`` of the same graph, fed with arrays, and against the bare run of the
buffers that the runner has bound. Second table: a step 25 times a second, as a camera gives frames.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from measuring import arguments, files, number, paired, ratio, report
from networks import step_file

import dissect


def overhead(path: Path, options: object) -> list[str]:
    runner = dissect.Runner(path, providers="cpu", threads=options.threads)  # type: ignore[attr-defined]
    session = runner._opened.sessions[0]
    frame = np.random.default_rng(0).random((1, *runner.inputs[0].shape[1:]), np.float32)
    feed = {runner.inputs[0].name: frame}
    feed |= {cache.input: np.zeros((1, *cache.shape[1:]), cache.dtype) for cache in runner.caches}
    runner.step(frame)
    runner.step(frame)
    bound, _ = runner._bound.table._bindings[0, 0, 1]
    times = paired(
        {
            "session.run": lambda: session.run(None, feed),
            "bound": lambda: session.run_with_iobinding(bound),
            "step": lambda: runner.step(frame),
            "step, no copy": lambda: runner.step(frame, copy=False),
        },
        turns=60,
        seconds=options.seconds,  # type: ignore[attr-defined]
        clock=options.clock,  # type: ignore[attr-defined]
    )
    return [*map(str, times.values()), ratio(times["step"], times["session.run"]), ratio(times["step"], times["bound"])]


def camera(path: Path, threads: int, spin: bool | None, seconds: float) -> tuple[float, float]:
    """Median milliseconds of a step at 25 frames a second, and the processor's milliseconds for each."""
    runner = dissect.Runner(path, providers="cpu", threads=threads, spin=spin)
    frame = np.random.default_rng(0).random((1, *runner.inputs[0].shape[1:]), np.float32)
    for _ in range(10):
        runner.step(frame)
    took, spent = [], time.process_time()
    due = time.perf_counter()
    end = due + seconds
    while due < end:
        began = time.perf_counter()
        runner.step(frame)
        took.append((time.perf_counter() - began) * 1e3)
        due += 0.04
        time.sleep(max(0.0, due - time.perf_counter()))
    return float(np.median(took)), (time.process_time() - spent) / len(took) * 1e3


def main() -> None:
    options = arguments("The runner's own cost, and that of spinning.", networks=["x3d_xs_112", "3D-ResNet-18"])
    rows, spinning = [], []
    for name in options.networks:
        with files(options) as folder:
            path = step_file(name, "d3d", "every", folder)
            rows.append([name, *overhead(path, options)])
            print(*rows[-1], sep="  ", flush=True)
            settings = {"during a step (default)": None, "always": True, "never": False}
            for threads in sorted({1, options.threads}):
                found = {
                    label: np.array([camera(path, threads, spin, options.seconds / 30) for _ in range(5)])
                    for label, spin in settings.items()
                }
                for label, pairs in found.items():
                    latency, spent = np.median(pairs, 0)
                    spinning.append([name, str(threads), label, number(latency), number(spent)])
    head = ["network", "session.run, ms", "bound buffers, ms", "step, ms", "step without copy, ms"]
    report(options, [*head, "step over session.run", "step over bound buffers"], rows)
    options.json = None
    report(options, ["network", "threads", "threads spin", "a step, ms", "processor time a step, ms"], spinning)


if __name__ == "__main__":
    main()

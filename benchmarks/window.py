"""(a) A step against the sliding window that it replaces, in ONNX Runtime and in PyTorch.

One run of the window gives one more output, as one step does. ``d3d`` is another network with fewer operations, to be
trained; ``exact`` gives the window's own outputs. In the native cadence outputs come at the network's own positions,
every ``stride`` frames, and the time is the mean of a frame.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from measuring import arguments, paired, ratio, report
from networks import NETWORKS

import dissect
from dissect.benchmarking import eager_step, eager_window, onnx_window, step_of


def main() -> None:
    options = arguments("A step against the sliding window.", networks=list(NETWORKS), presets=["d3d", "exact"])
    rows = []
    for name in options.networks:
        subject = NETWORKS[name]
        network, example = subject.network(), subject.example()
        window = onnx_window(network, example, options.threads, "cpu")
        for preset in options.presets:
            stream = dissect.convert(network, example, preset)
            with tempfile.TemporaryDirectory() as folder:
                runner = dissect.Runner(
                    stream.export(Path(folder) / "step.onnx"), providers="cpu", threads=options.threads
                )
            times = paired(
                {
                    "window": window,
                    "step": step_of(runner),
                    "eager window": eager_window(network, example),
                    "eager step": eager_step(stream, example),
                },
                seconds=options.seconds,
                clock=options.clock,
            )
            clip = "x".join(map(str, subject.clip[1:]))
            rows.append(
                [
                    f"{name} {clip}",
                    preset,
                    str(stream.timing.delay),
                    str(times["window"]),
                    str(times["step"]),
                    ratio(times["window"], times["step"]),
                    str(times["eager window"]),
                    str(times["eager step"]),
                    ratio(times["eager window"], times["eager step"]),
                ]
            )
            print(*rows[-1], sep="  ", flush=True)
    head = ["network, clip", "preset", "delay", "window, ORT, ms", "step, ORT, ms", "times"]
    report(options, [*head, "window, PyTorch, ms", "step, PyTorch, ms", "times"], rows)


if __name__ == "__main__":
    main()

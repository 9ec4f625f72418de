"""(a) A step against the sliding window that it replaces, in ONNX Runtime and in PyTorch.

One run of the window gives one more output, as one step does. ``d3d`` is another network with fewer operations, to be
trained; ``exact`` gives the window's own outputs. In the native cadence outputs come at the network's own positions,
every ``stride`` frames, and the time is the mean of a frame.
"""

from __future__ import annotations

from measuring import arguments, files, paired, ratio, report
from networks import NETWORKS, clip_call, converted, step_file

import dissect
from dissect.benchmarking import eager_step, eager_window, step_of


def main() -> None:
    options = arguments("A step against the sliding window.", networks=list(NETWORKS), presets=["d3d", "exact"])
    rows = []
    for name, preset in [(name, preset) for name in options.networks for preset in options.presets]:
        subject = NETWORKS[name]
        network, example = subject.network(), subject.example()
        stream = converted(name, preset)
        with files(options) as folder:
            path = step_file(name, preset, "every", folder, stream)
            window = clip_call(name, options.threads, folder)
            runner = dissect.Runner(path, providers="cpu", threads=options.threads)
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

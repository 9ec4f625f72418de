"""Many streams: one batch of eight against eight calls of one, and the pool, which chooses its batches by measurement.

Frames a second of eight streams that are always ready: eight runners in turn; one runner with a batch of eight; a
:class:`dissect.StreamPool`, which also copies frames in, hands results out by futures, and does not know that all are ready.
"""

from __future__ import annotations

import numpy as np
from measuring import arguments, files, number, paired, ratio, report
from networks import step_file

import dissect
from dissect.benchmarking import step_of

STREAMS = 8


def main() -> None:
    options = arguments(
        "Eight streams.", networks=["x3d_xs_112", "x3d_s", "3D-ResNet-18", "r3d_18"], presets=["d3d", "exact"]
    )
    rows = []
    for name, preset in [(name, preset) for name in options.networks for preset in options.presets]:
        with files(options) as folder:
            path = step_file(name, preset, "every", folder)
            one = step_of(dissect.Runner(path, providers="cpu", threads=options.threads))
            eight = step_of(dissect.Runner(path, STREAMS, providers="cpu", threads=options.threads))
            pool = dissect.StreamPool(path, STREAMS, STREAMS, providers="cpu", threads=options.threads)
        cameras = [pool.open() for _ in range(STREAMS)]
        random = np.random.default_rng(0)
        frames = [random.random((1, *spec.shape[1:]), np.float32) for spec in pool.inputs]

        def pooled(cameras: list[object] = cameras, frames: list[np.ndarray] = frames) -> None:
            for future in [camera.push(*frames) for camera in cameras]:  # type: ignore[attr-defined]
                future.result()

        def alone(call: object = one) -> None:
            for _ in range(STREAMS):
                call()  # type: ignore[operator]

        times = paired({"alone": alone, "batch": eight, "pool": pooled}, seconds=options.seconds, clock=options.clock)
        sizes = max(pool.batches, key=pool.batches.__getitem__)
        pool.close()
        rates = [number(STREAMS * 1e3 / times[kind].median) for kind in ("alone", "batch", "pool")]
        rows.append(
            [
                name,
                preset,
                *rates,
                ratio(times["alone"], times["batch"]),
                ratio(times["alone"], times["pool"]),
                str(sizes),
            ]
        )
        print(*rows[-1], sep="  ", flush=True)
    head = ["network", "preset", "eight calls, frames a second", "a batch of eight", "the pool", "batch over calls"]
    report(options, [*head, "pool over calls", "the pool's batches"], rows)


if __name__ == "__main__":
    main()

"""Many cameras through one network: each on a thread of its own, frames when they come, outputs at the network's rate.

The network has temporal strides, so in the native cadence it has an output every eighth frame, and layers that run when
their position is due. The last line shows that each camera got what the network itself says of its clip.
"""

from __future__ import annotations

import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch

import dissect
from dissect import zoo

CAMERAS, FRAMES = 4, 16


def main() -> None:
    model = zoo.resnet18(num_classes=10, width=8, seed=0).eval()
    clips = torch.rand(CAMERAS, 3, FRAMES, 64, 64)
    stream = dissect.convert(model, clips[:1], preset="exact")
    last: dict[int, np.ndarray] = {}

    def watch(camera: int, pool: dissect.StreamPool) -> None:
        with pool.open() as source:
            futures = []
            for frame in clips[camera].unbind(1):
                futures.append(source.push(frame.numpy()))
                time.sleep(0.005 * (camera + 1) / CAMERAS)  # no two cameras have one rate
            scores = [future.result() for future in futures] + source.flush().result()
            last[camera] = [score for score in scores if score is not None][-1]

    with tempfile.TemporaryDirectory() as folder:
        path = stream.export(Path(folder) / "net.onnx", cadence="native")
        with dissect.StreamPool(path, streams=CAMERAS) as pool:
            threads = [threading.Thread(target=watch, args=(camera, pool)) for camera in range(CAMERAS)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            print(f"batches by size: {pool.batches}; caches copied {pool.moved} times")
    with torch.no_grad():
        offline = model(clips).numpy()
    error = max(np.abs(last[camera][0] - offline[camera]).max() for camera in range(CAMERAS))
    print("the cameras' last outputs against the network's own:", error)


if __name__ == "__main__":
    main()

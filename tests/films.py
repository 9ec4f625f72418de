"""Films for tests, written on the spot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def film(path: Path, count: int = 30, size: tuple[int, int] = (48, 64), seed: int = 0) -> Path:
    """A film of patches whose brightness follows the frame, so that no two frames are alike."""
    av = pytest.importorskip("av")
    random = np.random.default_rng(seed)
    patches = random.uniform(0, 1, (3, 4, 3))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        for index in range(count):
            wave = 0.5 + 0.5 * np.sin(patches * 6 + index * 0.7)
            image = np.kron(wave, np.ones((size[0] // 3, size[1] // 4, 1))) * 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    return path

"""From a clip network to a step network and back: convert, verify, export, run, flush.

The network is a conventional 3D-ResNet-18, narrowed so that this takes seconds; put your own in its place.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch

import dissect
from dissect import zoo


def main() -> None:
    model = zoo.resnet18(num_classes=10, width=8, seed=0).eval()
    clip = torch.rand(1, 3, 16, 64, 64)

    stream = dissect.convert(model, clip, preset="exact")
    print(stream.plan)
    print(stream.timing)
    print(dissect.verify(stream, model).check())

    with tempfile.TemporaryDirectory() as folder:
        run = dissect.Runner(dissect.export(stream, Path(folder) / "net.onnx"))
        outputs = [run.step(frame.numpy()) for frame in clip.unbind(2)]
        outputs = [output for output in outputs if output is not None] + run.flush()
    with torch.no_grad():
        offline = model(clip).numpy()
    print("the stream's last output against the network's own:", np.abs(outputs[-1] - offline).max())


if __name__ == "__main__":
    main()

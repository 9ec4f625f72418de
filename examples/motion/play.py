"""A film of a digit that moves, played through the step network that was taught to name motions.

    python examples/motion/play.py               the film and the step model, in this folder, and what it says
    python examples/motion/play.py --films 40    films to teach with, too: see docs/training.md

Needs `pip install -e '.[video,motion]'`. The networks beside this file are those of seed 0 of the experiment: `digits.pt`
the clip network, a 3D-ResNet-18 with an eighth of the width, and `digits-d3d.pt` the same one dissected, and taught by
the first from videos without labels.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

import av
import numpy as np
import torch
from scenes import LABELS, MEAN, SIZE, STD, Videos, filmed, motion
from torch import Tensor
from training import CLIP, conventional

import dissect
from dissect.playing import play, preprocess_of
from dissect.video import frames

HERE = Path(__file__).parent
SHOWN = ("right, fast", "turn left", "grow", "left, fast", "up", "turn right", "shrink", "down")
EACH, RATE = 40, 20  # frames of a motion, frames a second


def main() -> None:
    """Write both files, and play one through the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--films", type=int, default=0, help="films to teach with, in the folder `films`")
    given = parser.parse_args()

    random = torch.Generator().manual_seed(4)
    motions = [motion(name, True, random, (0, 1)) for name in SHOWN]
    film = written(filmed(motions, [EACH] * len(SHOWN), True, random), Path("motion.mkv"))
    for index in range(given.films):
        Path("films").mkdir(exist_ok=True)
        video, _ = Videos(given.films, 64, seed=1)[index]
        written(video * STD + MEAN, Path("films") / f"{index:03d}.mkv")

    stream = dissect.convert(conventional().eval(), CLIP)
    stream.clip.load_state_dict(torch.load(HERE / "digits-d3d.pt", weights_only=True))
    stream.labels = LABELS
    stream.preprocess = asdict(dissect.Preprocess((SIZE, SIZE), (MEAN,), (STD,), color="gray"))
    step = dissect.export(stream, "digits.onnx")

    runner = dissect.Runner(step)
    preprocess, _ = preprocess_of(runner)
    right = 0
    print(f"{'frame':>5}  {'the digit goes':16} {'the network says':28} ms")
    for scores in play(runner, frames(film), preprocess):
        truth, ((label, sure),) = SHOWN[scores.frame // EACH], scores.top(1, LABELS)
        right += label == truth
        if scores.frame % 10 == 9:
            print(f"{scores.frame + 1:5}  {truth:16} {label:28} {scores.ms:.2f}  {'#' * round(20 * sure)}")
    print(f"right at {right} of {EACH * len(SHOWN)} frames, the first of each motion included")
    print(f"\nAll of it, frame by frame: dissect run {step} {film}")


def written(video: Tensor, path: Path) -> Path:
    """A video (1, T, H, W) from 0 to 1 as a film, without loss."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=RATE)
        stream.height, stream.width, stream.pix_fmt = SIZE, SIZE, "gray"
        for picture in (video[0] * 255).round().numpy().astype(np.uint8):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="gray")))
        container.mux(stream.encode(None))
    return path


if __name__ == "__main__":
    main()

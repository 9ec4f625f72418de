"""How soon an answer follows the scene: the paper's Figure 2, and what a scene cut does to a stream.

A stream shows one motion for forty frames and then, without a break, another one that makes no ordered class with the
first. The answer follows when it is the new motion's class and stays so for three frames.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from scenes import LABELS, SINGLE, filmed, motion, ready
from torch import Tensor, nn
from torch.nn import functional as F
from training import FRAMES, WINDOW, Scale, accuracy, streamed

import dissect

BEFORE, AFTER = 40, 40
_KIN = {"right, slowly": "x", "right, fast": "x", "left, slowly": "x", "left, fast": "x", "up": "y", "down": "y"}


def streams(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Videos (N, 1, BEFORE + AFTER, ...) of two motions, and the classes of both."""
    random = torch.Generator().manual_seed(10_000 + seed)
    videos, first, then = [], [], []
    while len(videos) < count:
        one, two = torch.randint(len(SINGLE), (2,), generator=random).tolist()
        kin = [
            _KIN.get(SINGLE[index], SINGLE[index].split()[0] if "turn" in SINGLE[index] else "size")
            for index in (one, two)
        ]
        if kin[0] == kin[1]:
            continue
        motions = [motion(SINGLE[index], True, random, (0, 1)) for index in (one, two)]
        videos.append(ready(filmed(motions, [BEFORE, AFTER], True, random)))
        first.append(LABELS.index(SINGLE[one]))
        then.append(LABELS.index(SINGLE[two]))
    return torch.stack(videos), torch.tensor(first), torch.tensor(then)


@torch.no_grad()
def window_answers(model: nn.Module, videos: Tensor) -> Tensor:
    """The sliding window's scores at every frame from the first full window on, (N, classes, frames)."""
    ends = range(WINDOW, videos.shape[2] + 1)
    return torch.stack(
        [torch.cat([model(part[:, :, end - WINDOW : end]) for part in videos.split(60)]) for end in ends], 2
    )


@torch.no_grad()
def stream_answers(stream: dissect.Stream, videos: Tensor) -> Tensor:
    """The same of a stream."""
    return torch.cat([stream.clip(part)[:, :, WINDOW - 1 :] for part in videos.split(60)])


def followed(scores: Tensor, first: Tensor, then: Tensor) -> dict[str, float]:
    """Frames from the change until the answer follows, and how often it does, of streams that were right before it."""
    best = scores.argmax(1)
    change = BEFORE - (WINDOW - 1)
    right = best[:, change - 1] == first
    after = best[:, change:] == then[:, None]
    settled = F.pad(after.float(), (0, 2)).unfold(1, 3, 1).sum(2) == 3
    came = settled.any(1)
    counted = right & came
    frames = settled.float().argmax(1)[counted].float()
    return {
        "median": float(frames.median()) + 1 if len(frames) else float("nan"),
        "mean": float(frames.mean()) + 1 if len(frames) else float("nan"),
        "follows": float(came[right].float().mean()) * 100 if bool(right.any()) else float("nan"),
        "right before": float(right.float().mean()) * 100,
        "right at the end": float((best[:, -1] == then).float().mean()) * 100,
    }


def measured(model: nn.Module, learnt: Callable[..., dissect.Stream], scale: Scale, seed: int) -> dict[str, Any]:
    """The sliding window, and the taught stream with windows of its last 16, 8 and 4 frame vectors."""
    videos, first, then = streams(scale.streams, seed)
    found: dict[str, Any] = {"sliding window": followed(window_answers(model, videos), first, then)}
    for window in (WINDOW, 8, 4):
        scores = stream_answers(learnt(window=window), videos)
        found[f"stream, window of {window}"] = followed(scores, first, then)
    return found


@torch.no_grad()
def cuts(stream: dissect.Stream, videos: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy frame by frame after a scene cut: the stream reset there, or running on from another video."""
    before = videos.roll(1, 0)  # the video that was shown just before
    fresh, ran = [], []
    for part, old in zip(videos.split(60), before.split(60), strict=True):
        fresh.append(stream.clip(part).softmax(1))
        ran.append(stream.clip(torch.cat([old, part], 2))[:, :, FRAMES:].softmax(1))
    found: dict[str, Any] = {}
    for name, parts in (("reset", fresh), ("not reset", ran)):
        scores = torch.cat(parts)
        found[name] = {
            "all": accuracy(scores[:, :, WINDOW - 1 :].mean(2), labels)["all"],
            "by frame": [accuracy(scores[:, :, frame], labels)["all"] for frame in range(scores.shape[2])],
        }
    assert abs(found["reset"]["all"] - accuracy(streamed(stream, videos), labels)["all"]) < 1e-3
    return found

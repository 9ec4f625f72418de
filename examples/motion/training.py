"""How the networks of the experiment are trained and judged.

A video has twenty frames. The conventional network sees it through a window of sixteen, which slides from frame to frame;
a stream sees it once, and answers at the same frames. So both give five answers to a video, whose mean counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scenes import LABELS, ORDERED, SIZE, Videos
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

import dissect
from dissect import zoo

WINDOW, FRAMES = 16, 20
CLIP = torch.zeros(1, 1, WINDOW, SIZE, SIZE)
WIDTH = 8


@dataclass(frozen=True)
class Scale:
    """How much is trained and judged: steps, clips and videos."""

    steps: int = 1600
    batch: int = 32
    distil_steps: int = 1600
    distil_batch: int = 16
    distil_frames: int = 24
    distil_windows: int = 2
    clips: int = 192  # for recalibrate and reconstruct
    clip_frames: int = 32
    videos: int = 720
    head_videos: int = 1600
    head_epochs: int = 32
    long_videos: int = 1000
    streams: int = 150
    tune_videos: int = 800
    tune_epochs: int = 24


QUICK = Scale(12, 8, 6, 4, 24, 2, 6, 24, 36, 36, 2, 24, 6, 12, 2)


def conventional(seed: int | None = None) -> nn.Module:
    """The clip network: a 3D-ResNet-18 an eighth as wide as the paper's."""
    return zoo.resnet18(len(LABELS), in_channels=1, width=WIDTH, seed=seed)


def trained(network: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], steps: int, batch: int, seed: int) -> None:
    """Train on labelled videos, new ones all the time; ``loss`` takes videos (N, 1, FRAMES, ...) and labels (N,)."""
    videos = Videos(steps * batch, FRAMES, seed=seed)
    optimizer = torch.optim.AdamW(network.parameters(), 4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.15)
    network.to(memory_format=torch.channels_last_3d).train()  # a quarter faster on a CPU
    torch.manual_seed(seed)
    for step in range(steps):
        pairs = [videos[step * batch + index] for index in range(batch)]
        clips, labels = torch.stack([video for video, _ in pairs]), torch.tensor([label for _, label in pairs])
        descend(optimizer, loss(clips, labels))
        schedule.step()
    network.eval()


def descend(optimizer: Optimizer, loss: Tensor) -> None:
    """One step down."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def window_loss(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The cross entropy of the clip network, on the same window of all videos of a batch, wherever it lies."""

    def loss(videos: Tensor, labels: Tensor) -> Tensor:
        start = int(torch.randint(FRAMES - WINDOW + 1, ()))
        return F.cross_entropy(model(videos[:, :, start : start + WINDOW]), labels)

    return loss


def stream_loss(clip: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The cross entropy of a clip form, on all of its answers from the first full window on."""

    def loss(videos: Tensor, labels: Tensor) -> Tensor:
        scores = clip(videos)[:, :, WINDOW - 1 :]
        return F.cross_entropy(scores, labels[:, None].expand(-1, scores.shape[2]))

    return loss


@torch.no_grad()
def windowed(model: nn.Module, videos: Tensor) -> Tensor:
    """The clip network's mean answer over all windows of each video, (N, classes)."""
    model.eval()
    starts = range(videos.shape[2] - WINDOW + 1)
    return torch.cat(
        [
            sum(model(part[:, :, at : at + WINDOW]).softmax(1) for at in starts) / len(starts)
            for part in videos.split(60)
        ]
    )


@torch.no_grad()
def streamed(stream: dissect.Stream, videos: Tensor) -> Tensor:
    """A stream's mean answer to each video, from the first full window on; every video on a fresh stream."""
    stream.clip.eval()
    late = stream.timing.delay
    parts = []
    for part in videos.split(60):
        frames = part.shape[2]
        rest = part.new_zeros(*part.shape[:2], late, *part.shape[3:])
        out = stream.clip(torch.cat([part, rest], 2) if late else part)
        parts.append(out[:, :, late + WINDOW - 1 : late + frames].softmax(1).mean(2))
    return torch.cat(parts)


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """The part of right answers, in percent: of all videos, of those that only order tells apart, and of the others."""
    right = (scores.argmax(1) == labels).float() * 100
    ordered = torch.tensor([LABELS[label] in ORDERED for label in labels.tolist()])
    found = {"all": right, "ordered": right[ordered], "single": right[~ordered]}
    return {name: float(part.mean()) for name, part in found.items() if len(part)}


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """The mean, and the standard deviation over seeds."""
    mean = sum(values) / len(values)
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1))

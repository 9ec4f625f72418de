"""Videos of handwritten digits that move: what a digit does is the label, which digit it is says nothing.

Every video is rendered when it is asked for, from its number and a seed alone: 32x32 pixels, one channel, a digit of
scikit-learn's (real images, 8x8) that moves over a dim digit that stands still, with noise on every frame. What leaves
the picture on one side comes back on the other, so that a motion may last as long as one likes.

The classes are directions, speeds, turns and sizes, and pairs of them in two halves: "right, left" is the video of
"left, right" with its halves in the other order, and nothing else tells the two apart. The halves meet softly, so that
no three frames show both.

The validation split has digits that training never sees, and motions that it never sees: speed, angle and place are
drawn from a checkerboard of cells, whose white cells are training and whose black cells are validation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

SIZE = 32
MEAN, STD = 0.12, 0.18  # of the pixels, from 0 to 1
KINDS = {  # what moves: (x, y, angle, size), and how fast, from ... to: pixels, pixels, degrees, parts a frame
    "right, slowly": ((1, 0, 0, 0), (0.4, 0.8)),
    "right, fast": ((1, 0, 0, 0), (1.2, 2.0)),
    "left, slowly": ((-1, 0, 0, 0), (0.4, 0.8)),
    "left, fast": ((-1, 0, 0, 0), (1.2, 2.0)),
    "up": ((0, -1, 0, 0), (0.5, 1.8)),
    "down": ((0, 1, 0, 0), (0.5, 1.8)),
    "turn right": ((0, 0, 1, 0), (6.0, 15.0)),
    "turn left": ((0, 0, -1, 0), (6.0, 15.0)),
    "grow": ((0, 0, 0, 1), (0.03, 0.06)),
    "shrink": ((0, 0, 0, -1), (0.03, 0.06)),
}
HALVES = ("right", "left"), ("up", "down"), ("turn right", "turn left"), ("grow", "shrink")
SPEEDS = {"right": (0.5, 1.8), "left": (0.5, 1.8)}  # of a half, where no single motion has that name
LABELS = (*KINDS, *(f"{first}, then {then}" for pair in HALVES for first, then in (pair, pair[::-1])))
ORDERED = tuple(label for label in LABELS if ", then " in label)
SINGLE = tuple(KINDS)
_LEAST, _MOST = math.log(1.1), math.log(2.6)  # of the digit's size, in 8 pixels


@dataclass(frozen=True)
class Motion:
    """What one digit does: places at frame 0 (pixels, degrees, log of the size), and a speed of each for each half."""

    start: tuple[float, float, float, float]
    speed: tuple[float, float, float, float]
    drift: tuple[float, float, float, float]
    turns_at: float | None  # the frame at which the second half begins, if there is one

    def path(self, frames: int) -> Tensor:
        """x, y, angle and log of the size at every frame, (frames, 4)."""
        times = torch.arange(frames, dtype=torch.float32)
        if self.turns_at is None:
            way = times
        else:  # the speed falls from 1 to -1 like a tanh, so the way is its integral
            soft = 2.0
            way = soft * (
                math.log(math.cosh(self.turns_at / soft)) - torch.log(torch.cosh((times - self.turns_at) / soft))
            )
        speed, drift, start = (torch.tensor(part) for part in (self.speed, self.drift, self.start))
        path = start + way[:, None] * speed + times[:, None] * drift
        path[:, 3] = _LEAST + (path[:, 3] - _LEAST) % (_MOST - _LEAST)  # too large: another one, small
        return path


def motion(label: str, validation: bool, random: torch.Generator, turns_at: tuple[float, float]) -> Motion:
    """A motion of a class, from the split's cells; ``turns_at`` is the range of the frame of its second half."""

    def uniform(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=random))

    while True:
        speed, angle, place = (uniform(0, 1) for _ in range(3))
        if ((int(4 * speed) + int(4 * angle) + int(4 * place)) % 4 == 0) == validation:
            break
    first = label.split(", then ")[0]
    axes, (slow, fast) = KINDS.get(first) or (KINDS[f"{first}, fast"][0], SPEEDS[first])
    rate = slow + (fast - slow) * speed
    start = (place * SIZE, uniform(0, SIZE), angle * 360, uniform(_LEAST, _MOST))
    drift = tuple(uniform(-most, most) * (not axis) for most, axis in zip((0.15, 0.15, 1.5, 0.006), axes, strict=True))
    change = None if label not in ORDERED else uniform(*turns_at)
    return Motion(start, tuple(rate * axis for axis in axes), drift, change)  # type: ignore[arg-type]


@lru_cache(maxsize=2)
def digits(validation: bool) -> Tensor:
    """The split's digits, (count, 8, 8), from 0 to 1: a quarter of them, drawn once, is the validation's."""
    from sklearn.datasets import load_digits

    images = torch.tensor(load_digits().images, dtype=torch.float32) / 16
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(2006))
    quarter = len(images) // 4
    return images[order[:quarter] if validation else order[quarter:]]


def drawn(image: Tensor, path: Tensor) -> Tensor:
    """A digit (8, 8) on its path (frames, 4) as pictures (frames, SIZE, SIZE)."""
    x, y, angle, size = path.unbind(1)
    steps = torch.arange(SIZE, dtype=torch.float32)

    def offset(place: Tensor) -> Tensor:  # from the digit's middle to each pixel, the short way round
        return (steps - place[:, None] + SIZE / 2) % SIZE - SIZE / 2

    across, down = offset(x)[:, None, :], offset(y)[:, :, None]
    cos, sin = torch.cos(torch.deg2rad(angle))[:, None, None], torch.sin(torch.deg2rad(angle))[:, None, None]
    scale = (4 * torch.exp(size))[:, None, None]
    grid = torch.stack([(cos * across + sin * down) / scale, (cos * down - sin * across) / scale], -1)
    return F.grid_sample(image.expand(len(path), 1, 8, 8), grid, align_corners=False).squeeze(1)


def filmed(motions: Sequence[Motion], frames: Sequence[int], validation: bool, random: torch.Generator) -> Tensor:
    """A video (1, T, SIZE, SIZE), grey from 0 to 1: one motion after another, each for its ``frames``."""
    pool = digits(validation)
    moving, still = pool[torch.randint(len(pool), (2,), generator=random)]
    paths: list[Tensor] = []
    for one, length in zip(motions, frames, strict=True):
        path = one.path(length + 1)
        if paths:  # go on from where the last motion ended
            path[:, :3] += paths[-1][-1, :3] - path[0, :3]
        paths.append(path)
    bright = 0.6 + 0.4 * torch.rand((), generator=random)
    video = drawn(moving, torch.cat([path[:-1] for path in paths])) * bright
    place = torch.rand(4, generator=random) * torch.tensor([SIZE, SIZE, 360.0, _MOST - _LEAST])
    place[3] += _LEAST
    video = torch.maximum(video, drawn(still, place[None]) * 0.4)
    return (video + 0.15 * torch.randn(video.shape, generator=random)).clamp(0, 1).unsqueeze(0)


def ready(video: Tensor) -> Tensor:
    """A video as the networks take it: about mean 0 and deviation 1."""
    return (video - MEAN) / STD


class Videos(Dataset[tuple[Tensor, int]]):
    """``count`` labelled videos, (1, frames, SIZE, SIZE) each.

    Number i is the same video whenever it is asked for; with ``fresh`` it is a new one each time, from torch's own
    random numbers. The second half of an ordered class begins between the parts ``turns`` of the video.
    """

    def __init__(
        self,
        count: int,
        frames: int,
        *,
        validation: bool = False,
        seed: int = 0,
        turns: tuple[float, float] = (0.4, 0.6),
        fresh: bool = False,
    ) -> None:
        self.count, self.frames, self.validation, self.seed, self.fresh = count, frames, validation, seed, fresh
        self.turns = (turns[0] * frames, turns[1] * frames)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        number = int(torch.randint(2**40, ())) if self.fresh else index
        random = torch.Generator().manual_seed((self.seed * 2 + self.validation) * 1_000_003 + number)
        label = int(torch.randint(len(LABELS), (), generator=random))
        one = motion(LABELS[label], self.validation, random, self.turns)
        return ready(filmed([one], [self.frames], self.validation, random)), label

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All of them at once: (count, 1, frames, SIZE, SIZE), and their labels (count,)."""
        videos, labels = zip(*(self[index] for index in range(self.count)), strict=True)
        return torch.stack(videos), torch.tensor(labels)

"""Timing: where the positions of a value lie in the stream, in whole frames.

Offline, a value has positions ``i = 0 .. n-1``. In the stream, position ``i`` exists at time
``delay + i * stride`` (time 0 is the first frame). Streams are dense: a value is computed at every
frame, and the times between two positions hold what the network would say of a clip that began a
little later. Integers only, no tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

__all__ = ["Front", "Length", "Timing", "Window", "joined"]


@dataclass(frozen=True)
class Length:
    """How many positions a value has for a clip of ``L`` frames, as a chain of floor divisions.

    Each step ``(mul, add, stride)`` takes ``n`` to ``(n * mul + add) // stride + 1``; an empty chain is ``L`` itself.
    """

    steps: tuple[tuple[int, int, int], ...] = ()

    def then(self, add: int, stride: int = 1, mul: int = 1) -> Length:
        """The length after one more operator: for a convolution, ``add`` is padding minus reach minus one."""
        if (mul, add, stride) == (1, -1, 1):
            return self
        if self.steps and mul == 1 and stride == 1 and self.steps[-1][0] == 1 and self.steps[-1][2] == 1:
            return Length(self.steps[:-1]).then(self.steps[-1][1] + add + 1)
        return Length((*self.steps, (mul, add, stride)))

    @property
    def period(self) -> int:
        """The frames by which a clip grows when every division of the chain comes out even again."""
        period = grown = 1
        for mul, _, stride in self.steps:
            more = stride // gcd(grown * mul, stride)
            period, grown = period * more, grown * mul * more // stride
        return period

    def __call__(self, frames: Any) -> Any:
        """The number of positions; ``frames`` is an ``int`` or an integer tensor."""
        count = frames
        for mul, add, stride in self.steps:
            count = (count * mul + add) // stride + 1
        return count


@dataclass(frozen=True)
class Window:
    """Which positions a window axis holds: the last ones of a value, oldest first, the newest at the value's own position.

    delay, stride  where position 0 of the windowed value existed, and the frames between two positions
    lag            frames by which the window was delayed since
    row            the row of the plan that made it
    zero           entries before the first position are zero
    weights        the entries are weights of the positions, as a softmax gives them
    """

    delay: int
    stride: int
    lag: int = 0
    row: int = 0
    zero: bool = False
    weights: bool = False

    @property
    def start(self) -> int:
        """The time at which the newest entry is position 0."""
        return self.delay + self.lag


@dataclass(frozen=True)
class Front:
    """What stands in front of a value's own positions: some of these again, as a padding by replication or reflection shows them.

    start, stride  where its own position 0 exists, and the frames between two
    order          which own position stands where, the nearest to position 0 first; the last one stands further on, too
    """

    start: int = 0
    stride: int = 1
    order: tuple[int, ...] = (0,)

    @property
    def known(self) -> int:
        """The time from which all of it is known."""
        return self.start + max(self.order) * self.stride

    def cut(self, delay: int) -> Front | None:
        """What is left of it for a value whose positions begin at ``delay``."""
        count = -((delay - self.start) // self.stride)
        return replace(self, order=self.order[:count]) if count > 0 else None


@dataclass(frozen=True)
class Timing:
    """Where a value's positions lie, and how far back and ahead each looks.

    stride      frames between two positions
    delay       frames until position 0 exists; negative only behind a zero padding
    length      number of positions for a clip of L frames
    old, new    the oldest and the newest frame that a value at time t depends on: t - old, t - new
    fill        what the value holds outside its positions, where that is known (zeros of a padding)
    removed     the product of temporal strides that the preset took out
    nonneg      never below zero, so that a zero is as good as minus infinity to a max pool
    padding     what an explicit padding added in front of and behind the positions, for the next convolution to know
    pooled      rows of the plan that are exact only while this value is not broadcast back onto every position
    running     one frame that stands for every position, in a loop over frames: positions without a time axis
    wait        frames that it must still be delayed until a position that exists is known not to be cut off by the end
    still       all its positions are one: the only one of a slice, repeated
    first       positions of its own stand in front of them, for who reads its history; ``delay`` counts from there
    newest      rows of the plan that are exact only at the last position of a clip
    spare       positions at the end that hold nothing but what a padding makes, and the row of the plan that is exact
                once they are cropped (-1: none)
    wild        what stands outside its positions may be no number at all (a division by zero)
    endless     depends on every frame so far, so that no still scene reaches a steady state
    """

    stride: int = 1
    delay: int = 0
    length: Length = Length()
    old: int = 0
    new: int = 0
    fill: float | None = None
    removed: int = 1
    nonneg: bool = False
    padding: tuple[int, int] = (0, 0)
    pooled: frozenset[int] = frozenset()
    running: bool = False
    wait: int = 0
    first: Front | None = None
    still: bool = False
    newest: frozenset[int] = frozenset()
    endless: bool = False
    wild: bool = False
    spare: tuple[int, int] = (0, -1)

    @property
    def receptive_field(self) -> int:
        return self.old - self.new + 1

    def last(self, frames: Any) -> Any:
        """The time of the last position of a clip of ``frames`` frames."""
        return self.delay + self.stride * (self.length(frames) - 1)

    @property
    def settles(self) -> int:
        """The time from which all positions so far are known: not before the stream, nor before those repeated in front."""
        return max(self.delay, 0, self.first.known if self.first else 0)

    def but(self, **changes: Any) -> Timing:
        return replace(self, **changes)

    def delayed(self, frames: int) -> Timing:
        return self.but(
            delay=self.delay + frames,
            old=self.old + frames,
            new=self.new + frames,
            wait=max(0, self.wait - frames),
            spare=(0, -1),
        )

    def read(self, delay: int, ages: Sequence[int]) -> tuple[int, list[int], Timing]:
        """When a window of such ages first gives a position, if ``delay`` is not too early, its ages, and the timing of what it
        reads: all as much later as it takes not to be before the stream, nor before what stands in front is known."""
        late = max(0, (self.first.known if self.first else 0) - delay)
        return delay + late, [age + late for age in ages], self.but(new=self.new + late)

    def owed(self, frames: int, spacing: int | None = None) -> int:
        """How late positions become certain: the most frames from a position's own time (of a stream without delay)
        to the arrival of the frame that makes a clip long enough to have it; clips up to a few times ``frames``."""
        spacing = self.stride if spacing is None else spacing
        found = []
        for length in range(1, 4 * frames + 64):
            first = max(self.length(length - 1), 0)
            if self.length(length) > first:
                found.append(length - 1 - first * spacing)
        return max(found, default=0)

    def certain(self, frames: int) -> Timing:
        """With the frames to wait until its positions are certain."""
        known = self.first.known if self.first else self.delay
        return self.but(wait=max(0, self.owed(frames) - self.delay, known - self.delay))

    def plain(self) -> Timing:
        """After an operator that may change what stands outside the positions."""
        return self.but(fill=None, nonneg=False, padding=(0, 0), first=None)


def joined(timings: Iterable[Timing]) -> Timing:
    """Several values that were brought to one stride and delay, as one."""
    known = list(timings)
    first = known[0]
    return first.plain().but(
        old=max(timing.old for timing in known),
        new=min(timing.new for timing in known),
        removed=max(timing.removed for timing in known),
        pooled=frozenset().union(*(timing.pooled for timing in known)),
        running=any(timing.running for timing in known),
        newest=frozenset().union(*(timing.newest for timing in known)),
        endless=any(timing.endless for timing in known),
        wild=any(timing.wild for timing in known),
        wait=max(timing.wait for timing in known),
        spare=first.spare if len(set(known)) == 1 else (0, -1),
    )

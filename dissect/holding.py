"""Primitives that hold values: the first frame, the last one, a choice between two, a running sum.

The law of :mod:`dissect.primitives` holds: a chunk over T frames equals T steps. Masks are ``(rows,)``, from the clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dissect.primitives import CacheSpec, History, Known, Primitive, lifted, tap
from dissect.timing import Front

__all__ = ["Choose", "FirstHistory", "FrontHistory", "Hold", "RunningSum", "Taps", "counted"]


def counted(dtype: torch.dtype) -> torch.dtype | None:
    """The dtype of a cache of values that are no floats; None for floats, whose caches are what frames are.

    A mask is kept as numbers, between which ONNX Runtime can choose.
    """
    return None if dtype.is_floating_point else torch.uint8 if dtype is torch.bool else dtype


class Choose(Primitive):
    """The first value where the mask is set, the second elsewhere."""

    def forward(self, x: Tensor, other: Tensor, mask: Tensor, frames: int | None = None) -> Tensor:
        like = x if x.dim() >= other.dim() else other  # a constant has no rows
        return torch.where(lifted(mask, like) > 0, x.to(like.dtype), other.to(like.dtype))


class Hold(Primitive):
    """Sample and hold: the value where the mask is set, elsewhere the last value for which it was (zeros before the first)."""

    def __init__(self, frame: Sequence[int], dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.frame = tuple(frame)
        self.dtype = dtype

    @property
    def specs(self) -> tuple[CacheSpec, ...]:  # type: ignore[override]
        return (CacheSpec(self.frame, self.dtype),)

    def forward(self, x: Tensor, mask: Tensor, caches: tuple[Tensor] | None = None, frames: int | None = None) -> Any:
        if frames is None:
            assert caches is not None
            y = torch.where(lifted(mask, x) > 0, x, caches[0])
            return y, (y + 0,)
        x = x.reshape(-1, frames, *x.shape[1:])
        held = x.new_zeros((x.shape[0], *x.shape[2:])) if caches is None else caches[0]
        known = torch.cat([held.unsqueeze(1), x], 1)
        at = torch.arange(1, frames + 1, device=x.device) * (mask.reshape(-1, frames) > 0)
        at = at.cummax(1).values.reshape(-1, frames, *[1] * (x.dim() - 2)).expand_as(x)
        y = known.gather(1, at)
        return y.flatten(0, 1), (y[:, -1],)

    def extra_repr(self) -> str:
        return f"frame={self.frame}"


class FirstHistory(History):
    """A history in front of whose first frame that frame stands, as often as is asked for.

    ``mask`` is 0 at the stream's first frame and 1 afterwards.
    """

    def forward(self, x: Tensor, mask: Tensor, caches: tuple[Tensor] | None = None, frames: int | None = None) -> Any:  # type: ignore[override]
        if x.dim() == 1:
            x = x.unsqueeze(1)
        if self.depth == 0:
            return super().forward(x, None, frames)
        first = x if frames is None else x.reshape(-1, frames, *x.shape[1:])[:, 0]
        late = mask if frames is None else mask.reshape(-1, frames)[:, 0]
        before = first if self.depth == 1 else first.repeat(1, self.depth, *[1] * (first.dim() - 2))
        if caches is not None:
            before = torch.where(lifted(late, before) > 0, caches[0], before)
        return super().forward(x, (before,), frames)


class FrontHistory(History):
    """A history in front of whose first position stand some of its own again (:class:`~dissect.timing.Front`).

    ``mask`` is 0 while they are put there: until all of them are known, for every phase of the stride. A value that old has
    none of what is read for it among the older ones, so that putting it there once more changes nothing.
    """

    def __init__(self, frame: Sequence[int], front: Front, dtype: torch.dtype | None = None) -> None:
        self.own = front.stride * (max(front.order) + 1) - 1  # up to this age nothing stands in front
        super().__init__(frame, self.own, dtype)
        self.front = front

    def source(self, age: int) -> int:
        """The age of what stands at an age, when the newest position is the last that stands in front, too."""
        back, phase = divmod(age, self.front.stride)
        last, order = max(self.front.order), self.front.order
        position = last - back
        return phase + self.front.stride * (
            last - (position if position >= 0 else order[min(-position, len(order)) - 1])
        )

    def forward(self, x: Tensor, mask: Tensor, caches: tuple[Tensor] | None = None, frames: int | None = None) -> Any:  # type: ignore[override]
        if x.dim() == 1:
            x = x.unsqueeze(1)
        if self.depth == 0:
            return super().forward(x, None, frames)
        if frames is None:
            assert caches is not None
            held = (caches[0], x)
            older = [tap(held, self.source(age), None) for age in reversed(range(self.own + 1, self.depth + 1))]
            put = torch.cat([*older, caches[0][:, len(older) * x.shape[1] :]], 1)
            return super().forward(x, (torch.where(lifted(mask, put) > 0, caches[0], put),), None)
        plain, _ = super().forward(x, caches, frames)
        ages = range(self.depth + 1)
        known = Fronted(
            plain, mask.reshape(-1, frames), torch.tensor([self.source(age) for age in ages], device=x.device)
        )
        last = [known.tap(age).unflatten(0, (-1, frames))[:, -1] for age in reversed(range(self.depth))]
        return known, (torch.cat(last, 1),)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.front}"


class Fronted(Known):
    """What a :class:`FrontHistory` knows at each frame of a chunk."""

    def __init__(self, plain: Tensor, mask: Tensor, sources: Tensor) -> None:
        self.plain, self.sources = plain, sources
        frames = mask.shape[1]
        self.now = torch.arange(frames, device=mask.device).expand_as(mask)
        count = (mask <= 0).sum(1, keepdim=True)  # frames of the chunk at which something is put in front
        self.base = torch.where(count > 0, torch.minimum(self.now, count - 1), self.now)
        self.open = (count > 0).expand_as(mask)

    def tap(self, age: int) -> Tensor:
        then = age - (self.now - self.base)  # its age when last something was put in front
        source = torch.where(self.open & (then > 0), self.sources[then.clamp(min=0)], then)
        start = self.plain.shape[1] - self.now.shape[1]
        rows = torch.arange(self.plain.shape[0], device=source.device).unsqueeze(1)
        return self.plain[rows, start + self.base - source].flatten(0, 1)


class Taps(Primitive):
    """The values of several ages, stacked on a new last dimension."""

    def __init__(self, ages: Sequence[int]) -> None:
        super().__init__()
        self.ages = tuple(ages)

    def forward(self, known: Any, frames: int | None = None) -> Tensor:
        return torch.stack([tap(known, age, frames) for age in self.ages], -1)

    def extra_repr(self) -> str:
        return f"ages={self.ages}"


class RunningSum(Primitive):
    """The sum of this value and of all that lie a multiple of ``stride`` frames before it."""

    def __init__(self, frame: Sequence[int], stride: int = 1) -> None:
        super().__init__()
        self.frame = tuple(frame)
        self.stride = stride

    @property
    def specs(self) -> tuple[CacheSpec, ...]:  # type: ignore[override]
        return (CacheSpec(self.frame),) * self.stride

    def forward(self, x: Tensor, caches: tuple[Tensor, ...] | None = None, frames: int | None = None) -> Any:
        steps = (x,) if frames is None else x.reshape(-1, frames, *x.shape[1:]).unbind(1)
        sums = list(caches) if caches is not None else [torch.zeros_like(steps[0])] * self.stride
        totals = []
        for step in steps:
            totals.append(sums[0] + step)
            sums = [*sums[1:], totals[-1]]
        return (torch.stack(totals, 1).flatten(0, 1) if frames is not None else totals[0]), tuple(
            total + 0 for total in sums
        )

    def extra_repr(self) -> str:
        return f"frame={self.frame}, stride={self.stride}"

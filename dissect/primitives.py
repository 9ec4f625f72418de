"""Temporal primitives: the only modules of a dissected network that mix time.

The law: **the clip form over T frames equals T steps, whatever the chunking.** Each primitive has one
general form, a chunk of ``frames`` frames with the caches of the frames before, and a step form, one
frame, in which no tensor has a rank above 4. Primitives know nothing of graphs.

Layout. A frame tensor is ``(rows, *frame)`` where ``rows`` is ``N * frames``, batch major. A cache is
``(N, ...)``; a history of H frames is ``(N, H * C, ...)``, oldest first, stacked on the first frame
dimension. A fresh stream is all zeros in every cache. ``caches=None`` means fresh.
``frames=None`` asks for the step form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from dissect.timing import Length

__all__ = [
    "CacheSpec",
    "Clock",
    "CumulativeMean",
    "Gate",
    "History",
    "Known",
    "Primitive",
    "Query",
    "Tap",
    "WindowReduce",
    "unforgetting",
]


@dataclass(frozen=True)
class CacheSpec:
    """One cache of a primitive: its shape without the batch, ``dtype`` (None: that of the frames), and its role."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    role: str = "cache"

    def zeros(self, batch: int, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        return torch.zeros((batch, *self.shape), dtype=self.dtype or dtype, device=device)


class Primitive(nn.Module):
    """A module that mixes time. Subclasses with caches return ``(value, new caches)``.

    A reader of a :class:`History` keeps what it reads as ``ages`` (a tuple, falling) or ``age``, and depends on time by
    that alone: over a history of every other frame it is the same reader with other ages (:mod:`dissect.cadence`).
    """

    #: the caches this primitive keeps, in order
    specs: tuple[CacheSpec, ...] = ()


class History(Primitive):
    """The last ``depth`` values of one tensor, kept for all who read its past.

    Chunk form: ``(N * T, C, ...)`` to ``(N, depth + T, C, ...)``. Step form: the pair ``(cache, value)``, so
    that a reader takes only the frames it needs; with ``depth == 1`` the new cache is the value itself. ``dtype`` is
    that of values that are no floats (a mask, the places of maxima), whose cache is of their own kind.
    """

    def __init__(self, frame: Sequence[int], depth: int = 1, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.frame = tuple(frame)
        self.depth = depth
        self.dtype = dtype

    @property
    def specs(self) -> tuple[CacheSpec, ...]:  # type: ignore[override]
        if self.depth == 0:
            return ()
        channels, rest = (self.frame[0], self.frame[1:]) if self.frame else (1, ())
        return (CacheSpec((self.depth * channels, *rest), self.dtype),)

    def forward(self, x: Tensor, caches: tuple[Tensor] | None = None, frames: int | None = None) -> Any:
        if x.dim() == 1:
            x = x.unsqueeze(1)
        channels = x.shape[1]
        if self.depth == 0:  # its readers take the present value alone: there is nothing to keep
            return (x[:, :0], x) if frames is None else x.reshape(-1, frames, *x.shape[1:])
        if frames is None:
            assert caches is not None
            (cache,) = caches
            return (cache, x), (x if self.depth == 1 else torch.cat([cache[:, channels:], x], 1),)
        x = x.reshape(-1, frames, *x.shape[1:])
        if caches is None:
            past = x.new_zeros((x.shape[0], self.depth, *x.shape[2:]))
        else:
            past = caches[0].reshape(x.shape[0], self.depth, *x.shape[2:])
        known = torch.cat([past, x], 1)
        return known, (known[:, frames:].reshape(x.shape[0], -1, *x.shape[3:]),)

    def extra_repr(self) -> str:
        return f"frame={self.frame}, depth={self.depth}"


def unforgetting(module: nn.Module) -> list[str]:
    """The layers that never forget what they saw: all that keep something but histories, and the clock."""
    return [
        name
        for name, layer in module.named_modules()
        if isinstance(layer, Primitive) and layer.specs and not isinstance(layer, (History, Clock))
    ]


class Known:
    """What a history knows at one step, held in another way than as the pair of a cache and the newest value.

    Law: :meth:`tap` and :meth:`stacked` say what the functions of the same names say of that pair.
    """

    newest: Tensor

    def tap(self, age: int) -> Tensor:
        raise NotImplementedError

    def stacked(self, ages: Sequence[int]) -> Tensor:
        parts = [self.tap(age) for age in ages]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def tap(known: Any, age: int, frames: int | None) -> Tensor:
    """The value ``age`` frames ago out of a :class:`History`: ``(rows, C, ...)``."""
    if isinstance(known, Known):
        return known.tap(age)
    if frames is None:
        cache, x = known
        if age == 0:
            return x  # type: ignore[no-any-return]
        channels = x.shape[1]
        start = cache.shape[1] - age * channels
        return cache[:, start : start + channels]  # type: ignore[no-any-return]
    start = known.shape[1] - frames - age
    return known[:, start : start + frames].flatten(0, 1)  # type: ignore[no-any-return]


def stacked(known: Any, ages: Sequence[int]) -> Tensor:
    """The step form's frames of the given ages (falling), stacked on dimension 1: one slice a run of ages."""
    if isinstance(known, Known):
        return known.stacked(ages)
    cache, x = known
    channels = x.shape[1]
    parts: list[Tensor] = []
    past = [age for age in ages if age > 0]
    while past:
        run = 1
        while run < len(past) and past[run] == past[0] - run:
            run += 1
        start = cache.shape[1] - past[0] * channels
        stop = start + run * channels
        parts.append(cache if (start, stop) == (0, cache.shape[1]) else cache[:, start:stop])
        past = past[run:]
    if ages[-1] == 0:
        parts.append(x)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


class Tap(Primitive):
    """A value as it was ``age`` frames ago (a delay)."""

    def __init__(self, age: int, scalar: bool = False) -> None:
        super().__init__()
        self.age = age
        self.scalar = scalar

    def forward(self, known: Any, frames: int | None = None) -> Tensor:
        x = tap(known, self.age, frames)
        return x[:, 0] if self.scalar else x

    def extra_repr(self) -> str:
        return f"age={self.age}"


@dataclass(frozen=True)
class Query:
    """A question to the clock: how many of the last ``positions`` positions, seen from ``shift`` frames ago, are inside.

    With ``phase`` the answer is 0 between two positions; with ``since`` it is the number of frames since the last one.
    """

    delay: int
    stride: int
    length: Length | None
    shift: int = 0
    positions: int = 1
    phase: bool = False
    since: bool = False


class Clock(Primitive):
    """Knows the age of each stream and, in a flush, its length; answers which positions lie inside a value's own.

    Caches: ``age``, the number of frames seen, and ``length``, 0 while the stream is live. The age never grows
    without bound: past every delay it repeats with the period of the strides. To flush, set ``length`` to ``age`` and go on
    with frames of zeros. Answers are ``(rows,)`` each, in the dtype of the frames.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queries: list[Query] = []
        self.period = 1
        self.settled = 0

    def ask(self, query: Query) -> int:
        if query not in self.queries:
            self.queries.append(query)
        return self.queries.index(query)

    @property
    def flushes(self) -> bool:
        return any(query.length is not None for query in self.queries)

    @property
    def phased(self) -> bool:
        return any(query.phase or query.since for query in self.queries)

    @property
    def specs(self) -> tuple[CacheSpec, ...]:  # type: ignore[override]
        age = CacheSpec((), torch.int64, "age")
        return (age, CacheSpec((), torch.int64, "length")) if self.flushes else (age,)

    def forward(self, like: Tensor, caches: tuple[Tensor, ...] | None = None, frames: int | None = None) -> Any:
        answers, new = self.told(like, caches, frames)
        return tuple(answers[:, index] for index in range(len(self.queries))), new

    def told(self, like: Tensor, caches: tuple[Tensor, ...] | None = None, frames: int | None = None) -> Any:
        """The answers to all questions in one tensor, ``(rows, questions)``, and the new caches."""
        chunk = frames or 1
        if caches is None:
            age = torch.zeros(like.shape[0] // chunk, dtype=torch.int64, device=like.device)
            length = torch.zeros_like(age)
        else:
            age = caches[0]
            length = caches[1] if self.flushes else torch.zeros_like(age)
        if frames is None:
            time, ended = age, length
        else:
            time = (age[:, None] + torch.arange(frames, device=age.device)).flatten()
            ended = length[:, None].expand(-1, frames).flatten()
        answers = self.answer(time.unsqueeze(1), ended.unsqueeze(1))
        answers = answers.to(like.dtype if like.is_floating_point() else torch.get_default_dtype())
        later = age + chunk
        turn = self.settled + self.period
        wrapped = (
            later.clamp(max=self.settled)
            if self.period == 1
            else torch.where(later >= turn, self.settled + (later - self.settled) % self.period, later)
        )
        new_age = torch.where(length > 0, later, wrapped) if self.flushes else wrapped
        new = (new_age, length + 0) if self.flushes else (new_age,)
        return answers, new

    def answer(self, time: Tensor, ended: Tensor) -> Tensor:
        """``(rows, queries)`` counts, all queries at once."""

        def row(values: Sequence[int]) -> Tensor:
            return torch.tensor([values], device=time.device)

        low = row([query.delay + query.shift for query in self.queries])
        stride = row([query.stride for query in self.queries])
        positions = row([query.positions for query in self.queries])

        unit = all(
            query.stride == 1 for query in self.queries
        )  # then there is nothing to divide, in a step not even a node
        same = len({query.positions for query in self.queries}) == 1

        def divided(frames: Tensor) -> Tensor:
            return frames if unit else frames.div(stride, rounding_mode="floor")

        def clamp(count: Tensor) -> Tensor:
            if same:
                return count.clamp(0, self.queries[0].positions)
            return torch.minimum(count.clamp(min=0), positions)

        if self.flushes:
            chains = list(dict.fromkeys(query.length or Length() for query in self.queries))
            counts = torch.cat([chain(ended) for chain in chains], 1)
            index = torch.tensor([chains.index(query.length or Length()) for query in self.queries], device=time.device)
            high = low + stride * (counts[:, index] - 1)
            endless = row([query.length is None for query in self.queries])
            live = (ended == 0) | endless
            count = clamp(divided(time - low) + 1)
            over = clamp(-divided(high - time))
            count = count - torch.where(live, torch.zeros_like(over), over)
        else:
            count = clamp(divided(time - low) + 1)
        if self.phased:
            since = (time - low) % stride
            count = count * ((since == 0) | ~row([query.phase for query in self.queries]))
            if any(query.since for query in self.queries):
                count = torch.where(row([query.since for query in self.queries]), since, count)
        return count

    def extra_repr(self) -> str:
        return f"queries={len(self.queries)}, period={self.period}"


def lifted(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dim() == like.dim() > 1:
        return mask.to(like.dtype)
    return mask.reshape(-1, *[1] * (like.dim() - 1)).to(like.dtype)


class Gate(Primitive):
    """Sets a value to ``fill`` where the clock's mask is 0: what a padding shows outside the clip.

    ``wild``: what stands there may be no number, so that a product with 0 will not do.
    """

    def __init__(self, fill: float = 0.0, wild: bool = False) -> None:
        super().__init__()
        self.fill = fill
        self.wild = wild

    def forward(self, x: Tensor, mask: Tensor, frames: int | None = None) -> Tensor:
        mask = lifted(mask, x)
        if self.fill == 0.0 and not self.wild:
            return x * mask
        return torch.where(mask > 0, x, torch.full((), self.fill, dtype=x.dtype, device=x.device))

    def extra_repr(self) -> str:
        return f"fill={self.fill}" + (", wild" if self.wild else "")


def outermost(dtype: torch.dtype, low: bool) -> float:
    """The lowest number, or the highest, that there is: minus infinity, or the first of the whole numbers."""
    if dtype.is_floating_point:
        return float("-inf") if low else float("inf")
    limits = torch.iinfo(dtype)
    return limits.min if low else limits.max


class WindowReduce(Primitive):
    """Maximum, minimum, sum or mean over the values of the given ages.

    ``masks``, one a tap, say which values count (all, if none is given), and ``here``, whether the window is one of the
    clip's: then the maximum of nothing is -inf, as torch's is. ``count`` divides a sum where the divisor follows the
    stream; ``divisor`` is a constant one.
    """

    def __init__(self, kind: str, ages: Sequence[int], divisor: float = 1.0) -> None:
        super().__init__()
        self.kind = kind
        self.ages = tuple(ages)
        self.divisor = divisor

    def forward(
        self,
        known: Any,
        masks: Sequence[Tensor] = (),
        count: Tensor | None = None,
        here: Tensor | None = None,
        frames: int | None = None,
    ) -> Tensor:
        values = [tap(known, age, frames) for age in self.ages]
        if self.kind in ("max", "min"):
            bound = outermost(values[0].dtype, low=self.kind == "max")
            join = torch.maximum if self.kind == "max" else torch.minimum
            if masks:
                out = torch.full((), bound, dtype=values[0].dtype, device=values[0].device)
                values = [torch.where(lifted(m, v) > 0, v, out) for v, m in zip(values, masks, strict=True)]
            total = values[0]
            for value in values[1:]:
                total = join(total, value)
            if masks:
                # Of nothing it must stay finite, for what a gate multiplies by zero, unless there is such a window.
                counted, *others = masks if here is None else (*masks, here)
                for mask in others:
                    counted = torch.maximum(counted, mask)
                total = torch.where(lifted(counted, total) > 0, total, torch.zeros_like(out))
            return total
        if frames is None and len(values) > 4 and self.contiguous:
            total = self.summed(known)
        else:
            total = values[0]
            for value in values[1:]:
                total = total + value
        if count is not None:
            total = total / lifted(count, total).clamp(min=1)
        return total if self.divisor == 1.0 else total / self.divisor

    @property
    def contiguous(self) -> bool:
        return self.ages == tuple(range(len(self.ages)))[::-1]

    def summed(self, known: Any) -> Tensor:
        """A long window in one reduction instead of one addition a frame."""
        values = stacked(known, self.ages)
        count, (channels, *space) = len(self.ages), (values.shape[1] // len(self.ages), *values.shape[2:])
        if not space:
            return values.reshape(-1, count, channels).sum(1)
        return values.reshape(-1, count, channels, prod(space)).sum(1).reshape(-1, channels, *space)

    def extra_repr(self) -> str:
        return f"{self.kind}, ages={self.ages}, divisor={self.divisor}"


class CumulativeMean(Primitive):
    """The mean of every position so far; past ``horizon`` positions it forgets like a running average of that length.

    Caches: the mean, ``(N, ...)``, and the number of positions, ``(N, 1)``.
    """

    def __init__(self, frame: Sequence[int], horizon: int = 1_000_000, kind: str = "mean") -> None:
        super().__init__()
        self.frame = tuple(frame)
        self.horizon = horizon
        self.kind = kind

    @property
    def specs(self) -> tuple[CacheSpec, ...]:  # type: ignore[override]
        return (CacheSpec(self.frame), CacheSpec((1,)))

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        caches: tuple[Tensor, Tensor] | None = None,
        frames: int | None = None,
    ) -> Any:
        chunk = frames or 1
        batch = x.shape[0] // chunk
        mean, count = caches if caches is not None else (x.new_zeros((batch, *x.shape[1:])), x.new_zeros((batch, 1)))
        steps = x.reshape(batch, chunk, *x.shape[1:]).unbind(1) if frames else (x,)
        due = (torch.ones_like(x[:, :1].reshape(x.shape[0], -1)[:, 0]) if mask is None else mask.to(x.dtype)).reshape(
            batch, chunk
        )
        means = []
        for index, step in enumerate(steps):
            weight = due[:, index : index + 1]
            seen = (count + weight).clamp(max=self.horizon)
            share = (weight / seen.clamp(min=1)).reshape(-1, *[1] * (step.dim() - 1))
            if self.kind == "mean":
                mean = mean + (step - mean) * share
            else:
                join = torch.maximum if self.kind == "max" else torch.minimum
                first = (count <= 0).reshape(share.shape)
                mean = torch.where(share > 0, torch.where(first, step, join(mean, step)), mean)
            count = seen
            means.append(mean)
        y = torch.stack(means, 1).flatten(0, 1) if frames else mean
        return y, (mean, count)

    def extra_repr(self) -> str:
        return f"{self.kind}, horizon={self.horizon}"

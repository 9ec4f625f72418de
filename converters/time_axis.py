"""The time axis put together: padding with frames of the clip, concatenation along time.

A concatenation has one main part, which goes on with the stream, and single frames in front of it and behind: each lies
a fixed time from its place, or is held from the stream's beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from dissect.context import Context, Refused, Value
from dissect.converters.edges import Part, apart, offset, others, repeated, silent, since, source
from dissect.holding import Choose
from dissect.ledger import Axis, plain
from dissect.meeting import hold, until
from dissect.primitives import Query
from dissect.timing import Front, Timing


def cat_time(ctx: Context, values: Sequence[Value], dim: int) -> Value:
    """A concatenation along time."""
    values = [ctx.settled(value) if not value.constant and value.clock.first else value for value in values]
    sizes = [value.shape[dim] for value in values]
    values, whole, sizes = adjoined(values, dim, sizes)
    if len(values) == 1:
        return values[0]
    moving = [index for index in whole if not values[index].clock.still]
    if not moving:
        raise Refused("a concatenation along time of nothing but single frames")
    main = max(moving, key=lambda index: (sizes[index], index))
    left = [
        part
        for value, size in zip(values[:main], sizes[:main], strict=True)
        for part in parts(ctx, value, dim, size, False)
    ]
    right = [
        part
        for value, size in zip(values[main + 1 :], sizes[main + 1 :], strict=True)
        for part in parts(ctx, value, dim, size, True)
    ]
    return assembled(ctx, values[main], left, right, dim)


def adjoined(values: Sequence[Value], dim: int, sizes: Sequence[int]) -> tuple[list[Value], list[int], list[int]]:
    """The operands, neighbouring slices of one tensor as one; the numbers of those that have time; their sizes."""
    out: list[Value] = []
    counts: list[int] = []
    for value, size in zip(values, sizes, strict=True):
        before = out[-1] if out else None
        if (
            before is not None
            and not value.constant
            and not before.constant
            and before.node is value.node
            and value.axes[dim].is_time
        ):
            clock = before.clock
            if (
                before.axes[dim].is_time
                and value.clock.delay == clock.delay + counts[-1] * clock.stride
                and value.clock.stride == clock.stride
            ):
                length = value.clock.length.then(counts[-1] - 1)
                axes = value.axes.sized((*value.shape[:dim], counts[-1] + size, *value.shape[dim + 1 :]))
                out[-1] = replace(
                    value,
                    axes=axes,
                    timing=clock.but(length=length, wait=max(clock.wait - size * clock.stride, value.clock.wait)),
                )
                counts[-1] += size
                continue
        out.append(value)
        counts.append(size)
    return out, [index for index, value in enumerate(out) if not value.constant and value.axes[dim].is_time], counts


def parts(ctx: Context, value: Value, dim: int, size: int, behind: bool) -> list[Part]:
    """The frames of an operand that stands in front of the main part, or behind it."""
    if value.constant or not value.axes[dim].is_time:
        if not value.constant:
            if value.time is not None:
                raise Refused("a concatenation along time with a tensor whose time is elsewhere")
            value = ctx.sure(value)
            if not behind:
                ctx.broadcast_back([value, replace(value, timing=value.clock.but(running=True))])
        return [Part(value, 1 if behind else 0, behind, dim, at) for at in range(size)]
    if value.clock.still:
        return [Part(value, 0, False) if not behind or value.clock.wait else Part(value, 1, True)] * size
    if not behind or value.clock.wait:  # the first frames: a slice that the end of the clip does not move
        return [Part(value, index) for index in range(size)]
    return [Part(value, size - index, True) for index in range(size)]


def assembled(ctx: Context, main: Value, left: list[Part], right: list[Part], dim: int) -> Value:
    """The main part between single frames."""
    shape = list(main.shape)
    shape[dim] += len(left) + len(right)
    out = main.axes.sized(shape)
    length = main.clock.length.then(len(left) + len(right) - 1)
    facts: dict[str, Any] = {"padding": (len(left), len(right))}
    if not ctx.exact:
        apart(main, left + right, main.shape[dim])
        main = ctx.sure(main)
        exact = not right and all(silent(part) for part in left)
        lost = "the shorter tensor is left out" if others(main, left + right) else "the clip's edges are left out"
        ctx.row("frames at the clip's edges", exact=exact, reason="" if exact else lost, **facts)
        before, behind = main.clock.padding
        return Value(
            main.node, out, main.clock.but(length=length, padding=(before + len(left), behind + len(right))), main.dtype
        )
    ctx.row("frames at the clip's edges, by the clock", exact=True, **facts)
    y = main
    if right:
        y = ctx.sure(y)
        if all(silent(part) for part in right):
            y = ctx.gate(y)
        elif y.clock.stride == 1 and all(
            part.value.node is main.node and part.end and offset(ctx, part, main.clock, at) == at * main.clock.stride
            for at, part in enumerate(right, 1)
        ):
            y = hold(ctx, y, ctx.inside(y.clock))
        else:
            y = behind_of(ctx, y, right, dim)
        y = replace(y, timing=y.clock.but(length=y.clock.length.then(len(right) - 1)))
    step = y.clock.stride
    before = len(left) * step
    if all(silent(part) for part in left):
        y = ctx.gate(ctx.sure(y)) if left else y
        timing = y.clock.but(delay=y.clock.delay - before, length=length)
    elif order := repeated(main, left):
        y = ctx.settled(y)
        timing = y.clock.plain().but(
            delay=y.clock.delay - before, length=length, first=Front(y.clock.delay, step, order)
        )
    else:
        y = in_front_of(ctx, y, left, dim)
        timing = y.clock.but(length=length)
    return Value(y.node, out, timing.certain(ctx.frames), main.dtype)


def behind_of(ctx: Context, y: Value, right: list[Part], dim: int) -> Value:
    """The main part with frames behind its last position."""
    clock = y.clock
    shifts = [offset(ctx, part, clock, at + 1) for at, part in enumerate(right)]
    wait = max([0, *(-shift for shift in shifts if shift is not None)])
    y = ctx.delay(y, wait)
    for at, part in enumerate(right):
        shift = shifts[at]
        if (
            at
            and part.axis is None
            and shift is not None
            and (right[at - 1].value.node, shifts[at - 1]) == (part.value.node, shift)
        ):
            continue  # as late as the frame before it: one choice for both
        mask = ctx.ask(Query(y.clock.delay, clock.stride, clock.length.then(at - 1)))
        late = None if shift is None else shift + wait
        y = chosen(ctx, y, frame_of(ctx, part, late, y, dim), mask)
    return replace(y, timing=marked(y, right))


def in_front_of(ctx: Context, y: Value, left: list[Part], dim: int) -> Value:
    """The main part with frames in front of its first position."""
    clock = y.clock
    step, before = clock.stride, len(left) * clock.stride
    start = since(y, left)
    y = ctx.delay(y, start + before - clock.delay)
    lates = [start + at * step - (0 if part.value.constant else source(part)) for at, part in enumerate(left)]
    for at in reversed(range(len(left))):
        part, late = left[at], lates[at]
        if (
            at + 1 < len(left)
            and part.axis is None
            and (left[at + 1].value.node, lates[at + 1]) == (part.value.node, late)
        ):
            continue  # as late as the frame after it: one choice for both
        mask = ctx.ask(Query(start + (at + 1) * step, 1, None))
        y = chosen(ctx, y, frame_of(ctx, part, late, y, dim), mask)
    return replace(y, timing=marked(y, left).but(delay=start, wait=0))


def marked(y: Value, parts: Sequence[Part]) -> Timing:
    """The timing with the reach and the marks of all that the value is made of."""
    clocks = [y.clock, *(part.value.clock for part in parts if not part.value.constant)]
    return y.clock.plain().but(
        old=max(clock.old for clock in clocks),
        new=min(clock.new for clock in clocks),
        pooled=frozenset().union(*(clock.pooled for clock in clocks)),
        newest=frozenset().union(*(clock.newest for clock in clocks)),
        endless=any(clock.endless for clock in clocks),
    )


def frame_of(ctx: Context, part: Part, late: int | None, like: Value, dim: int) -> Value:
    """The frame, ``late`` frames after it came (None: held since then), in the shape of the frames of ``like``."""
    value = part.value
    if value.constant:
        assert value.tensor is not None
        node = ctx.graph.call_function(torch.narrow, (value.node, dim, part.at, 1))
        tensor = value.tensor.narrow(dim, part.at, 1)
        return ctx.conform(replace(value, node=node, tensor=tensor, axes=plain(tensor.shape), name=None), like.axes)
    value = replace(value, timing=value.clock.but(wait=0, still=False))
    value = until(ctx, ctx.settled(value), source(part)) if late is None else ctx.delay(value, late)
    if part.axis is None:
        return value
    if value.shape[dim] > 1:
        at = value.axes.kept(dim)
        assert at is not None
        value = ctx.call(
            torch.narrow, (value, at + 1, part.at, 1), value.axes.replace(dim, Axis()), value.clock, value.dtype
        )
    return ctx.reframe(value, value.axes.replace(dim, like.axes[dim]))


def chosen(ctx: Context, x: Value, other: Value, mask: Any) -> Value:
    """``x`` where the mask is set, else ``other``."""
    like = other if x.constant else x
    return ctx.primitive("choose", Choose(), (x, other, mask), like.axes, like.clock.plain(), like.dtype)

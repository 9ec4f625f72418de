"""Writing into a part of a tensor: what ``x[:, :, 1:] = y`` becomes in a functional graph."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dissect import ledger
from dissect.context import Context, Refused, Value
from dissect.converters.concat import cat
from dissect.converters.indexing import constant_pad, slice_
from dissect.converters.time_axis import chosen
from dissect.ledger import Axes, Axis
from dissect.meeting import lateness, one_less
from dissect.primitives import Query
from dissect.registry import converter, patient

aten = torch.ops.aten


@converter(aten.slice_scatter.default)
def slice_scatter(
    ctx: Context,
    base: Value,
    source: Value,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Value:
    """``base`` with ``source`` in place of ``base[start:end:step]``."""
    dim %= len(base.shape)
    size = base.shape[dim]
    first, stop, _ = slice(start, end).indices(size)
    if first >= stop:
        return base
    base, source = ctx.sure(base), placed(ctx, source, dim, size, first, stop, step)
    if (first, stop, step) == (0, size, 1) and not source.constant:
        return source
    axis = (source if base.constant else base).axes[dim]
    if axis.plain:
        return beside(ctx, base, source, dim, first, stop, step)
    if not axis.is_time:
        raise Refused("writing into an axis that merges batch or time with others")
    return over_time(ctx, base, source, dim, first, size - stop, step)


@converter(aten.select_scatter.default)
def select_scatter(ctx: Context, base: Value, source: Value, dim: int, index: int) -> Value:
    """``base`` with ``source`` in place of ``base[index]``."""
    dim %= len(base.shape)
    size = base.shape[dim]
    given, index = index, index % size
    base, source = ctx.sure(base), ctx.sure(source)
    if not source.constant:
        source = ctx.reframe(source, Axes((*source.axes.dims[:dim], Axis(), *source.axes.dims[dim:])))
    else:
        assert source.tensor is not None
        node = ctx.graph.call_function(torch.unsqueeze, (source.node, dim))
        tensor = source.tensor.unsqueeze(dim)
        source = replace(source, node=node, tensor=tensor, axes=ledger.plain(tensor.shape), name=None)
    if base.constant and source.time is None:
        raise Refused("writing one frame into a constant", "stack the frames instead")
    moving = source if base.constant else base
    if moving.axes[dim].plain:
        return beside(ctx, base, source, dim, index, index + 1, 1)
    if not moving.axes[dim].is_time:
        raise Refused("writing into an axis that merges batch or time with others")
    return one_frame(ctx, base, source, dim, index, size - 1 - index if given < 0 or index == size - 1 else None)


def placed(ctx: Context, source: Value, dim: int, size: int, first: int, stop: int, step: int) -> Value:
    """The source once its positions are certain; for a few of the clip's first frames, the write says which count."""
    few = step == 1 and stop < size and 2 * (stop - first) < size
    if source.constant or not few or not source.axes[dim].is_time or source.clock.still:
        sure: Value = ctx.sure(source)
        return sure
    source = ctx.settled(source) if source.clock.first else source
    return replace(source, timing=source.clock.but(wait=0))


def beside(ctx: Context, base: Value, source: Value, dim: int, first: int, stop: int, step: int) -> Value:
    """Inside the frame: what stands before, the source, what stands behind."""
    size = base.shape[dim]
    if step != 1:
        (base, source), timing = ctx.align([base, source])
        if base.constant or source.constant:
            raise Refused("writing a constant with gaps into a tensor")
        at = base.axes.kept(dim)
        assert at is not None
        return ctx.call(
            aten.slice_scatter.default, (base, source, at + 1, first, stop, step), base.axes, timing.plain(), base.dtype
        )
    parts = [piece(ctx, base, dim, 0, first), source, piece(ctx, base, dim, stop, size)]
    return cat(ctx, [part for part in parts if part is not None], dim)


def piece(ctx: Context, base: Value, dim: int, start: int, stop: int) -> Value | None:
    if start >= stop:
        return None
    if not base.constant:
        return slice_(ctx, base, dim, start, stop)
    assert base.tensor is not None
    node = ctx.graph.call_function(torch.narrow, (base.node, dim, start, stop - start))
    tensor = base.tensor.narrow(dim, start, stop - start)
    return replace(base, node=node, tensor=tensor, axes=ledger.plain(tensor.shape), name=None)


def over_time(ctx: Context, base: Value, source: Value, dim: int, first: int, cropped: int, step: int) -> Value:
    """Along time: the source at its positions, the base at the others.

    A few frames at the clip's beginning count from there, a few at its end from the end; else the first from the
    beginning and the last from the end.
    """
    size = base.shape[dim]
    count = len(range(first, size - cropped, step))
    short = 2 * count < size and step == 1
    if base.constant:
        assert base.tensor is not None
        if not short and step == 1 and not base.tensor.any():
            return constant_pad(ctx, ctx.sure(source), [0, 0] * (len(base.shape) - 1 - dim) + [first, cropped])
        if short or step != 1:
            raise Refused(
                "writing a few frames, or with gaps, into a constant along time", "stack or pad the frames instead"
            )
    clock = (source if base.constant else ctx.settled(base)).clock
    if base.constant:
        clock = clock.but(delay=clock.delay - first * clock.stride, length=clock.length.then(first + cropped - 1))
    if not ctx.exact and step > 1 and ctx.preset == "causal":
        ctx.row(f"written over at every {step}th position", exact=False, reason="the clip's edges are left out")
        mask = ctx.ask(Query(first * clock.stride, clock.stride * step, None, phase=True))
        return put(ctx, ctx.sure(base), ctx.sure(source), mask, clock, dim)
    if not ctx.exact:
        return without_edges(ctx, base, source, dim, clock)
    if not source.constant and (source.time is None or source.clock.stride != clock.stride * step):
        raise Refused("writing along time what has no positions there")
    region = clock.but(
        delay=clock.delay + first * clock.stride,
        stride=clock.stride * step,
        length=clock.length.then(-first - cropped - 1, step),
    )
    due = max(clock.delay, 0)
    if short and cropped == 0:  # counted from the end
        before = clock.but(length=clock.length.then(-count - 1))
        due = max(due, before.owed(ctx.frames))
        if not source.constant:
            source = ctx.settled(source)
            gaps = {
                end - own
                for end, own in zip(
                    reversed(lateness(clock, ctx.frames)), reversed(lateness(source.clock, ctx.frames)), strict=False
                )
            }
            if len(gaps) != 1:
                raise Refused("writing at the end of the clip what ends elsewhere")
            due = max(due, clock.delay - min(gaps))
            source = ctx.delay(source, min(gaps) + due - clock.delay)
        mask = ctx.graph.call_function(one_less, (ctx.inside(before.delayed(due - clock.delay)),))
    else:
        if not source.constant:
            source = ctx.settled(source)
            due = max(due, source.clock.delay - first * clock.stride)
        if short:
            start = due + first * clock.stride
            since, after = (ctx.ask(Query(start + at * clock.stride, 1, None)) for at in (0, count))
            mask = ctx.graph.call_function(torch.sub, (since, after))
        else:
            due = max(due, region.owed(ctx.frames) - first * clock.stride)
            mask = ctx.inside(region.delayed(due - clock.delay), phase=step > 1)
        if not source.constant:
            source = ctx.delay(source, due + first * clock.stride - source.clock.delay)
    late = due - clock.delay
    return put(
        ctx, base if base.constant else ctx.delay(ctx.settled(base), late), source, mask, clock.delayed(late), dim
    )


def without_edges(ctx: Context, base: Value, source: Value, dim: int, clock: Any) -> Value:
    """Without delay there are no edges: the larger part goes on."""
    most = 2 * source.shape[dim] >= base.shape[dim]
    main = source if most and not source.constant else base
    if main.constant:
        raise Refused("writing a constant over most of the clip")
    ctx.row("the larger part, at every frame", exact=False, reason="the clip's edges are left out")
    main = ctx.sure(main)
    shape = [base.shape[at] if at == dim else size for at, size in enumerate(main.shape)]
    return Value(main.node, main.axes.sized(shape), main.clock.plain().but(length=clock.length), main.dtype)


def one_frame(ctx: Context, base: Value, source: Value, dim: int, index: int, back: int | None) -> Value:
    """One position of the clip: counted from its start, or, with ``back``, from its end."""
    base = ctx.settled(base)
    clock = base.clock
    if not ctx.exact:
        return without_edges(ctx, base, source, dim, clock)
    if back is not None and (source.constant or back):
        return over_time(ctx, base, source, dim, index, back, 1)
    if not source.constant:
        ctx.broadcast_back([base, source])
        due = max(clock.delay, source.clock.delay - index * clock.stride)
        base = ctx.delay(base, due - clock.delay)
        clock = base.clock
    since = ctx.ask(Query(clock.delay + index * clock.stride, 1, None))
    after = ctx.ask(Query(clock.delay + (index + 1) * clock.stride, 1, None))
    mask = ctx.graph.call_function(torch.sub, (since, after))
    return put(ctx, base, source, mask, clock, dim)


def put(ctx: Context, base: Value, source: Value, mask: Any, clock: Any, dim: int) -> Value:
    """The source where the mask is set, the base elsewhere."""
    ctx.row("written over, by the clock", exact=True)
    like = source if base.constant else base
    shape = [max(base.shape[at], size) for at, size in enumerate(like.shape)]
    axes = like.axes.sized(shape)
    flat = [framed(ctx, value, like, dim) for value in (source, base)]
    value = chosen(ctx, flat[0], flat[1], mask)
    clocks = [value.clock for value in (base, source) if not value.constant]
    timing = clock.plain().but(
        old=max(own.old for own in clocks),
        new=min(own.new for own in clocks),
        pooled=frozenset().union(*(own.pooled for own in clocks)),
    )
    return Value(value.node, axes, timing.certain(ctx.frames), like.dtype)


def framed(ctx: Context, value: Value, like: Value, dim: int) -> Value:
    """A value in the shape of the frames of ``like``."""
    if value.constant:
        return ctx.conform(value, like.axes)
    if value.axes[dim].is_time:
        return value
    return ctx.reframe(value, value.axes.replace(dim, like.axes[dim]))


patient(aten.slice_scatter.default, aten.select_scatter.default)

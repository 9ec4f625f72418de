"""Slices, selections and paddings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.nn import functional as F

from dissect import ledger
from dissect.context import Context, Refused, Value
from dissect.converters.cropping import slice_time
from dissect.converters.edges import Part
from dissect.converters.time_axis import assembled, chosen
from dissect.ledger import Axes
from dissect.meeting import side_by_side, until
from dissect.primitives import Query
from dissect.registry import converter, patient

aten = torch.ops.aten


@converter(aten.slice.Tensor)
def slice_(
    ctx: Context, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    dim %= len(x.axes)
    size = x.shape[dim]
    first, stop, _ = slice(start, end).indices(size)
    axis = x.axes[dim]
    if (first, stop, step) == (0, size, 1):
        return x
    if axis.kinds == "NT" and axis.factors[0].size == 1:  # captured for one row: what is sliced is time
        batch, time = ledger.Axis(axis.factors[:1]), ledger.Axis(axis.factors[1:])
        apart = replace(x, axes=Axes((*x.axes.dims[:dim], batch, time, *x.axes.dims[dim + 1 :])))
        y = slice_time(ctx, apart, dim + 1, first, stop, step)
        merged = ledger.Axis((*batch.factors, *y.axes[dim + 1].factors))
        return replace(y, axes=Axes((*y.axes.dims[:dim], merged, *y.axes.dims[dim + 2 :])))
    if "N" in axis.kinds:
        raise Refused("a slice of the batch, where each row is a stream of its own", "treat all rows alike")
    out = (
        x.axes.sized((*x.shape[:dim], len(range(first, stop, step)), *x.shape[dim + 1 :]))
        if not axis.plain
        else x.axes.replace(dim, ledger.plain_axis(len(range(first, stop, step))))
    )
    if axis.plain:
        at = x.axes.kept(dim)
        assert at is not None
        return ctx.call(aten.slice.Tensor, (x, at + 1, first, stop, step), out, x.clock, x.dtype)
    if not axis.is_time:
        raise Refused("a slice of an axis that merges time with space")
    return slice_time(ctx, x, dim, first, stop, step)


@converter(aten.select.int)
def select(ctx: Context, x: Value, dim: int, index: int) -> Value:
    dim %= len(x.axes)
    axis = x.axes[dim]
    size = axis.size
    given, index = index, index % size
    out = Axes((*x.axes.dims[:dim], *x.axes.dims[dim + 1 :]))
    if axis.plain:
        at = x.axes.kept(dim)
        assert at is not None
        return ctx.call(torch.select, (x, at + 1, index), out, x.clock, x.dtype)
    if axis.kinds == "N" and size == 1 and dim + 1 < len(x.axes):
        return Value(x.node, ledger.without(x.axes, dim), x.timing, x.dtype)
    if "N" in axis.kinds and "T" not in axis.kinds:
        raise Refused(
            "one row of the batch, where each row is a stream of its own", "treat all rows alike, and give it one clip"
        )
    if not axis.is_time and "N" not in axis.kinds:  # a token of them all
        return select(ctx, side_by_side(ctx, x, dim), dim, index)
    if not axis.is_time:
        raise Refused("a selection from an axis that merges the batch with others")
    x = ctx.settled(x)
    clock = x.clock
    back = size - 1 - index
    if back:
        ctx.mixes(x)
    mark = frozenset({len(ctx.rows)})
    late = ctx.delay(x, back * clock.stride * (clock.removed if ctx.preset == "d3d" else 1))
    timing = clock.plain().but(old=late.clock.old, new=late.clock.new, pooled=clock.pooled | mark)
    if back == 0:
        ctx.row("the newest position", exact=True)
        return Value(x.node, out, timing, x.dtype)
    if not ctx.exact or given < 0:
        ctx.row(
            f"the position {back} before the newest",
            exact=ctx.exact,
            reason="" if ctx.exact else "counted from the newest",
            kernel=size,
        )
        return Value(late.node, out, timing, x.dtype)
    # In a stream that is no longer than the example that position itself, later the one as far from the newest.
    ctx.row(f"position {index}, later the position {back} before the newest", exact=True, kernel=size)
    early = until(ctx, x, clock.delay + index * clock.stride)
    long = ctx.ask(Query(clock.delay + (size - 1) * clock.stride, 1, None))
    value = chosen(ctx, late, early, long)
    return Value(value.node, out, timing if index else timing.but(pooled=clock.pooled), x.dtype)


def sides(rank: int, widths: Sequence[int]) -> dict[int, tuple[int, int]]:
    """What ``F.pad`` puts in front of each dimension and behind it; its widths begin with the last one."""
    return {rank - 1 - at: (widths[2 * at], widths[2 * at + 1]) for at in range(len(widths) // 2)}


@converter(aten.pad.default)
def pad(ctx: Context, x: Value, widths: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    rank = len(x.axes)
    value = value or 0.0
    pairs = sides(rank, widths)
    time = next((dim for dim in pairs if x.axes[dim].is_time and pairs[dim] != (0, 0)), None)
    if any(not x.axes[dim].plain and dim != time for dim in pairs if pairs[dim] != (0, 0)):
        raise Refused("padding an axis that merges batch or time with others")
    sizes = [x.shape[dim] + sum(pairs.get(dim, (0, 0))) for dim in range(rank)]
    y = x
    kept = {x.axes.kept(dim): pair for dim, pair in pairs.items() if dim != time and pair != (0, 0)}
    frame_rank = len(x.axes.frame)
    if kept:
        flat = [width for at in reversed(range(frame_rank)) for width in kept.get(at, (0, 0))]
        while len(flat) > 2 and flat[-2:] == [0, 0]:
            flat = flat[:-2]
        if mode != "constant" and len(flat) // 2 > frame_rank - 1:
            raise Refused(f"{mode} padding of channels")
        still = x.clock.but(
            fill=x.clock.fill if mode != "constant" or value == x.clock.fill else None,
            nonneg=x.clock.nonneg and value >= 0,
        )
        inner = x.axes.sized([size if dim != time else x.shape[dim] for dim, size in enumerate(sizes)])
        if mode == "constant":
            y = ctx.call(F.pad, (x, flat, mode, value), inner, still, x.dtype)
        else:
            y = ctx.call(mirrored, (x, flat, mode), inner, still, x.dtype)
    if time is None:
        return y
    if y.clock.still or y.clock.first:
        y = ctx.sure(y) if y.clock.still else ctx.settled(y)
    left, right = pairs[time]
    if left < 0 or right < 0:
        y = slice_time(ctx, y, time, max(0, -left), y.shape[time] - max(0, -right), 1)
        left, right = max(0, left), max(0, right)
        if (left, right) == (0, 0):
            return y
    if mode != "constant":
        return pad_with_frames(ctx, y, mode, left, right, time)
    y = ctx.sure(y)
    out = y.axes.sized(sizes)
    clock = y.clock
    facts: dict[str, Any] = {"padding": (left, right)}
    length = clock.length.then(left + right - 1)
    if not ctx.exact:
        ctx.row(
            "padding left to the caches",
            exact=left >= 0 and right <= 0 and value == 0,
            reason="right padding removed" if right > 0 else "",
            **facts,
        )
        padding = (clock.padding[0] + left, clock.padding[1] + right)
        return Value(y.node, out, clock.but(length=length, padding=padding, fill=0.0 if value == 0 else None), x.dtype)
    ctx.row("padding by the clock", exact=True, **facts)
    if value != 0.0:
        shift = max(0, left * clock.stride - clock.delay)
        y = ctx.delay(y, shift)
        y = ctx.gate(Value(y.node, y.axes, y.clock.but(fill=None), y.dtype), value)
    else:
        y = ctx.gate(y)
    timing = y.clock.but(delay=y.clock.delay - left * clock.stride, length=length, nonneg=clock.nonneg and value >= 0)
    return Value(y.node, out, timing, x.dtype)


def mirrored(x: torch.Tensor, widths: list[int], mode: str) -> torch.Tensor:
    """A padding by the frame's own values, of a frame tensor with any number of dimensions before the padded ones."""
    lead = x.dim() - len(widths) // 2
    y = F.pad(x.flatten(0, lead - 1).unsqueeze(1) if lead != 2 else x, widths, mode)
    return y if lead == 2 else y.reshape(*x.shape[:lead], *y.shape[2:])


aten_pad = aten.constant_pad_nd.default


@converter(aten_pad)
def constant_pad(ctx: Context, x: Value, widths: Sequence[int], value: float = 0.0) -> Value:
    return pad(ctx, x, widths, "constant", value)


def pad_with_frames(ctx: Context, x: Value, mode: str, left: int, right: int, dim: int) -> Value:
    """Padding over time by frames of the clip: the edge's own (replicate), mirrored (reflect), or the other edge's (circular)."""
    if mode == "replicate":
        before, behind = [Part(x, 0)] * left, [Part(x, 1, True)] * right
    elif mode == "reflect":
        before = [Part(x, left - at) for at in range(left)]
        behind = [Part(x, at + 2, True) for at in range(right)]
    else:
        if left and ctx.exact:
            raise Refused(
                "circular padding over time puts the end of the clip in front of its beginning",
                "pad with zeros, or replicate",
            )
        before, behind = [Part(x, left - at, True) for at in range(left)], [Part(x, at) for at in range(right)]
    return assembled(ctx, x, before, behind, dim)


patient(aten.slice.Tensor, aten.pad.default)

"""Slices, selections and paddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional as F

from dissect import ledger
from dissect.converters.convolution import strided
from dissect.ledger import Axes
from dissect.registry import converter
from dissect.rewrite import Context, Refused, Value

aten = torch.ops.aten


@converter(aten.slice.Tensor)
def slice_(ctx: Context, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Value:
    dim %= len(x.axes)
    size = x.shape[dim]
    first, stop, _ = slice(start, end).indices(size)
    axis = x.axes[dim]
    if (first, stop, step) == (0, size, 1):
        return x
    if "N" in axis.kinds:
        raise Refused("a slice of the batch")
    out = x.axes.sized((*x.shape[:dim], len(range(first, stop, step)), *x.shape[dim + 1 :])) if not axis.plain else x.axes.replace(
        dim, ledger.plain_axis(len(range(first, stop, step)))
    )
    if axis.plain:
        at = x.axes.kept(dim)
        assert at is not None
        return ctx.call(aten.slice.Tensor, (x, at + 1, first, stop, step), out, x.clock, x.dtype)
    if not axis.is_time:
        raise Refused("a slice of an axis that merges time with space")
    clock = x.clock
    cropped = size - stop
    length = clock.length.then(-first - cropped - 1, step)
    facts: dict[str, Any] = {"kernel": 1, "stride": step, "padding": (-first, -cropped)}
    if ctx.exact:
        timing = strided(ctx, clock, step).but(delay=clock.delay + clock.stride * first, length=length)
        if first or cropped:
            timing = timing.plain()
        ctx.row("crop of the clip", exact=True, **facts)
    else:
        timing = strided(ctx, clock, step).but(length=length)
        ctx.row("every frame", exact=False, reason="crop or temporal stride removed", **facts)
    return Value(x.node, out, timing, x.dtype)


@converter(aten.select.int)
def select(ctx: Context, x: Value, dim: int, index: int) -> Value:
    dim %= len(x.axes)
    axis = x.axes[dim]
    size = axis.size
    index %= size
    out = Axes((*x.axes.dims[:dim], *x.axes.dims[dim + 1 :]))
    if axis.plain:
        at = x.axes.kept(dim)
        assert at is not None
        return ctx.call(torch.select, (x, at + 1, index), out, x.clock, x.dtype)
    if not axis.is_time:
        raise Refused("a selection from an axis that merges batch or time with others")
    x = ctx.settled(x)
    clock = x.clock
    back = size - 1 - index
    if back == 0:
        ctx.row("the newest position", exact=True)
        return Value(x.node, out, clock.plain(), x.dtype)
    ctx.row(f"the position {back} before the newest", exact=ctx.exact, reason="" if ctx.exact else "counted from the newest", kernel=size)
    late = ctx.delay(x, back * clock.stride * (clock.removed if ctx.preset == "d3d" else 1))
    return Value(late.node, out, clock.plain().but(old=late.clock.old, new=late.clock.new), x.dtype)


@converter(aten.pad.default)
def pad(ctx: Context, x: Value, widths: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    rank = len(x.axes)
    value = value or 0.0
    pairs = {rank - 1 - at: (widths[2 * at], widths[2 * at + 1]) for at in range(len(widths) // 2)}
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
        still = x.clock.but(fill=x.clock.fill if mode != "constant" or value == x.clock.fill else None, nonneg=x.clock.nonneg and value >= 0)
        inner = x.axes.sized([size if dim != time else x.shape[dim] for dim, size in enumerate(sizes)])
        y = ctx.call(F.pad, (x, flat, mode) if mode != "constant" else (x, flat, mode, value), inner, still, x.dtype)
    if time is None:
        return y
    left, right = pairs[time]
    out = y.axes.sized(sizes)
    clock = y.clock
    facts: dict[str, Any] = {"padding": (left, right)}
    length = clock.length.then(left + right - 1)
    if mode != "constant":
        raise Refused(f"{mode} padding over time repeats frames of the clip", "use zero padding over time")
    if not ctx.exact:
        ctx.row("padding left to the caches", exact=left >= 0 and right <= 0 and value == 0, reason="right padding removed" if right > 0 else "", **facts)
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


aten_pad = aten.constant_pad_nd.default


@converter(aten_pad)
def constant_pad(ctx: Context, x: Value, widths: Sequence[int], value: float = 0.0) -> Value:
    return pad(ctx, x, widths, "constant", value)

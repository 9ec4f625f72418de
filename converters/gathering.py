"""Frames picked, repeated, turned round, summed up: indices and orders of the time axis."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dissect.context import Context, Refused, Value
from dissect.converters.concat import cat
from dissect.converters.convolution import strided
from dissect.converters.cropping import slice_time
from dissect.converters.edges import Part
from dissect.converters.indexing import slice_
from dissect.converters.picking import embedding, entries
from dissect.converters.pointwise import pointwise
from dissect.converters.shape import broadcasts
from dissect.converters.time_axis import assembled
from dissect.holding import RunningSum, Taps
from dissect.ledger import Axes, Axis, Factor, plain_axis
from dissect.registry import converter, patient
from dissect.sinking import widened
from dissect.trailing import convolved

aten = torch.ops.aten


@converter(aten.index_select.default)
def index_select(ctx: Context, x: Value, dim: int, index: Value) -> Value:
    dim %= len(x.shape)
    if x.constant and dim == 0 and len(x.shape) == 2 and not index.constant:
        return embedding(ctx, x, index)
    if not index.constant or index.tensor is None:
        raise Refused("frames or features chosen by what the clip shows")
    if "N" in x.axes[dim].kinds:
        raise Refused("a choice of rows of the batch")
    if x.axes[dim].plain:
        at = x.axes.kept(dim)
        assert at is not None
        x = ctx.sure(x)
        axes = x.axes.replace(dim, plain_axis(index.tensor.numel()))
        return ctx.call(torch.index_select, (x, at + 1, index), axes, x.clock, x.dtype)
    if not x.axes[dim].is_time:
        raise Refused("a choice from an axis that merges time with others")
    return frames(ctx, x, dim, [int(at) % x.shape[dim] for at in index.tensor])


@converter(aten.index.Tensor)
def index(ctx: Context, x: Value, indices: Sequence[Value | None]) -> Value:
    given = [(dim, value) for dim, value in enumerate(indices) if value is not None]
    first, value = given[0]
    if x.constant and len(x.shape) == 2 and (len(given), first) == (1, 0):
        return embedding(ctx, x, value)
    if not all(value.constant and value.tensor is not None for _, value in given):
        raise Refused(
            "an index that the clip gives", "torch.where for a choice by a mask, torch.gather for one by an index"
        )
    tensor = value.tensor
    assert tensor is not None
    if len(given) > 1 or tensor.dim() != 1:
        return entries(ctx, x, first, [(dim, value.tensor) for dim, value in given if value.tensor is not None])
    if tensor.dtype == torch.bool:
        value = ctx.constant(tensor.nonzero().flatten(), "index")
    return index_select(ctx, x, first, value)


def frames(ctx: Context, x: Value, dim: int, chosen: list[int]) -> Value:
    """Positions by constant indices: the longest even run goes on with the stream, single frames stand around it."""
    if x.clock.first or x.clock.still:
        x = ctx.sure(x)
    size = x.shape[dim]
    start, stop = longest_run(chosen)
    if stop - start == 1 and len(chosen) == 1:
        return slice_time(ctx, x, dim, chosen[0], chosen[0] + 1, 1, left_over=True)
    step = chosen[start + 1] - chosen[start] if stop - start > 1 else 0
    before, behind = chosen[:start], chosen[stop:]
    gaps, alone = [after - at for at, after in itertools.pairwise(chosen)], not convolved(ctx.node)
    spread = step > 1 and (size % step > 0 or chosen != list(range(0, size, step)))  # not every frame of a lower rate
    if ctx.exact and alone and (before or behind or spread) and min(gaps) > 0:  # no padding: frames are left out
        raise Refused("some frames of the clip", clipwise=True)
    if step > 0 and len(before) + len(behind) < (stop - start if step == 1 else 1):
        main = slice_time(ctx, x, dim, chosen[start], chosen[stop - 1] + 1, step, left_over=True)
        if not before and not behind:
            return main
        return assembled(ctx, main, [Part(x, at) for at in before], [Part(x, size - at, True) for at in behind], dim)
    if not gaps or min(gaps) < 1:
        raise Refused(
            "frames in another order than that of the clip",
            "choose frames in the clip's order, evenly spaced",
            clipwise=alone,
        )
    step = max(1, round((chosen[-1] - chosen[0]) / len(gaps)))
    first = min(
        max(0, round(sum(at - step * index for index, at in enumerate(chosen)) / len(chosen))),
        size - 1 - step * len(gaps),
    )
    if first < 0:
        raise Refused("unevenly spaced frames", "choose them evenly spaced: torch.arange(0, T, step)", clipwise=True)
    main = slice_time(ctx, x, dim, first, first + step * len(gaps) + 1, step, left_over=True)
    ctx.row(
        f"every {step} frames",
        exact=False,
        reason=f"frames {', '.join(map(str, chosen[:4]))}, ... are not evenly spaced",
    )
    return main


def longest_run(chosen: Sequence[int]) -> tuple[int, int]:
    """The longest stretch with one step above 0, as a slice."""
    best = (0, 1)
    start = 0
    for at in range(1, len(chosen) + 1):
        gap = chosen[at] - chosen[at - 1] if at < len(chosen) else 0
        if at == len(chosen) or gap < 1 or (at - start > 1 and gap != chosen[start + 1] - chosen[start]):
            if at - start > best[1] - best[0]:
                best = (start, at)
            start = at - 1 if at < len(chosen) and gap > 0 else at
    return best


@converter(aten.flip.default)
def flip(ctx: Context, x: Value, dims: Sequence[int]) -> Value:
    chosen = [dim % len(x.shape) for dim in dims]
    if any("T" in x.axes[dim].kinds and x.axes[dim].size > 1 for dim in chosen):
        raise Refused("the clip played backwards begins with its last frame", "leave the time axis in its order")
    if any("N" in x.axes[dim].kinds for dim in chosen):
        raise Refused("the batch turned round")
    inner = [kept + 1 for dim in chosen if (kept := x.axes.kept(dim)) is not None]
    if any(not x.axes[dim].plain for dim in chosen):
        raise Refused("an axis turned round that merges time with space")
    return ctx.call(torch.flip, (x, inner), x.axes, x.clock, x.dtype) if inner else x


@converter(aten.roll.default)
def roll(ctx: Context, x: Value, shifts: Any, dims: Any = ()) -> Value:
    steps = [shifts] if isinstance(shifts, int) else list(shifts)
    chosen = [dim % len(x.shape) for dim in ([dims] if isinstance(dims, int) else dims)]
    if not chosen:
        raise Refused("a roll of the flattened tensor")
    for step, dim in zip(steps, chosen, strict=True):
        axis = x.axes[dim]
        if axis.plain:
            at = x.axes.kept(dim)
            if at is not None:
                x = ctx.call(torch.roll, (x, (step,), (at + 1,)), x.axes, x.clock, x.dtype)
        elif axis.is_time:
            x = roll_time(ctx, x, dim, step)
        else:
            raise Refused("a roll of the batch, or of an axis that merges time with others")
    return x


def roll_time(ctx: Context, x: Value, dim: int, step: int) -> Value:
    """The clip rolled: towards its beginning, its first frames follow its end; towards its end there is no stream."""
    size = x.shape[dim]
    back = step % size
    if back == 0:
        return x
    if 2 * back <= size and step > 0:
        if ctx.exact:
            raise Refused(
                "a roll that puts the clip's last frame in front of its first",
                "shift with zeros: F.pad(x[:, :, :-1], ...)",
            )
        ctx.row(f"as it was {back} frames ago", exact=False, reason="the clip's end does not come before its beginning")
        return replace(x, timing=x.clock.plain().but(wait=x.clock.wait + back * x.clock.stride))
    ahead = size - back
    main = slice_time(ctx, x, dim, ahead, size, 1)
    return assembled(ctx, main, [], [Part(x, at) for at in range(ahead)], dim)


@converter(aten.repeat.default, aten.tile.default)
def repeat(ctx: Context, x: Value, repeats: Sequence[int]) -> Value:
    """Copies side by side; of one frame over time, that frame at every position."""
    repeats = [1] * (len(x.axes) - len(repeats)) + list(repeats)
    axes = Axes((*(Axis() for _ in range(len(repeats) - len(x.axes))), *x.axes.dims))
    if widened(ctx.node) and all(broadcasts(user, ctx.node) for user in ctx.node.users):
        return ctx.reframe(x, axes)
    clock = x.clock
    y = ctx.reframe(x, axes)
    wide, inner = [], []
    for axis, count in zip(axes.dims, repeats, strict=True):
        if count == 1 or (
            axis.plain
            and (ctx.flat or not (axis.size == 1 and axes.time is None and count == clock.length(ctx.frames) > 1))
        ):
            wide.append(axis if count == 1 else plain_axis(axis.size * count))
            inner += [] if axis.dropped else [count]
        elif axis.plain:  # a value of the whole clip, at every position
            whole = axes.replace(len(wide), Axis((Factor("T", count),)))
            ctx.broadcast_back([y, Value(y.node, whole, clock, x.dtype)])
            wide.append(whole[len(wide)])
            inner.append(1)
        elif axis.is_time and axis.size == 1:
            wide.append(Axis((Factor("T", count),)))
            clock = clock.but(still=True)
        else:
            raise Refused(
                "the clip once more behind its end"
                if axis.is_time
                else "copies of the batch, or of an axis that merges time with others"
            )
    out = Axes(tuple(wide))
    if any(count > 1 for count in inner):
        y = ctx.call(torch.Tensor.repeat, (y, (1, *inner)), out, clock, x.dtype)
    return ctx.reframe(Value(y.node, y.axes if y.axes is not out else out, clock, x.dtype), out)


@converter(aten.unfold.default)
def unfold(ctx: Context, x: Value, dim: int, size: int, step: int) -> Value:
    """Sliding windows on a new last axis."""
    dim %= len(x.shape)
    axis = x.axes[dim]
    if axis.plain:
        at = x.axes.kept(dim)
        assert at is not None
        axes = Axes((*x.axes.replace(dim, plain_axis((axis.size - size) // step + 1)).dims, plain_axis(size)))
        x = ctx.sure(x)
        return ctx.call(aten.unfold.default, (x, at + 1, size, step), axes, x.clock, x.dtype)
    if not axis.is_time:
        raise Refused("windows over an axis that merges time with others")
    if not x.clock.first:
        x = ctx.sure(x)
    clock = x.clock
    ages = [index * clock.stride for index in reversed(range(size))]
    out = Axes(
        (*x.axes.sized((*x.shape[:dim], (axis.size - size) // step + 1, *x.shape[dim + 1 :])).dims, plain_axis(size))
    )
    delay = clock.delay
    if ctx.exact:
        delay, ages, clock = clock.read(delay + ages[0], ages)
    length = clock.length.then(-size, step)
    timing = strided(ctx, clock.plain(), step).but(delay=delay, length=length, old=clock.old + ages[0])
    ctx.row(
        f"windows of {size} frames", exact=ctx.exact, reason="" if ctx.exact else "past only", kernel=size, stride=step
    )
    value = ctx.primitive("windows", Taps(ages), (ctx.history(x, ages[0]),), out, timing, x.dtype)
    return value if x.axes.frame else ctx.reframe(value, out)


@converter(aten.cumsum.default)
def cumsum(ctx: Context, x: Value, dim: int, *, dtype: Any = None) -> Value:
    """A running sum: over time, of everything since the stream began."""
    dim %= len(x.shape)
    axis = x.axes[dim]
    to = ctx.node.meta["val"].dtype
    if axis.plain:
        at = x.axes.kept(dim)
        return x if at is None else ctx.call(torch.cumsum, (x, at + 1), x.axes, x.clock.plain(), to)
    if not axis.is_time:
        raise Refused("a running sum over the batch, or over an axis that merges time with others")
    ctx.mixes(x)
    x = ctx.gate(ctx.settled(x))
    ctx.row(
        "running sum since the stream began, which grows without bound",
        exact=ctx.exact,
        reason="" if ctx.exact else "of every frame so far",
    )
    timing = x.clock.plain().but(nonneg=x.clock.nonneg, endless=True)
    return ctx.primitive("sum", RunningSum(x.axes.frame, x.clock.stride), (x,), x.axes, timing, to)


@converter(aten.diff.default)
def diff(
    ctx: Context, x: Value, n: int = 1, dim: int = -1, prepend: Value | None = None, append: Value | None = None
) -> Value:
    """Differences of neighbours: two slices and a subtraction."""
    dim %= len(x.shape)
    sides = [value for value in (prepend, x, append) if value is not None]
    x = cat(ctx, sides, dim) if len(sides) > 1 else x
    for _ in range(n):
        x = pointwise(ctx, aten.sub.Tensor, (slice_(ctx, x, dim, 1, None), slice_(ctx, x, dim, 0, -1)), {})
    return x


@converter(aten.fill.Scalar, aten.fill.Tensor)
def fill(ctx: Context, x: Value, number: Any) -> Value:
    """The same number everywhere, whatever the clip shows."""
    tensor = number.tensor if isinstance(number, Value) else torch.tensor(number, dtype=x.dtype)
    if not isinstance(tensor, Tensor):
        raise Refused("a tensor filled with a number that the clip gives")
    return ctx.constant(tensor.to(x.dtype).reshape([1] * len(x.shape)).expand(x.shape), "filled")


patient(
    aten.index_select.default,
    aten.index.Tensor,
    aten.repeat.default,
    aten.tile.default,
    aten.diff.default,
    aten.unfold.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
)

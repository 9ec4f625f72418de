"""Resampling: interpolation and repetition over space, over time, or both.

Inside a frame nothing changes. Over time, up by f, the positions of a value that has one every s frames
lie s / f frames apart: between two of them the newest one is held (nearest), or the newest two are mixed
by weights that follow the phase, the frames since the newest position (linear).
"""

from __future__ import annotations

from collections.abc import Sequence
from math import lcm
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dissect.context import Context, Refused, Value
from dissect.converters.convolution import strided
from dissect.ledger import Axis, Factor, plain_axis
from dissect.phases import PhaseMix, phases
from dissect.primitives import Query, WindowReduce
from dissect.registry import converter

aten = torch.ops.aten
_LINEAR = {1: "linear", 2: "bilinear", 3: "trilinear"}


def resized(x: Tensor, lead: int, options: dict[str, Any]) -> Tensor:
    """An interpolation inside a frame tensor with ``lead`` dimensions before its spatial ones."""
    if lead == 1:
        return F.interpolate(x, **options)
    if lead == 0:
        return F.interpolate(x.unsqueeze(1), **options).squeeze(1)
    y = F.interpolate(x.flatten(1, lead), **options)
    return y.reshape(x.shape[0], *x.shape[1 : lead + 1], *y.shape[2:])


@converter(
    *[
        getattr(aten, f"{name}{dims}d").vec
        for name in ("upsample_nearest", "_upsample_nearest_exact")
        for dims in (1, 2, 3)
    ],
    *[
        getattr(aten, f"{name}{dims}d").default
        for name in ("upsample_nearest", "_upsample_nearest_exact")
        for dims in (1, 2, 3)
    ],
)
def nearest(ctx: Context, x: Value, size: Sequence[int] | None, *scales: Any) -> Value:
    mode = "nearest-exact" if "exact" in str(ctx.node.target) else "nearest"
    return resample(ctx, x, mode, None, size, scales)


@converter(
    aten.upsample_linear1d.vec,
    aten.upsample_bilinear2d.vec,
    aten.upsample_trilinear3d.vec,
    aten.upsample_bicubic2d.vec,
    aten._upsample_bilinear2d_aa.vec,
    aten._upsample_bicubic2d_aa.vec,
    aten.upsample_linear1d.default,
    aten.upsample_bilinear2d.default,
    aten.upsample_trilinear3d.default,
    aten.upsample_bicubic2d.default,
    aten._upsample_bilinear2d_aa.default,
    aten._upsample_bicubic2d_aa.default,
)
def linear(ctx: Context, x: Value, size: Sequence[int] | None, align_corners: bool, *scales: Any) -> Value:
    name = str(ctx.node.target)
    mode = ("bicubic" if "bicubic" in name else "linear") + (" smoothed" if "_aa" in name else "")
    return resample(ctx, x, mode, align_corners, size, scales)


def copies(x: Tensor, count: int) -> Tensor:
    """So many copies of each frame tensor, beside one another in front of its dimensions."""
    return x.unsqueeze(1).expand(-1, count, *[-1] * (x.dim() - 1))


@converter(aten.repeat_interleave.self_int)
def repeat_interleave(
    ctx: Context, x: Value, repeats: int, dim: int | None = None, *, output_size: int | None = None
) -> Value:
    if dim is None:
        raise Refused("repeating the entries of the flattened tensor, the batch with them", "name the dimension")
    dim %= len(x.axes)
    if dim == 0 and x.axes[0].kinds in ("N", "NT"):  # copies behind each row
        axes = x.axes.replace(0, Axis((*x.axes[0].factors, Factor("S", repeats))))
        return ctx.call(copies, (x, repeats), axes, x.clock, x.dtype)
    if "N" in x.axes[dim].kinds:
        raise Refused("repeating an axis that merges the batch with others", "repeat over time or space only")
    if x.axes[dim].is_time:
        return in_time(ctx, x, dim, "nearest", None, float(repeats))
    at = x.axes.kept(dim)
    if not x.axes[dim].plain or at is None:
        raise Refused("repeating an axis that merges time with others")
    return ctx.call(
        torch.repeat_interleave,
        (x, repeats, at + 1),
        x.axes.replace(dim, plain_axis(ctx.out_shape[dim])),
        x.clock,
        x.dtype,
    )


def resample(
    ctx: Context, x: Value, mode: str, align: bool | None, size: Sequence[int] | None, scales: Sequence[Any]
) -> Value:
    """Resample inside the frame first, then over time: interpolation parts that way."""
    rank, out = len(x.shape), ctx.out_shape
    factors = list(scales[0]) if scales and isinstance(scales[0], (list, tuple)) else list(scales)
    factors = factors if len(factors) == rank - 2 and all(factors) else [None] * (rank - 2)
    if size is not None and any(
        factor and int(x.shape[2 + at] * factor) != size[at] for at, factor in enumerate(factors)
    ):
        factors = [None] * (rank - 2)
    if any(not x.axes[dim].plain and not x.axes[dim].is_time for dim in range(2, rank)):
        raise Refused("an interpolation over an axis that merges time with others")
    time = next((dim for dim in range(2, rank) if x.axes[dim].is_time), None)
    again = None  # time has ended, and comes back by repetition
    if x.time is None:
        again = next(
            (dim for dim in range(2, rank) if x.shape[dim] == 1 < out[dim] == x.clock.length(ctx.frames)), None
        )
    inner = [dim for dim in range(2, rank) if dim not in (time, again)]
    y = x
    if any(x.shape[dim] != out[dim] or factors[dim - 2] not in (None, 1.0) for dim in inner):
        y = in_frame(ctx, x, mode, align, inner, [factors[dim - 2] for dim in inner])
    if again is not None:
        axes = y.axes.replace(again, Axis((Factor("T", out[again]),)))
        whole = ctx.reframe(y, axes)
        ctx.broadcast_back([y, whole])
        return whole
    return y if time is None else in_time(ctx, y, time, mode, align, factors[time - 2])


def in_frame(
    ctx: Context, x: Value, mode: str, align: bool | None, inner: Sequence[int], scales: Sequence[float | None]
) -> Value:
    axes = x.axes
    for dim in inner:
        axes = axes.replace(dim, plain_axis(ctx.out_shape[dim]))
    kind, _, smoothed = mode.partition(" ")
    options: dict[str, Any] = {"mode": _LINEAR[len(inner)] if kind == "linear" else kind}
    if align is not None:
        options["align_corners"] = align
    if smoothed:
        options["antialias"] = True
    options |= {"size": [ctx.out_shape[dim] for dim in inner]} if None in scales else {"scale_factor": list(scales)}
    lead = len(x.axes.frame) - len(inner)
    clock = x.clock.but(fill=x.clock.fill if x.clock.fill == 0.0 else None, nonneg=x.clock.nonneg and kind != "bicubic")
    return ctx.call(resized, (x, lead, options), axes, clock, x.dtype)


def in_time(ctx: Context, x: Value, time: int, mode: str, align: bool | None, scale: float | None) -> Value:
    """Resample over time by a whole factor."""
    count, wanted = x.shape[time], ctx.out_shape[time]
    if wanted == count and scale in (None, 1.0):
        return x
    if mode not in ("nearest", "nearest-exact", "linear"):
        raise Refused(f"a {mode} interpolation over time", "resample time linearly or to the nearest frame")
    up = wanted > count
    more, less = max(wanted, count), min(wanted, count)
    clock = x.clock
    taken = clock.stride if ctx.exact else clock.removed
    corners = bool(align) and less > 1 and (more - 1) % (less - 1) == 0
    corners = corners and (not up or taken % ((more - 1) // (less - 1)) == 0)  # of 2 to 4 it is 3, by chance
    near = [(more - 1) // (less - 1)] if corners else [round(more / less), -(-more // less)]
    near = [factor for factor in near if factor > 1 and (corners or abs(more - less * factor) < factor)]
    if not near:
        raise Refused(
            f"a resampling of {count} positions to {wanted}, which is no whole factor: "
            "where its positions lie follows the clip's length",
            "resample time by a whole factor",
        )
    factor = next((factor for factor in near if not up or taken % factor == 0), near[0])
    even = corners or (
        not align and (more == less * factor if scale is None else abs((scale if up else 1 / scale) - factor) < 1e-6)
    )
    axes = x.axes.replace(time, Axis((Factor("T", wanted),)))
    clock = x.clock
    if up:
        length = clock.length.then(wanted - count * factor - 1, 1, factor)
    else:
        length = clock.length.then(-factor if not corners and wanted == count // factor else -1, factor)
    if scale is None:
        ctx.grain = lcm(ctx.grain, length.period)
    reason = "" if even else "its positions follow the clip's length; here they keep their distance"
    if not up:
        return fewer(ctx, x, axes, factor, length, mode, corners, reason)
    if not ctx.exact:
        return unneeded(ctx, x, axes, factor, length)
    ctx.mixes(x)
    x = ctx.settled(x)
    clock = x.clock
    step = spaced(clock.stride, factor)
    timing = clock.plain().but(stride=step, length=length, removed=max(1, clock.removed // factor), nonneg=clock.nonneg)
    since = ctx.ask(Query(clock.delay, clock.stride, None, since=True))
    ctx.row(
        f"every position held for {factor}" if mode != "linear" else f"positions mixed by {factor} phases",
        exact=even,
        reason=reason,
    )
    if mode != "linear":
        timing = timing.but(old=clock.old + clock.stride - 1)
        return ctx.primitive("hold", PhaseMix(x.axes.frame), (x, since), axes, timing, x.dtype)
    weights, wait = phases(clock.stride, factor, corners)
    timing = timing.but(delay=clock.delay + wait, old=clock.old + 2 * clock.stride - 1)
    spread = clock.length.then(-1, 1, clock.stride)  # a position lasts until the next one
    edges = tuple(ctx.ask(Query(clock.delay, 1, spread, shift)) for shift in (clock.stride, 0))
    mix = PhaseMix(x.axes.frame, weights.to(x.dtype))
    return ctx.primitive("mix", mix, (x, since, edges), axes, timing, x.dtype)


def spaced(stride: int, factor: int) -> int:
    """The frames between two positions after upsampling."""
    if stride % factor:
        raise Refused(
            f"upsampling of time by {factor} where there is a position every {stride} frame{'s' * (stride > 1)}: "
            "a step cannot give more outputs than it is given frames",
            "upsample by what strides took out before, or after the stream",
        )
    return stride // factor


def unneeded(ctx: Context, x: Value, axes: Any, factor: int, length: Any) -> Value:
    """A stride that was removed needs no upsampling: every frame has its own value already."""
    clock = x.clock
    if clock.removed % factor:
        raise Refused(
            f"upsampling of time by {factor} where no stride of {factor} came before: "
            "a step cannot give more outputs than it is given frames",
            "upsample by what strides took out before, or after the stream",
        )
    ctx.row(
        "no upsampling of time",
        exact=False,
        reason="the stride that it makes good was removed: every frame has its own value",
        stride=factor,
    )
    stride = 1 if ctx.preset == "d3d" else spaced(clock.stride, factor)
    return Value(
        x.node,
        axes,
        clock.plain().but(stride=stride, length=length, removed=clock.removed // factor, nonneg=clock.nonneg),
        x.dtype,
    )


def fewer(ctx: Context, x: Value, axes: Any, factor: int, length: Any, mode: str, corners: bool, reason: str) -> Value:
    """Down by a whole factor: one position of each ``factor``, or the mean of the two in the middle of them."""
    x = ctx.settled(x)
    clock = x.clock
    pair = mode == "linear" and factor % 2 == 0 and not corners and ctx.preset != "d3d"
    timing = strided(ctx, clock.plain(), factor).but(length=length, nonneg=clock.nonneg)
    if not ctx.exact:
        ctx.row(
            "the mean of two frames" if pair else "every frame",
            exact=False,
            reason="temporal stride removed",
            stride=factor,
        )
    else:
        ctx.row(
            f"one position of {factor}" + (", the mean of two" if pair else ""),
            exact=not reason,
            reason=reason,
            stride=factor,
        )
        skip = 0 if mode == "nearest" or corners else factor // 2
        timing = timing.but(delay=clock.delay + skip * clock.stride)
    if not pair:
        return Value(x.node, axes, timing, x.dtype)
    ages = (clock.stride, 0)
    count = {} if ctx.exact else {"count": ctx.inside(clock, positions=2)}
    mean = WindowReduce("mean", ages, 2.0 if ctx.exact else 1.0)
    timing = timing.but(old=clock.old + clock.stride)
    return ctx.primitive("pool", mean, (ctx.history(x, clock.stride),), axes, timing, x.dtype, **count)

"""Where a head begins, and the running mean: the two operators of :mod:`dissect.vectors`."""

from __future__ import annotations

from typing import Any

from dissect import vectors
from dissect.context import Context, Refused, Value
from dissect.converters.upsampling import in_time
from dissect.ledger import Axes, Axis, Factor
from dissect.primitives import CumulativeMean
from dissect.registry import converter
from dissect.timing import Length

OPS = vectors.OPS


@converter(OPS.frame_vectors.default)
def frame_vectors(ctx: Context, x: Value, frames: int) -> Value:
    """The features of the positions, for every frame of the stream."""
    if x.time != 1 or not x.axes[1].is_time:
        raise Refused(
            "a head on features that have no time axis left", "attach it before the network pools or flattens time"
        )
    ctx.heads.add(ctx.node)
    x = ctx.settled(x)
    clock, positions = x.clock, x.shape[1]
    facts: dict[str, Any] = {"kernel": 1, "stride": clock.stride if ctx.exact else clock.removed}
    if positions == frames:
        ctx.row("one vector a position", exact=True, **facts)
        return x
    if ctx.exact:
        if positions * clock.stride != frames:
            raise Refused(
                f"a head on {positions} positions, one every {clock.stride} frames, for a clip of {frames} frames",
                f"convert with a clip whose length is a multiple of {clock.stride}, or attach it with every_frame=False",
            )
        held: Value = in_time(ctx, x, 1, "nearest", None, float(clock.stride))
        return held
    ctx.row("one vector a frame", exact=False, reason="every frame has its own", **facts)
    axes = x.axes.replace(1, Axis((Factor("T", frames),)))
    return Value(x.node, axes, clock.plain().but(stride=1, removed=1, length=Length()), x.dtype)


@converter(OPS.running_mean.default)
def running_mean(ctx: Context, x: Value, first: int) -> Value:
    """The mean of all positions so far, from one on: a cumulative cache."""
    if x.time != 1 or not x.axes[1].is_time or not x.axes[2].plain:
        raise Refused("a running mean of a tensor that is not (batch, time, features)")
    ctx.mixes(x)
    x = ctx.settled(x)
    clock = x.clock
    phased = ctx.exact and clock.stride > 1
    since = clock.but(delay=clock.delay + first * clock.stride, length=clock.length.then(-first - 1))
    masks = (ctx.inside(since, phase=phased),) if ctx.exact or first else ()
    timing = clock.plain().but(
        old=clock.old + first * clock.stride,
        pooled=frozenset({len(ctx.rows)}),
        endless=clock.endless or clock.old > first,  # what it averages may hold frames before the stream
    )
    ctx.row(
        "mean of all frames so far" + (f" but the first {first}" if first else ""),
        exact=ctx.exact,
        reason="" if ctx.exact else "over every frame of the stream",
        kernel=clock.length(ctx.frames),
        stride=clock.stride,
    )
    mean = CumulativeMean(x.axes.frame)
    axes = Axes((x.axes[0], x.axes[2]))
    return ctx.primitive("mean", mean, (x, *masks), axes, timing, x.dtype)

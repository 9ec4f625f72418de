"""Loops over frames: one frame stands for all, between two markers (see :mod:`dissect.unrolling`)."""

from __future__ import annotations

from dissect.context import Context, Refused, Value
from dissect.ledger import Axes, Axis, Factor
from dissect.registry import converter
from dissect.unrolling import frame_of, frames_to


@converter(frame_of)
def frame(ctx: Context, x: Value, dim: int, keepdim: bool) -> Value:
    """The frame of every position; its time axis comes back at the end of the loop."""
    x = ctx.settled(x)
    kept = (Axis(),) if keepdim else ()
    axes = Axes((*x.axes.dims[:dim], *kept, *x.axes.dims[dim + 1 :]))
    value = Value(x.node, x.axes, x.clock.plain().but(running=True), x.dtype)
    return ctx.reframe(value, axes)


@converter(frames_to)
def frames(ctx: Context, x: Value, dim: int, count: int, stacked: bool) -> Value:
    """The results of all positions, stacked or concatenated along ``dim``."""
    time = Factor("T", count)
    if x.time is not None or not x.clock.running:
        raise Refused("a loop over frames whose results do not follow from its frames one by one")
    timing = x.clock.but(running=False)
    if stacked:
        return Value(x.node, Axes((*x.axes.dims[:dim], Axis((time,)), *x.axes.dims[dim:])), timing, x.dtype)
    axis = x.axes[dim]
    value = Value(x.node, x.axes, timing, x.dtype)
    return ctx.reframe(value, x.axes.replace(dim, Axis((time, *axis.factors))))

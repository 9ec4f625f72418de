"""Slices along time: the tensor stays, its positions move."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dissect.context import Context, Value
from dissect.converters.convolution import strided


def slice_time(ctx: Context, x: Value, dim: int, first: int, stop: int, step: int, *, left_over: bool = False) -> Value:
    """``x[first:stop:step]`` along time; ``stop`` counts from the end of the clip.

    ``left_over``: what lies behind the last position is no crop where the step alone leaves it out.
    """
    if x.clock.still:
        x = ctx.sure(x)
    size = x.shape[dim]
    clock = x.clock
    count = len(range(first, stop, step))
    cropped = 0 if left_over and first + count * step >= size else size - stop
    length = clock.length.then(-first - cropped - 1, step)
    out = x.axes.sized((*x.shape[:dim], count, *x.shape[dim + 1 :]))
    facts: dict[str, Any] = {"kernel": 1, "stride": step, "padding": (-first, -cropped)}
    if ctx.exact:
        if clock.newest and (step > 1 or stop < size):
            ctx.mixes(x)  # the last position that is taken need not be the newest
        timing = strided(ctx, clock, step).but(delay=clock.delay + clock.stride * first, length=length)
        if first or cropped:
            timing = timing.plain().but(first=clock.first.cut(timing.delay) if clock.first else None)
        ctx.row("crop of the clip" if first or cropped else "temporal stride removed", exact=True, **facts)
        return Value(x.node, out, timing.certain(ctx.frames), x.dtype)
    spacing = clock.stride if ctx.preset == "causal" else clock.removed
    before = clock.owed(ctx.frames, spacing)
    after = clock.but(length=length).owed(ctx.frames, spacing * step)
    spare = min(cropped, clock.spare[0])
    if spare and spare == clock.spare[0] and clock.spare[1] >= 0:
        row = clock.spare[1]
        ctx.rows[row] = replace(ctx.rows[row], verdict="exact", reason="")
    late = after - before - (first + spare) * spacing
    back = -(-max(0, late) // spacing) * clock.stride
    decision = f"as it was {back} frame{'s' * (back > 1)} ago" if back else "every frame"
    whole = (first, step) == (0, 1) and spare == cropped
    ctx.row(decision, exact=whole, reason="" if whole else "crop or temporal stride removed", **facts)
    timing = strided(ctx, clock, step).but(length=length, spare=(0, -1))
    if first or cropped:
        timing = timing.plain()
    return Value(x.node, out, timing.but(wait=clock.wait + back), x.dtype)

"""A pool over all of time, in a stream: over a window of the last positions, over all so far, or none."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dissect.context import Context
from dissect.ledger import Axes
from dissect.primitives import CumulativeMean, WindowReduce
from dissect.values import Value

__all__ = ["policy", "pool_time"]


def policy(ctx: Context) -> str:
    """What the user wants of the global pool at hand: ``window``, ``cumulative`` or ``none``."""
    settings = ctx.settings
    asked: str = settings.get("pool", "window" if "window" in settings else ctx.options.pool)
    return asked


def pool_time(
    ctx: Context, value: Value, kind: str, axes: Axes, *, op: str = "", count: int | None = None, scale: float = 1.0
) -> Value:
    """A mean, sum, max or min over all of time becomes one over a window, or cumulative, or none.

    ``value`` is already reduced inside the frame; ``axes`` is the ledger of the result.
    """
    clock = value.clock
    positions = count if count is not None else clock.length(ctx.frames)
    settings = ctx.settings
    asked = policy(ctx)
    window = settings.get("window", ctx.options.window)
    if ctx.preset == "d3d":
        positions = min(positions * clock.removed, ctx.frames)
    positions, given = (window, True) if window is not None else (positions, False)
    stride = clock.stride
    value = ctx.settled(value)
    clock = value.clock
    timing = clock.plain()
    facts: dict[str, Any] = {"kernel": count or clock.length(ctx.frames), "stride": stride}
    if asked == "none" or (asked == "window" and positions == 1):
        exact = asked == "window" and not given
        why = "" if exact else "every frame for itself"
        ctx.row("per frame", exact=exact, reason=why, **facts)
        return replace(value, axes=axes, timing=timing)
    if asked == "cumulative":
        ctx.mixes(value)
        value = ctx.settled(value)
        phased = ctx.exact and stride > 1
        masked = (ctx.inside(clock, phase=phased),) if ctx.exact else ()
        before = CumulativeMean(value.axes.frame, kind="mean" if kind == "sum" else kind)
        # The first frames that it took in hold what stands before the stream, and it never forgets them.
        timing = timing.but(pooled=frozenset({len(ctx.rows)}), endless=clock.endless or clock.old > 0)
        out = ctx.primitive("pool", before, (value, *masked), axes, timing, value.dtype)
        ctx.row(
            "cumulative " + kind,
            exact=ctx.exact,
            reason="" if ctx.exact else "over all frames so far",
            **facts,
        )
        return out if kind != "sum" else ctx.call(torch.mul, (out, facts["kernel"]), axes, out.timing, out.dtype)
    wait = ctx.exact and bool(settings.get("wait"))
    if wait:  # everything within reach on both sides: for a clip as long as the example's, all of it
        timing = timing.but(delay=clock.delay + (positions - 1) * stride, new=clock.new)
        positions = 2 * positions - 1
    ages = tuple(index * stride for index in reversed(range(positions)))
    exact = ctx.exact and not given
    if not wait:
        timing = timing.but(pooled=frozenset({len(ctx.rows)}))
        ctx.waitable.add(len(ctx.rows))
    note = f"window of {positions}" + (f" at stride {stride}" if stride > 1 else "")
    if kind in ("max", "min"):
        masks = () if clock.nonneg and kind == "max" else tuple(ctx.inside(clock, age) for age in ages)
        value = ctx.gate(value) if not masks else value
        extra: dict[str, Any] = {"masks": masks} if masks else {}
        reduce = WindowReduce(kind, ages)
    else:
        value = ctx.gate(value)
        seen = ctx.inside(clock, positions=positions)
        whole = kind == "sum" and ctx.exact
        extra = {} if whole else {"count": seen}
        reduce = WindowReduce("sum" if whole else "mean", ages)
    history = ctx.history(value, ages[0])
    out = ctx.primitive("pool", reduce, (history,), axes, timing.but(old=clock.old + ages[0]), value.dtype, **extra)
    if not value.axes.frame:  # a history has a dimension for it
        out = replace(out, node=ctx.graph.call_function(torch.reshape, (out.node, (-1,))))
    ctx.row(
        f"{note}, {kind}",
        exact=exact,
        reason="" if exact else "the last positions instead of the clip's",
        **facts,
    )
    if kind == "sum" and not ctx.exact:
        return ctx.call(torch.mul, (out, facts["kernel"]), axes, out.timing, out.dtype)
    return out

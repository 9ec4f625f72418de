"""Meeting: operands whose positions differ in number, before they are brought to one delay.

Values of the whole clip (a pooled pathway, a single frame) have no position of their own: what counts is the clip's
end. The law: for a clip of L frames, what meets is each operand's value at its own last position.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import lcm, prod
from typing import TYPE_CHECKING

import torch

from dissect.holding import Hold, counted
from dissect.ledger import Axes, Axis, Factor, bare, plain_axis
from dissect.primitives import Query
from dissect.timing import Length, Timing

if TYPE_CHECKING:
    from dissect.context import Context, Value

__all__ = ["by_position", "ended", "ends_met", "side_by_side", "spread", "until"]


def ends_met(ctx: Context, values: Sequence[Value]) -> list[Value]:
    """The operands, where a single position meets many as one value of the clip, and where all are values of the clip, at one end."""
    values = [spread(ctx, value) if value.clock.still else value for value in values]
    sizes = [positions(value.axes) for value in values]
    longest = max((size for size in sizes if size is not None), default=1)
    if longest > 1:
        values = [
            ended(ctx, value, longest)
            if size == 1
            else early(ctx, value, longest)
            if size is None and once(ctx, value)
            else value
            for value, size in zip(values, sizes, strict=True)
        ]
    elif 1 in sizes and None in sizes:
        values = [ended(ctx, value) if size == 1 else value for value, size in zip(values, sizes, strict=True)]
    if any(value.time is not None or value.clock.running for value in values):
        return list(values)
    clocks = [value.clock for value in values]
    if ctx.exact:
        lates = [lateness(clock, ctx.frames) for clock in clocks]
        if all(
            late == [at + clock.delay - clocks[0].delay for at in lates[0]]
            for late, clock in zip(lates, clocks, strict=True)
        ):
            return list(values)
    elif len({clock.stride for clock in clocks}) == 1:
        return list(values)
    ends = [max(late) if late else 0 for late in lates] if ctx.exact else [0] * len(values)
    start = max(
        next(length for length in range(1, 4 * ctx.frames + 64) if clock.length(length) > 0) for clock in clocks
    )
    last = max(ends)
    held = []
    for value, end in zip(values, ends, strict=True):
        value = ctx.delay(ctx.settled(value), last - end) if ctx.exact else value
        if value.clock.stride > 1 or ctx.exact:
            value = hold(ctx, value, ctx.inside(value.clock, phase=value.clock.stride > 1))
        timing = (
            value.clock.but(stride=1, delay=last + start - 1, length=Length().then(-start))
            if ctx.exact
            else value.clock.but(stride=1)
        )
        held.append(replace(value, timing=timing))
    ctx.row("held until all have ended", exact=ctx.exact, reason="" if ctx.exact else "each at its newest position")
    return held


def positions(axes: Axes) -> int | None:
    """The example's number of positions; None where time has ended."""
    return next((factor.size for axis in axes.dims for factor in axis.factors if factor.kind == "T"), None)


def lateness(clock: Timing, frames: int) -> list[int]:
    """How long after a clip's last frame its last position comes, by the clip's length."""
    return [clock.last(length) - (length - 1) for length in range(1, 4 * frames + 64) if clock.length(length) > 0]


def by_position(ctx: Context, values: Sequence[Value]) -> list[Value]:
    """The operands; where one has an entry for each position of the clip on an axis of space (as a linear layer over time
    gives them), and another has the positions themselves there, its entry for the newest position is taken.

    The law: at the last position of a clip as long as the example, what meets is what met.
    """
    rank = max(len(value.shape) for value in values)
    done = on_features(ctx, values)
    for dim in range(-rank, 0):
        timed = {
            value.axes[dim].size
            for value in values
            if not value.constant and len(value.axes) >= -dim and value.axes[dim].is_time
        }
        for index, value in enumerate(done):
            ended = not value.constant and value.time is None and not value.clock.running and len(value.axes) >= -dim
            if timed != {1} and ended and value.axes[dim].plain and {value.axes[dim].size} == timed:
                done[index] = entry(ctx, value, dim)
    return done


def side_by_side(ctx: Context, value: Value, dim: int) -> Value:
    """A tensor whose positions stand beside one another among its features, as a window of them."""
    from dissect.windows import window

    kinds = "" if value.constant else value.axes[dim].kinds
    if not {"T", "K"} & set(kinds):
        return value
    ctx.grain = lcm(ctx.grain, ctx.frames)  # of a shorter clip there are fewer
    held = window(ctx, value, "positions side by side") if "T" in kinds else value
    return replace(held, axes=held.axes.replace(dim, plain_axis(held.axes[dim].size)))


def on_features(ctx: Context, values: Sequence[Value]) -> list[Value]:
    """The operands; frames stacked on features that meet as many features of the whole clip are a window of them."""
    done = list(values)
    ended = [value for value in values if not value.constant and value.time is None and not value.clock.running]
    for index, value in enumerate(done):
        if value.constant or value.time is None or value.axes[value.time].kinds not in ("TS", "ST"):
            continue
        dim = value.time - len(value.axes)
        if any(len(other.axes) >= -dim and other.axes[dim] == plain_axis(value.shape[dim]) for other in ended):
            done[index] = side_by_side(ctx, value, value.time)
    return done


def entry(ctx: Context, value: Value, dim: int) -> Value:
    """The last entry of a plain axis, as the entry for the newest position."""
    dim %= len(value.axes)
    at, count = value.axes.kept(dim), value.axes[dim].size
    assert at is not None
    timing = value.clock.but(pooled=value.clock.pooled | {len(ctx.rows)})
    reason = "" if ctx.exact else "of the last positions"
    ctx.row("the entry for the newest position", exact=ctx.exact, reason=reason, placed=True)
    return ctx.call(torch.narrow, (value, at + 1, count - 1, 1), value.axes.replace(dim, Axis()), timing, value.dtype)


def hold(ctx: Context, value: Value, mask: object) -> Value:
    """The value while the mask is set, then its last one."""
    x = ctx.reframe(value, bare(value.axes))
    x = ctx.cast(x, counted(x.dtype))
    module = Hold(x.axes.frame, counted(x.dtype))
    held = ctx.primitive("hold", module, (x, mask), x.axes, value.clock.plain(), x.dtype)
    return ctx.reframe(ctx.cast(held, value.dtype), value.axes)


def until(ctx: Context, value: Value, time: int) -> Value:
    """The value up to a time of the stream, and from then on as it was at that time."""
    past = ctx.ask(Query(time + 1, 1, None))
    return hold(ctx, value, ctx.graph.call_function(one_less, (past,)))


def one_less(mask: object) -> object:
    """The mask turned round."""
    return 1 - mask  # type: ignore[operator]


def ended(ctx: Context, value: Value, count: int = 1) -> Value:
    """The only position of a tensor as a value of the whole clip: the first frame, held, or the newest of ``count``."""
    axes = Axes(
        tuple(
            Axis(tuple(f for f in axis.factors if f.kind != "T")) if "T" in axis.kinds else axis
            for axis in value.axes.dims
        )
    )
    value = ctx.settled(value)
    clock = value.clock
    if ctx.exact and clock.wait:
        ctx.row("the first frame, held", exact=True)
        held = until(ctx, value, clock.delay)
        return ctx.reframe(replace(held, timing=held.clock.but(wait=0)), axes)
    mark = frozenset({len(ctx.rows)})
    ctx.row("the newest position", exact=ctx.exact, reason="" if ctx.exact else "one for every frame")
    value = replace(value, timing=clock.plain().but(wait=0, pooled=clock.pooled | mark))
    return ctx.reframe(early(ctx, value, count), axes)


def once(ctx: Context, value: Value) -> bool:
    """Whether a value of the whole clip is there at the clip's end alone, as a linear layer over all positions is."""
    return not value.clock.running and value.clock.length(ctx.frames) == 1


def early(ctx: Context, value: Value, count: int) -> Value:
    """A value of the clip's end, for each of ``count`` positions that meet it: what it would be if the clip ended there."""
    clock = value.clock
    if not ctx.exact or count == 1:
        return value
    timing = clock.but(delay=clock.delay - (count - 1) * clock.stride, length=clock.length.then(count - 2))
    return replace(value, timing=timing)


def spread(ctx: Context, value: Value) -> Value:
    """A position that was repeated over time, for those who see its repetitions."""
    dim, count = value.axes.time, positions(value.axes)
    assert dim is not None
    assert count is not None
    axis = value.axes[dim]

    def repeated(kind: str, size: int) -> Axis:
        """The axis of time, which may be merged with others, with ``size`` positions of that kind."""
        factors = (Factor(kind, size) if factor.kind == "T" else factor for factor in axis.factors)  # type: ignore[arg-type]
        return Axis(tuple(factor for factor in factors if factor.size > 1 or factor.kind != "S"))

    single = replace(value, axes=value.axes.replace(dim, repeated("T", 1)), timing=value.clock.but(still=False))
    held = ended(ctx, single)
    if count == ctx.frames:
        axes = value.axes.replace(dim, repeated("T", count))
        whole = ctx.reframe(replace(held, timing=held.clock.but(length=Length())), axes)
        ctx.broadcast_back([held, whole])
        return whole
    wide = held.axes.replace(dim, repeated("S", count))
    factors = [factor for axis in value.axes.dims for factor in axis.factors]
    at = next(index for index, factor in enumerate(factors) if factor.kind == "T")
    inner = prod(factor.size for factor in factors[at:] if factor.inner)
    return ctx.call(spread_out, (held, inner, count, wide.frame), wide, held.clock, held.dtype)


def spread_out(x: torch.Tensor, inner: int, count: int, frame: tuple[int, ...]) -> torch.Tensor:
    """Frame tensors with the entries before the last ``inner`` numbers repeated."""
    return x.reshape(x.shape[0], -1, 1, inner).expand(-1, -1, count, -1).reshape(-1, *frame)

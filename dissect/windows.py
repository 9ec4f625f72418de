"""Windows: the clip's time axis where one frame looks at all of it.

An operator that relates one position to all others (attention, a softmax over time) reads, in a stream, a window of as
many positions as the original clip has, ending now. In the ledger the window is an axis of its own, ``K``, part of the frame.
At the last position of a clip as long as the example the window is the clip, entry by entry; before the first position
entries do not exist, and whatever reduces the axis leaves them out. So a value with a window axis is exact at the last
position, and one that goes back to an axis of time is a window of the past.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isinf, prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from dissect.asking import key_of
from dissect.ledger import Axes, Axis, Factor, alike
from dissect.primitives import Primitive, Query, outermost, tap
from dissect.registry import find_windowed, is_broadcast
from dissect.timing import Window

if TYPE_CHECKING:
    from dissect.context import Context, Value

__all__ = [
    "Gather",
    "aligned",
    "apply",
    "count",
    "kept",
    "known",
    "located",
    "masked",
    "meet",
    "newest",
    "outward",
    "picked",
    "share",
    "window",
    "windows",
]


class Gather(Primitive):
    """The values of the given ages (falling) side by side: ``(rows, *frame)`` to ``(rows, before, ages, after)``."""

    def __init__(self, ages: Sequence[int], before: int, after: int) -> None:
        super().__init__()
        self.ages = tuple(ages)
        self.before, self.after = before, after

    def forward(self, known: Any, frames: int | None = None) -> Tensor:
        parts = [tap(known, age, frames).reshape(-1, self.before, 1, self.after) for age in self.ages]
        return torch.cat(parts, 2)

    def extra_repr(self) -> str:
        return f"ages={self.ages}"


def existing(count: Tensor, size: int) -> Tensor:
    """Which entries of a window are positions, ``(rows, size)``; the newest always counts as one."""
    index = torch.arange(size, device=count.device, dtype=count.dtype)
    return index >= size - count.clamp(min=1).unsqueeze(1)


def filled(x: Tensor, count: Tensor, before: int, size: int, after: int, fill: float) -> Tensor:
    """``x`` with ``fill`` in the entries of its window that are no positions."""
    there = existing(count, size)[:, None, :, None]
    return torch.where(there, x.reshape(-1, before, size, after), fill).reshape(x.shape)


def placed(table: Tensor, count: Tensor, row: bool, columns: int) -> Tensor:
    """What a constant says of the positions of a clip, ``(rows, ...)``: of the newest (its first dimension, with ``row``),
    and of those in a window (its next ``columns`` dimensions); the clip is as long as the stream, and never longer than the example.
    """
    newest = count.long().clamp(min=1) - 1
    if not columns:
        return table[newest]
    size = table.shape[row]
    index = (torch.arange(size, device=count.device) - (size - 1) + newest.unsqueeze(1)).clamp(min=0)
    if columns == 2:
        return table[index.unsqueeze(2), index.unsqueeze(1)]
    return table[newest.unsqueeze(1), index] if row else table[index]


def picked(x: Tensor, at: Tensor, dim: int) -> Tensor:
    """Of each row the entry at its own place along a dimension, which is kept; ``at`` is ``(rows,)``."""
    at = at.reshape(-1, *[1] * (x.dim() - 1)).expand(*x.shape[:dim], 1, *x.shape[dim + 1 :])
    return x.gather(dim, at)


def share(count: Tensor, size: int, like: Tensor) -> Tensor:
    """The entries of a window over those that are positions, to be multiplied with ``like``."""
    return (size / count.clamp(min=1)).reshape(-1, *[1] * (like.dim() - 1)).to(like.dtype)


def windows(axes: Axes) -> list[Factor]:
    """The window factors of a ledger."""
    return [factor for axis in axes.dims for factor in axis.factors if factor.kind == "K"]


def kept(axes: Axes, dim: int | None = None) -> tuple[int, int, int]:
    """The sizes of a frame tensor before its (first) window, of the window, and after it."""
    first = next(at for at, axis in enumerate(axes.dims) if "K" in axis.kinds and dim in (None, at))
    sizes = [
        (at == first and factor.kind == "K", factor.size)
        for at, axis in enumerate(axes.dims)
        for factor in axis.factors
        if factor.inner
    ]
    at = next(index for index, (found, _) in enumerate(sizes) if found)
    return prod(size for _, size in sizes[:at]), sizes[at][1], prod(size for _, size in sizes[at + 1 :])


def window(ctx: Context, value: Value, what: str, *, row: bool = True, placed: bool = False) -> Value:
    """``value`` with its time axis as a window of the last positions, as many and as far apart as the original's.

    ``placed``: what reads the window tells one position of the clip from another.
    """
    from dissect.values import Refused

    value = ctx.settled(value)
    if value.time is None or value.axes.window is not None:
        raise Refused(f"{what}: a window of windows")
    clock, dim = value.clock, value.time
    axis = value.axes[dim]
    at = axis.kinds.index("T")
    positions = axis.factors[at].size
    stride = clock.removed if ctx.preset == "d3d" else clock.stride
    ages = [index * stride for index in reversed(range(positions))]
    held = Window(clock.delay, stride, row=len(ctx.rows), zero=True)
    factor = (Factor("K", positions, held),) if positions > 1 else ()
    axes = value.axes.replace(dim, Axis((*axis.factors[:at], *factor, *axis.factors[at + 1 :])))
    timing = clock.plain().but(old=clock.old + ages[0])
    if positions == 1:
        return replace(ctx.reframe(value, axes), timing=timing)
    if row:
        timing = timing.but(newest=clock.newest | {len(ctx.rows)})
        reason = "" if ctx.exact else "the last positions instead of the clip's"
        ctx.row(
            f"{what}, a window of {positions}",
            exact=ctx.exact,
            reason=reason,
            kernel=positions,
            stride=stride,
            placed=placed,
        )
    if clock.delay > 0:
        value = ctx.gate(value)
    sizes = [
        (other.kind == "T", other.size) for axis in value.axes.dims for other in axis.factors if other.kind in "STK"
    ]
    split = next(index for index, (time, _) in enumerate(sizes) if time)
    before, after = prod(size for _, size in sizes[:split]), prod(size for _, size in sizes[split + 1 :])
    history = ctx.history(value, ages[0])
    out = ctx.primitive("window", Gather(ages, before, after), (history,), axes, timing, value.dtype)
    return replace(out, node=ctx.graph.call_function(torch.reshape, (out.node, (-1, *axes.frame))))


def count(ctx: Context, factor: Factor) -> fx.Node:
    """How many entries of a window are positions of the stream, ``(rows,)``."""
    held = factor.window
    assert held is not None
    return ctx.ask(Query(held.delay, held.stride, None, held.lag, factor.size))


def masked(ctx: Context, value: Value, fill: float, dim: int | None = None) -> Value:
    """``value`` with ``fill`` in the entries of its window that are no positions; of whole numbers, none is infinite."""
    fill = outermost(value.dtype, fill < 0) if isinf(fill) else fill
    before, size, after = kept(value.axes, dim)
    factor = next(factor for factor in windows(value.axes if dim is None else Axes((value.axes[dim],))))
    return ctx.call(
        filled, (value, count(ctx, factor), before, size, after, fill), value.axes, value.timing, value.dtype
    )


def known(axes: Axes, *, zero: bool = False, weights: bool = False) -> Axes:
    """The ledger with what is known of its windows' entries: zero before the first position, weights of the positions."""
    return axes.windowed(lambda held: replace(held, zero=zero, weights=weights))


def aligned(ctx: Context, values: Sequence[Value]) -> list[Value]:
    """Operands at one delay, whose windows end at their own position."""
    from dissect.values import Refused

    values, _ = ctx.align(values)
    for value in values:
        starts = {factor.window.start for factor in windows(value.axes) if factor.window is not None}
        if starts and starts != {value.clock.delay}:
            raise Refused("a window of positions meets a crop of the clip", "crop the clip before the attention")
    return values


def meet(ctx: Context, values: Sequence[Value], what: str) -> list[Value]:
    """Operands of an elementwise operator: where an axis of time meets a window of it, it becomes one too.

    Of frames along two dimensions (``x.unsqueeze(2) - x.unsqueeze(1)``) those that are the keys become a window.
    """
    values = aligned(ctx, values)
    rank = max(len(value.shape) for value in values)
    met = {
        at
        for value in values
        if not value.constant
        for at in range(-rank, 0)
        if len(value.axes) >= -at and "K" in value.axes[at].kinds
    }
    timed, told = crossed(values), False
    if timed and not met & timed:
        keys: Any = key_of(ctx.node, sorted(timed), list(range(-len(ctx.out_shape), 0)))
        met = timed if ctx.node.name in ctx.whole else {keys}
        ctx.matrices[ctx.node.name] = frozenset({len(ctx.rows)})
        what, told = "every frame beside the others", True
    done = []
    for value in values:
        time = None if value.constant or value.time is None else value.time - len(value.axes)
        done.append(window(ctx, value, what, row=told) if time in met else value)
        told = told and time not in met
    return done


def crossed(values: Sequence[Value]) -> set[int]:
    """The two dimensions, from the right, along which operands that broadcast have their frames; none where it is one."""
    from dissect.values import Refused

    timed = {value.time - len(value.axes) for value in values if not value.constant and value.time is not None}
    if len(timed) > 2:
        raise Refused("frames of three different times beside each other")
    return timed if len(timed) == 2 else set()


def newest(ctx: Context, value: Value) -> Value:
    """A value with a window axis as one with an axis of time: of each window, the newest entry."""
    from dissect.values import Refused

    found = windows(value.axes)
    if not found:
        return value
    dim = value.axes.window
    assert dim is not None
    held = found[0].window
    assert held is not None
    if value.time is not None or len(found) > 1 or held.start != value.clock.delay:
        raise Refused(
            "an operator over the keys of an attention matrix",
            "end the network before it, or register a rule with @dissect.windowed",
        )
    before, size, after = kept(value.axes)
    axis = value.axes[dim]
    at = axis.kinds.index("K")
    axes = value.axes.replace(dim, Axis((*axis.factors[:at], Factor("T", size), *axis.factors[at + 1 :])))
    node = ctx.graph.call_function(torch.reshape, (value.node, (-1, before, size, after)))
    node = ctx.graph.call_function(torch.select, (node, 2, size - 1))
    node = ctx.graph.call_function(torch.reshape, (node, (-1, *axes.frame)))
    return replace(value, node=node, axes=axes)


def located(ctx: Context, value: Value, out: Axes, like: Value) -> Value:
    """A constant that tells positions of the clip apart, as a frame tensor beside ``like``, whose ledger is ``out``.

    Every other constant is returned as it is.
    """
    assert value.tensor is not None
    factors: list[tuple[int, str, int]] = []
    pad = len(out) - value.tensor.dim()
    for dim, axis in enumerate(out.dims[pad:]):
        size = value.shape[dim]
        parts = axis.factors if size == axis.size and not axis.plain else (Factor("S", size),)
        factors += [(dim, factor.kind, factor.size) for factor in parts]
    table = value.tensor.reshape([size for _, _, size in factors])
    varies = [not alike(table, table.narrow(at, 0, 1)) for at in range(table.dim())]
    row = [at for at, (_, kind, _) in enumerate(factors) if kind == "T" and varies[at]]
    columns = [at for at, (_, kind, _) in enumerate(factors) if kind == "K" and varies[at]]
    if not row and not columns:
        return value
    node = ctx.graph.call_function(torch.reshape, (value.node, tuple(table.shape)))
    for at, (_, kind, size) in enumerate(factors):
        if kind in "NT" and at not in row and size > 1:
            node = ctx.graph.call_function(torch.narrow, (node, at, 0, 1))
    rest = [at for at in range(table.dim()) if at not in (*row, *columns)]
    node = ctx.graph.call_function(torch.permute, (node, (*row, *columns, *rest)))
    node = ctx.graph.call_function(placed, (node, count(ctx, windows(out)[0]), bool(row), len(columns)))
    left = [*columns, *rest]
    node = ctx.graph.call_function(torch.permute, (node, (0, *(1 + left.index(at) for at in sorted(left)))))
    dims = tuple(axis if value.shape[dim] > 1 else Axis() for dim, axis in enumerate(out.dims[pad:]))
    axes = known(Axes(dims))
    node = ctx.graph.call_function(torch.reshape, (node, (-1, *axes.frame)))
    return replace(like, node=node, axes=axes, timing=like.clock.plain(), dtype=value.dtype)


def outward(ctx: Context, value: Value) -> Value:
    """An output: weights over a window come out whole, other windows as their newest entry."""
    found = windows(value.axes)
    if value.time is not None or len(found) != 1 or (found[0].window is not None and found[0].window.weights):
        return value
    return newest(ctx, value)


def apply(ctx: Context, convert: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call a converter; operands with a window axis by the operator's rule for windows, or else as their newest entry.

    An operator that tells one position of the clip from another is tried again on windows of its operands.
    """
    from dissect.values import Refused

    rule = find_windowed(ctx.node.target)
    rows = len(ctx.rows)
    if rule is not None and wanted(ctx, leaves(args, kwargs)):
        args, kwargs = changed((args, kwargs), lambda value: windowed(ctx, value))
    across = is_broadcast(ctx.node.target) and crossed(leaves(args, kwargs))
    if across or any("K" in value.axes.kinds for value in leaves(args, kwargs)):
        if rule is not None:
            try:
                return rule(ctx, convert, *args, **kwargs)
            except Refused as refused:
                if not refused.clipwise:
                    raise
        del ctx.rows[rows:]
        return convert(
            ctx, *changed(args, lambda value: newest(ctx, value)), **changed(kwargs, lambda value: newest(ctx, value))
        )
    try:
        return convert(ctx, *args, **kwargs)
    except Refused as refused:
        if not refused.clipwise or rule is None:
            raise
    del ctx.rows[rows:]

    def whole(value: Value) -> Value:
        if value.time is None:
            return value
        return window(ctx, value, "what tells positions of the clip apart", placed=True)

    return rule(ctx, convert, *changed(args, whole), **changed(kwargs, whole))


def wanted(ctx: Context, values: Sequence[Value]) -> bool:
    """Whether frames that meet a value of the whole clip are to be a window too: then the end of the clip is exact."""
    ended = [value.clock for value in values if value.time is None and not value.clock.running]
    rows = frozenset().union(*(clock.newest | clock.pooled for clock in ended))
    if not ctx.exact or not rows or all(value.time is None for value in values):
        return False
    ctx.matrices[ctx.node.name] = rows
    return ctx.node.name in ctx.whole


def windowed(ctx: Context, value: Value) -> Value:
    """A value over time as a window of its positions; any other as it is."""
    return value if value.time is None else window(ctx, value, "what meets a value of the whole clip")


def leaves(*arguments: Any) -> list[Value]:
    """The values that depend on the clip among an operator's arguments."""
    found: list[Value] = []

    def note(value: Value) -> Value:
        found.append(value)
        return value

    changed(list(arguments), note)
    return found


def changed(arguments: Any, change: Callable[[Any], Any]) -> Any:
    """An operator's arguments with every value that depends on the clip changed."""
    from dissect.values import Value

    if isinstance(arguments, Value):
        return arguments if arguments.constant else change(arguments)
    if isinstance(arguments, (list, tuple)):
        return type(arguments)(changed(argument, change) for argument in arguments)
    if isinstance(arguments, dict):
        return {key: changed(argument, change) for key, argument in arguments.items()}
    return arguments

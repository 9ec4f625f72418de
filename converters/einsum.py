"""Products with labelled dimensions: einsum, and what every product of matrices over time goes through."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dissect.asking import key_of, parsed
from dissect.context import Context, Refused, Value
from dissect.converters.shares import Labels, divided, zeroed
from dissect.global_pool import pool_time
from dissect.ledger import Axes, Axis, plain_axis
from dissect.registry import converter, windowed
from dissect.timing import joined
from dissect.windows import aligned, count, share, window

aten = torch.ops.aten
Emit = Callable[[Context, list[fx.Node], list[list[Hashable]], list[Hashable], dict[Hashable, int]], fx.Node]


@converter(aten.einsum.default)
def einsum(ctx: Context, equation: str, values: Sequence[Value], **_: Any) -> Value:
    labels, out = parsed(equation, [len(value.shape) for value in values])
    return contract(ctx, values, labels, out, as_einsum)


@windowed(aten.einsum.default)
def einsum_windowed(ctx: Context, convert: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
    return convert(ctx, *args, **kwargs)


def as_einsum(
    ctx: Context, nodes: list[fx.Node], labels: list[list[Hashable]], out: list[Hashable], sizes: dict[Hashable, int]
) -> fx.Node:
    """One einsum on frame tensors."""
    letters = {
        label: chr(ord("a") + at)
        for at, label in enumerate(dict.fromkeys(label for names in [*labels, out] for label in names))
    }
    terms = ["".join(letters[label] for label in names) for names in labels]
    return ctx.graph.call_function(
        torch.einsum, (f"{','.join(terms)}->{''.join(letters[label] for label in out)}", nodes)
    )


ROWS = "rows"


def contract(
    ctx: Context, values: Sequence[Value], labels: Sequence[Labels], out: Labels, emit: Emit, key: Hashable = None
) -> Value:
    """The sum over all labels that ``out`` does not name of the product of ``values``.

    Time under one label is a frame each; summed over, a window of sums. Under two labels, one is that of the keys: it
    becomes a window (``key`` says which, or what follows does), and the newest frame alone asks; where the plan wants
    them all (``ctx.whole``), both become windows.
    """
    if any(
        "N" in axis.kinds
        for value, names in zip(values, labels, strict=True)
        if not value.constant
        for axis, label in zip(value.axes.dims, names, strict=True)
        if label not in out
    ):
        raise Refused("a sum over the batch")
    values = aligned(ctx, values)
    timed = list(
        dict.fromkeys(
            label
            for label in (time_of(value, names) for value, names in zip(values, labels, strict=True))
            if label is not None
        )
    )
    present = {
        names[dim]
        for value, names in zip(values, labels, strict=True)
        if not value.constant
        for dim, axis in enumerate(value.axes.dims)
        if "K" in axis.kinds
    }
    keys = set(timed) & present
    if len(timed) > 2:
        raise Refused("a product of three frames of different times")
    if len(timed) == 2 and not keys:
        keys = set(timed) if ctx.node.name in ctx.whole else {key if key in timed else key_of(ctx.node, timed, out)}
        ctx.matrices[ctx.node.name] = frozenset({len(ctx.rows)})
    first = not present
    done = []
    for value, names in zip(values, labels, strict=True):
        if time_of(value, names) in keys:
            value = window(ctx, value, "keys", row=first)
            first = False
        done.append(value)
    values = done
    resolved = {
        label: resolve(values, labels, label) for label in dict.fromkeys(label for names in labels for label in names)
    }
    clock = joined(
        value.clock
        for value in sorted((value for value in values if not value.constant), key=lambda value: value.time is None)
    )
    summed = [label for label in resolved if label not in out]
    scale = []
    for label in summed:
        if "K" in resolved[label].kinds:
            values = zeroed(ctx, values, labels, label)
            scale += divided(ctx, values, labels, label)
    inner = {label: axis for label, axis in resolved.items() if not axis.dropped}
    nodes = [framed(ctx, value, names, resolved) for value, names in zip(values, labels, strict=True)]
    terms: list[list[Hashable]] = [
        [*(() if value.constant else (ROWS,)), *(label for label in names if label in inner)]
        for value, names in zip(values, labels, strict=True)
    ]
    sizes = {label: axis.space for label, axis in inner.items()}
    node = emit(ctx, nodes, terms, [ROWS, *(label for label in out if label in inner)], sizes)
    weighing = keys if len(timed) == 2 and len(keys) == 1 else set()  # what the newest frame has to do with each other
    axes = Axes(tuple(told(resolved[label], label in weighing) for label in out))
    result = Value(node, axes, clock.plain(), ctx.node.meta["val"].dtype)
    for factor, size in scale:
        part = ctx.graph.call_function(share, (count(ctx, factor), size, result.node))
        result = ctx.call(torch.mul, (result, part), axes, result.clock, result.dtype)
    if any("T" in resolved[label].kinds for label in summed):
        return pool_time(ctx, result, "sum", axes)
    return result


def told(axis: Axis, weights: bool) -> Axis:
    """The axis of a result: the weights of positions, if it is one, are still that."""
    return Axes((axis,)).windowed(lambda held: replace(held, zero=False, weights=weights or held.weights))[0]


def time_of(value: Value, names: Labels) -> Hashable | None:
    """The label of the dimension that carries time."""
    return None if value.constant or value.time is None else names[value.time]


def resolve(values: Sequence[Value], labels: Sequence[Labels], label: Hashable) -> Axis:
    """The one ledger of a label, from all operands that have it."""
    found = [
        value.axes[dim]
        for value, names in zip(values, labels, strict=True)
        if not value.constant
        for dim, name in enumerate(names)
        if name == label
    ]
    sizes = [
        value.shape[dim]
        for value, names in zip(values, labels, strict=True)
        for dim, name in enumerate(names)
        if name == label
    ]
    wide = [axis for axis in found if axis.size > 1 or not axis.plain]
    if not wide:
        return plain_axis(max(sizes))
    first = max(wide, key=lambda axis: (axis.size, not axis.plain))
    moved = {
        tuple((factor.kind, factor.size) for factor in axis.factors)
        for axis in wide
        if axis.size > 1 and not axis.plain
    }
    if len(moved) > 1 or (moved and any(axis.plain for axis in wide if axis.size > 1)):
        raise Refused("a product over two axes of which one carries time or batch otherwise than the other")
    return first


def framed(ctx: Context, value: Value, names: Labels, resolved: dict[Hashable, Axis]) -> fx.Node:
    """An operand as a frame tensor, with the dimensions that the result keeps inside a frame."""
    shape = [value.axes[dim].space for dim, label in enumerate(names) if not resolved[label].dropped]
    if value.constant:
        dims = tuple(resolved[label] if value.shape[dim] > 1 else Axis() for dim, label in enumerate(names))
        shape = [dims[dim].space for dim, label in enumerate(names) if not resolved[label].dropped]
        return ctx.graph.call_function(torch.reshape, (ctx.conform(value, Axes(dims)).node, tuple(shape)))
    if tuple(shape) == value.axes.frame:
        return value.node
    return ctx.graph.call_function(torch.reshape, (value.node, (-1, *shape)))

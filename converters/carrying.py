"""Loops that carry values from frame to frame (ConvGRU, ConvLSTM, cells in a Python loop), rolled up by :mod:`dissect.carried`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from dissect.carried import begin, carry, last_frame, later
from dissect.context import Context, Refused, Value
from dissect.converters.recurrence import fixed
from dissect.holding import Choose
from dissect.ledger import Axes, Axis, Factor, alike, plain_axis
from dissect.primitives import Primitive, Query
from dissect.recurrence import Loop
from dissect.registry import converter
from dissect.rewrite import converted

aten = torch.ops.aten
FROM_THE_CLIP = (
    "a Python loop over time whose first carried value is computed from the clip",
    "start it from zeros or from a parameter: a stream begins before anything is computed",
)


@converter(carry)
def loop(ctx: Context, inputs: Sequence[Value], first: Sequence[Value], shared: Sequence[Value]) -> tuple[Value, ...]:
    """A recurrence whose cell is the body of the loop."""
    body, given = ctx.node.meta["body"], ctx.node.meta["given"]
    moving = [value for value in (*inputs, *shared) if not value.constant]
    if any(not value.constant for value in first):
        raise Refused(*FROM_THE_CLIP)
    aligned, clock = ctx.align(moving)
    for value in aligned:
        ctx.mixes(value)
    ready = iter(aligned)
    args: Any = ctx.node.args
    known = {
        name: next(ready) if not value.constant else value
        for name, value in zip(args[0] + args[2], (*inputs, *shared), strict=True)
    }
    inner = Context(ctx.captured, ctx.options)
    inner.rows, inner.frames, inner.branches = ctx.rows, ctx.frames, ctx.branches
    values: dict[fx.Node, Any] = {}
    rows: list[tuple[fx.Node, Value]] = []
    held: list[tuple[fx.Node, Value]] = []
    carried = [axes_of(value, ctx.captured.batch) for value in first]
    places = [node for node in body.nodes if node.op == "placeholder"]
    timing = clock.plain().but(running=True, endless=True)
    for node, axes, value in zip(places, carried, first, strict=False):
        values[node] = Value(inner.graph.placeholder(node.name), axes, timing, value.dtype)
    for kind in ("input", "shared"):
        for outside, node in given[kind].items():
            value = known[outside]
            (held if value.constant else rows).append((node, value))
    for node, value in (*rows, *held):
        placeholder = inner.graph.placeholder(node.name)
        values[node] = replace(value, node=placeholder, name=None, timing=None if value.constant else timing)
    outputs, new = walked(inner, body, values, ctx)
    new = [fitted(inner, value, axes) for axes, value in zip(carried, new, strict=True)]
    cell = inner.graph.output((tuple(value.node for value in outputs), tuple(value.node for value in new)))
    assert cell is not None
    inner.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    module = fx.GraphModule(inner.root, inner.graph, "Body")
    if inner.clock is not None or any(isinstance(part, Primitive) and part.specs for part in module.modules()):
        raise Refused("a Python loop over time that looks at other frames, too", "run it outside of the network")
    starts = [started(ctx, value, axes) for value, axes in zip(first, carried, strict=True)]
    extra: dict[str, Any] = {"first": starts} if any(at is not None for at in starts) else {}
    phased = clock.stride > 1
    if phased or clock.delay > 0:
        extra["mask"] = ctx.inside(clock, phase=phased)
    whole = not (ctx.preset == "d3d" and clock.removed > 1)
    count = clock.length(ctx.frames)
    ctx.row(
        f"a loop over time, one round a {'position' if phased else 'frame'}",
        exact=whole,
        reason="" if whole else f"every frame, where the original takes every {clock.removed}th",
        kernel=count,
        stride=clock.stride,
    )
    timing = timing.but(old=clock.old + clock.stride * (count - 1))
    frames = [value for _, value in rows]
    module_ = Loop(module, [axes.frame for axes in carried])
    out = ctx.primitive(
        "loop", module_, (frames, [value for _, value in held]), moving[0].axes, timing, moving[0].dtype, **extra
    )
    return tuple(
        Value(ctx.graph.call_function(operator.getitem, (out.node, index)), value.axes, timing, value.dtype)
        for index, value in enumerate(outputs)
    )


def walked(inner: Context, body: fx.Graph, values: dict[fx.Node, Any], ctx: Context) -> tuple[list[Value], list[Value]]:
    """The body on frame tensors, and its results: of the frame, and carried on."""
    for node in body.nodes:
        if node.op == "output":
            outputs, new = node.args[0]
            return [values[value] for value in outputs], [values[value] for value in new]
        if node.op == "call_function":
            values[node] = converted(inner, node, values)
    raise AssertionError("a graph without an output")


def fitted(ctx: Context, value: Value, axes: Axes) -> Value:
    """The value with the ledger of a carried one: several dimensions of a frame may be one of the original, or none."""
    same = value.shape == axes.shape and all(
        own.kinds.replace("S", "") == other.kinds.replace("S", "") and own.kinds.find("N") == other.kinds.find("N")
        for own, other in zip(value.axes.dims, axes.dims, strict=True)
    )
    if value.constant or not same:
        raise Refused("a Python loop over time whose carried value changes its shape", "run it outside of the network")
    return ctx.reframe(value, axes)


def axes_of(value: Value, batch: int) -> Axes:
    """The ledger of a carried value, read off the size of its first one: the first dimension that holds the batch is it."""
    dims: list[Axis] = []
    found = False
    for size in value.shape:
        if (not found and size % batch == 0 and batch > 1) or (not found and size == batch):
            found = True
            rest = (Factor("S", size // batch),) if size > batch else ()
            dims.append(Axis((Factor("N", batch), *rest)))
        else:
            dims.append(plain_axis(size))
    if not found:
        raise Refused(
            "a Python loop over time whose carried value has no batch dimension",
            "start it with a row for each of the batch",
        )
    return Axes(tuple(dims))


def started(ctx: Context, value: Value, axes: Axes) -> fx.Node | None:
    """The first carried value of one row; None for zeros."""
    assert value.tensor is not None
    if not value.tensor.any() and fixed(value.node):
        return None
    sizes = [factor.size for axis in axes.dims for factor in axis.factors or (Factor("S", 1),)]
    kinds = [factor.kind for axis in axes.dims for factor in axis.factors or (Factor("S", 1),)]
    tensor, at = value.tensor.reshape(sizes), kinds.index("N")
    if not alike(tensor, tensor.narrow(at, 0, 1)):
        raise Refused("a Python loop over time whose first carried value differs from row to row of the batch")
    node = ctx.graph.call_function(torch.reshape, (value.node, tuple(sizes)))
    node = ctx.graph.call_function(torch.select, (node, at, 0))
    return ctx.graph.call_function(torch.reshape, (node, (1, *axes.frame)))


@converter(last_frame)
def last(ctx: Context, x: Value) -> Value:
    """The result of the last frame."""
    mark = frozenset({len(ctx.rows)})
    ctx.row("the newest position", exact=True)
    return Value(x.node, x.axes, x.clock.plain().but(running=False, pooled=x.clock.pooled | mark), x.dtype)


@converter(later)
def after_the_first(ctx: Context, x: Value) -> Value:
    """Whether a frame is not the first position of a value, for each row of the batch."""
    clock = ctx.settled(x).clock
    node = ctx.ask(Query(clock.delay + clock.stride, 1, None))
    return Value(node, Axes((Axis((Factor("N", ctx.captured.batch),)),)), clock.plain(), x.dtype)


@converter(begin)
def begun(ctx: Context, first: Value, x: Value, late: Value) -> Value:
    """The first frame's own value, or an input without time, then that of all others."""
    if not first.constant and (first.clock.pooled or first.clock.newest):
        raise Refused(*FROM_THE_CLIP)
    (first, x, late), timing = ctx.align([first, x, late])
    first = ctx.conform(first, x.axes) if first.constant else fitted(ctx, first, x.axes)
    ctx.row("the first frame has a value of its own, by the clock", exact=True)
    return ctx.primitive("begin", Choose(), (x, first, late), x.axes, timing.plain(), x.dtype)

"""Recurrent layers: GRU, LSTM and plain RNN, over time or inside a frame.

Over time the hidden values are caches: a step is one evaluation of the cell, and the forward direction of the
original is exact. Between the positions of a strided stream the caches are held. A recurrence that runs over
another axis (tokens of one frame) is a layer like any other.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from dissect.context import Context, Refused, Value
from dissect.ledger import Axes, Axis, alike, plain_axis
from dissect.recurrence import KINDS, FrameRecurrence, Recurrence
from dissect.registry import converter

aten = torch.ops.aten


@converter(aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)
def one_state(ctx: Context, x: Value, first: Value, weights: Sequence[Value], *settings: Any) -> tuple[Value, ...]:
    return recurrence(ctx, x, [first], weights, *settings)


@converter(aten.lstm.input)
def two_states(
    ctx: Context, x: Value, first: Sequence[Value], weights: Sequence[Value], *settings: Any
) -> tuple[Value, ...]:
    return recurrence(ctx, x, first, weights, *settings)


def recurrence(
    ctx: Context,
    x: Value,
    first: Sequence[Value],
    weights: Sequence[Value],
    biases: bool,
    levels: int,
    dropout: float,
    train: bool,
    both: bool,
    batch_first: bool = False,
) -> tuple[Value, ...]:
    """Over time, caches; over anything else, a layer of the frame."""
    if len(x.axes) != 3:
        raise Refused("a recurrence of an input without a batch dimension", "give it (batch, time, features)")
    if any(not weight.constant for weight in weights):
        raise Refused("a recurrence whose weights are computed from the clip")
    if x.constant:
        raise Refused("a recurrence over a constant, as a decoder of zeros is", "end the network before it")
    rows, run = (0, 1) if batch_first else (1, 0)
    along = x.axes[run]
    if "N" in along.kinds:
        raise Refused("a recurrence over the batch", "was batch_first=True meant?")
    if not x.axes[2].plain:
        raise Refused("a recurrence over an axis that merges time with features")
    if along.plain:
        return frame_recurrence(ctx, x, first, weights, biases, levels, dropout, both, rows, run)
    if not along.is_time:
        raise Refused(
            "a recurrence over an axis that merges time with space", "run it over time, or over the tokens of a frame"
        )
    if both:
        raise Refused(
            "a recurrence in both directions begins at the end of the clip, which a stream has not seen",
            "train it with bidirectional=False, or end the network before it and run the rest over the features of a whole clip",
        )
    x = ctx.settled(x)
    clock = x.clock
    name = str(ctx.node.target).split(".")[1]
    count = KINDS[name].states
    space = list(Axes((x.axes[rows],)).frame)  # what is merged with the batch is one dimension of the frame
    start = [started(ctx, value, x.axes[rows], space) for value in first]
    sizes = [value.shape[-1] for value in first]
    carried = [(*space, sizes[index]) for _ in range(levels) for index in range(count)]
    settings: dict[str, Any] = {
        "kind": name,
        "levels": levels,
        "biases": biases,
        "dropout": dropout,
        "carried": carried,
        "stepwise": count > 1 and read(ctx.node, 2),
    }
    phased = clock.stride > 1
    extra: dict[str, Any] = {"mask": ctx.inside(clock, phase=phased)} if phased or clock.delay > 0 else {}
    if any(value is not None for value in start):
        levelled = [
            [None if at is None else ctx.graph.call_function(torch.select, (at, 0, level)) for at in start]
            for level in range(levels)
        ]
        extra["first"] = [at for values in levelled for at in values]
    whole = not (ctx.preset == "d3d" and clock.removed > 1)
    ctx.row(
        f"recurrence, one {name.upper().replace('_', ' ')} cell a " + ("position" if phased else "frame"),
        exact=whole,
        reason="" if whole else "every frame, where the original takes every " + f"{clock.removed}th",
        kernel=clock.length(ctx.frames),
        stride=clock.stride,
    )
    ctx.mixes(x)
    timing = clock.plain().but(old=clock.old + clock.stride * (clock.length(ctx.frames) - 1), endless=True)
    given = {
        weight.name.rpartition(".")[2] if weight.name else str(index): weight for index, weight in enumerate(weights)
    }
    layer = (
        ctx.layer(lambda **tensors: Recurrence(**settings, weights=tensors), given)
        if len(given) == len(weights)
        else None
    )
    features = x.axes.replace(2, plain_axis(first[0].shape[-1]))
    if layer is not None:
        out = ctx.module(*layer, ([x],), features, timing, x.dtype, **extra)
    else:
        out = ctx.primitive(
            "recurrence", Recurrence(**settings, weights={}), ([x], list(weights)), features, timing, x.dtype, **extra
        )
    ended = timing
    if any(read(ctx.node, 1 + index) for index in range(count)):
        ended = timing.but(pooled=timing.pooled | {len(ctx.rows)})
        ctx.row("the newest hidden values", exact=True)
    last = [
        Value(
            stacked(ctx, out.node, [1 + level * count + index for level in range(levels)]),
            hidden(levels, x.axes[rows], size),
            ended,
            x.dtype,
        )
        for index, size in enumerate(sizes)
    ]
    return Value(item(ctx, out.node, 0), features, timing, x.dtype), *last


def read(node: fx.Node, index: int) -> bool:
    """Somebody uses that result of the operator."""
    return any(user.target is operator.getitem and user.args[1] == index and user.users for user in node.users)


def item(ctx: Context, node: fx.Node, index: int) -> fx.Node:
    return ctx.graph.call_function(operator.getitem, (node, index))


def stacked(ctx: Context, node: fx.Node, indices: Sequence[int]) -> fx.Node:
    """The last hidden values of all levels, ``(rows, levels, ...)``."""
    return ctx.graph.call_function(torch.stack, ([item(ctx, node, index) for index in indices], 1))


def hidden(levels: int, rows: Axis, size: int) -> Axes:
    """The ledger of the last hidden values, ``(levels, batch, features)``."""
    return Axes((plain_axis(levels), rows, plain_axis(size)))


def fixed(node: fx.Node) -> bool:
    """Nothing that training changes is behind a constant."""
    return node.op != "get_attr" and all(fixed(source) for source in node.all_input_nodes)


def started(ctx: Context, value: Value, rows: Axis, space: Sequence[int]) -> fx.Node | None:
    """The first hidden values without the batch, ``(levels, *space, features)``; None for zeros."""
    if not value.constant:
        raise Refused(
            "its first hidden value is computed from the clip",
            "start it from zeros or from a parameter: a stream begins before anything is computed",
        )
    assert value.tensor is not None
    if not value.tensor.any() and fixed(value.node):
        return None
    levels, _, size = value.shape
    batch = next((at for at, factor in enumerate(rows.factors) if factor.kind == "N"), None)
    if batch is None:
        raise Refused("a recurrence without a batch")
    split = (levels, *[factor.size for factor in rows.factors], size)
    tensor = value.tensor.reshape(split)
    if not alike(tensor, tensor.narrow(1 + batch, 0, 1)):
        raise Refused("its first hidden value differs from row to row of the batch")
    node = ctx.graph.call_function(torch.reshape, (value.node, split))
    node = ctx.graph.call_function(torch.select, (node, 1 + batch, 0))
    return ctx.graph.call_function(torch.reshape, (node, (levels, *space, size)))


def frame_recurrence(
    ctx: Context,
    x: Value,
    first: Sequence[Value],
    weights: Sequence[Value],
    biases: bool,
    levels: int,
    dropout: float,
    both: bool,
    rows: int,
    run: int,
) -> tuple[Value, ...]:
    """A recurrence over tokens of one frame, in one direction or both."""
    moving = [value for value in (x, *first) if not value.constant]
    aligned, timing = ctx.align(moving)
    ready = iter(aligned)
    x, *first = [value if value.constant else next(ready) for value in (x, *first)]
    name = str(ctx.node.target).split(".")[1]
    space = [factor.size for factor in x.axes[rows].factors if factor.inner]
    tokens = x.axes[run].space
    node = x.node
    if run == 0 and space:
        node = ctx.graph.call_function(torch.reshape, (node, (-1, tokens, *space, x.shape[2])))
        node = ctx.graph.call_function(torch.movedim, (node, 1, -2))
    starts = []
    for value in first:
        levelled = value.shape[0]
        if value.constant:
            at = started_anywhere(ctx, value, x.axes[rows], space)
        else:
            at = ctx.graph.call_function(torch.reshape, (value.node, (-1, levelled, *space, value.shape[2])))
        starts.append(at)
    node = ctx.graph.call_function(torch.reshape, (node, (-1, *(space or [1]), tokens, x.shape[2])))
    settings: dict[str, Any] = {"kind": name, "levels": levels, "biases": biases, "dropout": dropout, "both": both}
    given = {
        weight.name.rpartition(".")[2] if weight.name else str(index): weight for index, weight in enumerate(weights)
    }

    def kind(**tensors: Tensor) -> FrameRecurrence:
        return FrameRecurrence(**settings, weights=tensors)

    layer = ctx.layer(kind, given) if len(given) == len(weights) else None
    path, module, held = (
        (*layer, [])
        if layer is not None
        else (ctx.free("recurrence"), FrameRecurrence(**settings, weights={}), list(weights))
    )
    timing = timing.plain()
    out = ctx.module(path, module, (node, held, starts), x.axes, timing, x.dtype)
    size = first[0].shape[-1] * (2 if both else 1)
    axes = x.axes.replace(2, plain_axis(size))
    y = item(ctx, out.node, 0)
    if run == 0 and space:
        y = ctx.graph.call_function(torch.movedim, (y, -2, 1))
    y = ctx.graph.call_function(torch.reshape, (y, (-1, *axes.frame)))
    last = []
    for index, value in enumerate(first):
        ended = hidden(value.shape[0], x.axes[rows], value.shape[2])
        h = ctx.graph.call_function(torch.reshape, (item(ctx, out.node, 1 + index), (-1, *ended.frame)))
        last.append(Value(h, ended, timing, x.dtype))
    return Value(y, axes, timing, x.dtype), *last


def started_anywhere(ctx: Context, value: Value, rows: Axis, space: Sequence[int]) -> fx.Node:
    """Constant first hidden values of a frame's recurrence, ``(1, levels, *space or 1, features)``."""
    assert value.tensor is not None
    levels, _, size = value.shape
    split = (levels, *[factor.size for factor in rows.factors], size)
    tensor, node = value.tensor.reshape(split), ctx.graph.call_function(torch.reshape, (value.node, split))
    for at, factor in reversed(list(enumerate(rows.factors))):
        if not factor.inner:
            if not alike(tensor, tensor.narrow(1 + at, 0, 1)):
                raise Refused("its first hidden value differs from row to row of the batch, or from frame to frame")
            tensor, node = tensor.select(1 + at, 0), ctx.graph.call_function(torch.select, (node, 1 + at, 0))
    return ctx.graph.call_function(torch.reshape, (node, (1, levels, *(space or [1]), size)))


def _cell(name: str) -> Any:
    def convert(ctx: Context, x: Value, first: Any, *weights: Value | None) -> Any:
        """One cell inside a frame: plain products and activations."""
        states = list(first) if isinstance(first, (list, tuple)) else [first]
        values, timing = ctx.align([x, *states])
        if any(value.shape[-1] != value.axes[len(value.axes) - 1].space for value in values if not value.constant):
            raise Refused("a recurrent cell over an axis that merges time with features")
        frame = next(value for value in values if not value.constant)
        states = [
            ctx.conform(value, frame.axes.replace(1, plain_axis(value.shape[1]))) if value.constant else value
            for value in values[1:]
        ]
        x = (
            ctx.conform(values[0], frame.axes.replace(1, plain_axis(values[0].shape[1])))
            if values[0].constant
            else values[0]
        )
        tensors = list(weights)
        node = ctx.graph.call_function(KINDS[name].cell, ctx.arg((x, tuple(states), *tensors)))
        timing = timing.plain()
        parts = [
            Value(item(ctx, node, index), frame.axes.replace(1, plain_axis(state.shape[-1])), timing, frame.dtype)
            for index, state in enumerate(states)
        ]
        return tuple(parts) if len(parts) > 1 else parts[0]

    return convert


_CELLS: Mapping[str, Any] = {
    "gru": aten.gru_cell.default,
    "lstm": aten.lstm_cell.default,
    "rnn_tanh": aten.rnn_tanh_cell.default,
    "rnn_relu": aten.rnn_relu_cell.default,
}
for _name, _target in _CELLS.items():
    converter(_target)(_cell(_name))

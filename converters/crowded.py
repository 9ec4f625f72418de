"""Rows that carry more than the batch: pixels, joints, persons or views merged with it, as ``(N * S, C, T)``.

A frame tensor keeps them in front of the channels, ``(rows, S, C, ...)``, where layers look for their channels. What
mixes no time takes them as rows; what does takes them as one more dimension of space, or as more groups of channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dissect.context import Context, Value
from dissect.ledger import Axes, Axis, plain, plain_axis

__all__ = ["changed", "crowded", "grouped", "lifted", "rowwise"]


def crowded(x: Value) -> bool:
    """Whether the first dimension of ``x`` has more in it than batch and time."""
    return x.axes[0].space > 1


def rowwise(ctx: Context, x: Value, convert: Callable[[Value], Value]) -> Value:
    """A layer that mixes no time: ``convert`` sees every one of the crowd as a row."""
    crowd = x.axes[0]
    x = ctx.settled(ctx.sure(x))
    bare = Axis(tuple(factor for factor in crowd.factors if not factor.inner))
    node = ctx.graph.call_function(torch.reshape, (x.node, (-1, *x.axes.frame[1:])))
    y = convert(replace(x, node=node, axes=x.axes.replace(0, bare)))
    axes = y.axes.replace(0, crowd)
    return replace(y, node=ctx.graph.call_function(torch.reshape, (y.node, (-1, *axes.frame))), axes=axes)


def lifted(ctx: Context, x: Value, weight: Value, convert: Callable[[Value, Value], Value]) -> Value:
    """A convolution over time: ``convert`` sees the crowd as a dimension of space behind the channels, with one tap."""
    crowd = x.axes[0]
    bare = Axis(tuple(factor for factor in crowd.factors if not factor.inner))
    inner = len(x.axes.frame)
    node = ctx.graph.call_function(torch.permute, (x.node, (0, 2, 1, *range(3, inner + 1))))
    axes = Axes((bare, x.axes[1], plain_axis(crowd.space), *x.axes.dims[2:]))
    y = convert(replace(x, node=node, axes=axes), changed(ctx, weight, Tensor.unsqueeze, 2))
    back = ctx.graph.call_function(torch.permute, (y.node, (0, 2, 1, *range(3, inner + 1))))
    return replace(y, node=back, axes=Axes((crowd, y.axes[1], *y.axes.dims[3:])))


def grouped(
    ctx: Context, x: Value, weight: Value | None, bias: Value | None, convert: Callable[[Value, Any, Any], Value]
) -> Value:
    """What works group by group: ``convert`` sees the crowd as more groups of channels, each with the same weights."""
    crowd = x.axes[0]
    count = crowd.space
    bare = Axis(tuple(factor for factor in crowd.factors if not factor.inner))
    axes = Axes((bare, plain_axis(count * x.shape[1]), *x.axes.dims[2:]))
    node = ctx.graph.call_function(torch.reshape, (x.node, (-1, *axes.frame)))
    weights = [
        value and changed(ctx, value, Tensor.repeat, (count, *[1] * (len(value.shape) - 1))) for value in (weight, bias)
    ]
    y = convert(replace(x, node=node, axes=axes), *weights)
    out = Axes((crowd, plain_axis(y.shape[1] // count), *y.axes.dims[2:]))
    return replace(y, node=ctx.graph.call_function(torch.reshape, (y.node, (-1, *out.frame))), axes=out)


def changed(ctx: Context, weight: Value, change: Callable[..., Tensor], *args: Any) -> Value:
    """A parameter in another shape: it is no longer the layer's own, but computed from it."""
    assert weight.tensor is not None
    tensor = change(weight.tensor, *args)
    node = ctx.graph.call_function(change, (weight.node, *args))
    return replace(weight, node=node, axes=plain(tensor.shape), tensor=tensor, name=None)

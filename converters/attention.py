"""Attention: products of matrices, softmax, and the two together, inside a frame and across time.

Across time the keys and values of a window of positions are kept, as many as the original clip has, and the newest
frame alone asks. At the last position of the clip this is the original; a frame before it sees, offline, the frames
that come after it too.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from dissect.context import Context, Refused, Value
from dissect.converters.einsum import contract, framed, resolve, time_of
from dissect.converters.pointwise import pointwise
from dissect.converters.windows import elementwise
from dissect.ledger import Axes
from dissect.registry import converter, windowed
from dissect.timing import joined
from dissect.windows import aligned, known, masked, window

aten = torch.ops.aten


def as_matmul(
    ctx: Context, nodes: list[fx.Node], labels: list[list[Hashable]], out: list[Hashable], sizes: dict[Hashable, int]
) -> fx.Node:
    """One product of matrices on frame tensors; a dimension that no frame has counts 1."""
    batch = [label for label in out if label not in ("rows", "i", "j")]

    def shaped(node: fx.Node, names: list[Hashable], inner: tuple[str, str]) -> fx.Node:
        wanted = ["rows", *batch, *inner] if "rows" in names else [*batch, *inner]
        if names == wanted:
            return node
        shape = [-1 if label == "rows" else sizes.get(label, 1) if label in names else 1 for label in wanted]
        return ctx.graph.call_function(torch.reshape, (node, tuple(shape)))

    a, b = shaped(nodes[0], labels[0], ("i", "k")), shaped(nodes[1], labels[1], ("k", "j"))
    y = ctx.graph.call_function(torch.matmul, (a, b))
    if out == ["rows", *batch, "i", "j"]:
        return y
    return ctx.graph.call_function(torch.reshape, (y, (-1, *(sizes[label] for label in out[1:]))))


@converter(aten.matmul.default, aten.mm.default, aten.bmm.default)
def matmul(ctx: Context, a: Value, b: Value) -> Value:
    """A product of matrices; vectors are matrices of one row or column."""
    first: list[Hashable] = ["k"] if len(a.shape) == 1 else [*range(2 - len(a.shape), 0), "i", "k"]
    second: list[Hashable] = ["k"] if len(b.shape) == 1 else [*range(2 - len(b.shape), 0), "k", "j"]
    wide = max(len(a.shape), len(b.shape)) - 2
    out: list[Hashable] = [
        *range(-max(wide, 0), 0),
        *(["i"] if "i" in first else []),
        *(["j"] if "j" in second else []),
    ]
    return contract(ctx, [a, b], [first, second], out, as_matmul)


@converter(aten.baddbmm.default)
def baddbmm(ctx: Context, x: Value, a: Value, b: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    y = matmul(ctx, a, b)
    y = y if alpha == 1 else replace(y, node=ctx.graph.call_function(torch.mul, (y.node, alpha)))
    if beta == 0:
        return y
    scaled = (
        x
        if beta == 1
        else replace(
            x,
            node=ctx.graph.call_function(torch.mul, (x.node, beta)),
            tensor=None if x.tensor is None else x.tensor * beta,
        )
    )
    return every(ctx, aten.add.Tensor, scaled, y)


@converter(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten._log_softmax.default)
def softmax(ctx: Context, x: Value, dim: int, *_: Any, **__: Any) -> Value:
    """Weights over a dimension; over time, over a window of positions."""
    dim %= len(x.axes)
    if "N" in x.axes[dim].kinds:
        raise Refused("a softmax over the batch")
    x = ctx.settled(x)
    if "T" in x.axes[dim].kinds:
        x = window(ctx, x, "softmax over time")
    return weights(ctx, x, dim, torch.log_softmax if "log" in str(ctx.node.target) else torch.softmax)


def weights(ctx: Context, x: Value, dim: int, target: Callable[..., Any]) -> Value:
    """A softmax over one frame's dimension, over the positions that exist where it is a window."""
    if "K" in x.axes[dim].kinds:
        x = masked(ctx, x, float("-inf"), dim)
    at = x.axes.kept(dim)
    assert at is not None
    log = target is torch.log_softmax
    done = known(Axes((x.axes[dim],)), zero=not log, weights=True)[0]
    y = ctx.call(target, (x, at + 1), known(x.axes).replace(dim, done), x.clock.plain(), x.dtype)
    if not log or "K" not in x.axes[dim].kinds:
        return y
    y = masked(ctx, y, 0.0, dim)  # minus infinity where there is no position, which times a weight of 0 is no number
    return replace(y, axes=y.axes.replace(dim, known(Axes((y.axes[dim],)), zero=True, weights=True)[0]))


@converter(aten.scaled_dot_product_attention.default)
def attention(
    ctx: Context,
    q: Value,
    k: Value,
    v: Value,
    mask: Value | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    """``softmax(q k / sqrt(d)) v``: one operator inside a frame, its parts over a window across time."""
    batch: list[Hashable] = list(range(2 - len(q.shape), 0))
    names = [[*batch, "i", "e"], [*batch, "s", "e"], [*batch, "s", "j"]]
    moving = [value for value in (q, k, v) if not value.constant]
    inner = [time_of(value, labels) for value, labels in zip((q, k, v), names, strict=True)]
    if not {"i", "s"} & set(inner) and all(value.axes.window is None for value in moving):
        return inside(ctx, [q, k, v], names, mask, causal, scale, enable_gqa)
    if enable_gqa or any(len(value.shape) != len(q.shape) for value in (k, v)):
        raise Refused("attention across time with fewer heads of keys than of queries", "repeat the keys")
    scores = contract(ctx, [q, k], [[*batch, "i", "k"], [*batch, "j", "k"]], [*batch, "i", "j"], as_keys, "j")
    factor = scale if scale is not None else q.shape[-1] ** -0.5
    scores = ctx.call(torch.mul, (scores, factor), scores.axes, scores.clock, scores.dtype)
    if scores.axes[len(scores.axes) - 1].is_time:  # queries that are no frames
        scores = window(ctx, scores, "softmax over time")
    if causal:
        mask = ctx.constant(torch.ones(scores.shape[-2:], dtype=torch.bool).tril(), "causal")
    if mask is not None:
        scores = blocked(ctx, scores, mask)
    shares = weights(ctx, scores, len(scores.axes) - 1, torch.softmax)
    return contract(ctx, [shares, v], [[*batch, "i", "k"], [*batch, "k", "j"]], [*batch, "i", "j"], as_matmul)


def attended(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options: Any) -> Tensor:
    """Attention with any number of dimensions between rows and tokens: runtimes have it for exactly one, the heads."""
    if q.dim() == 4:
        return F.scaled_dot_product_attention(q, k, v, attn_mask, **options)
    shape = (*q.shape[:-1], v.shape[-1])
    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = attn_mask.expand(*q.shape[:-2], *attn_mask.shape[-2:]).reshape(
            q.shape[0], -1, *attn_mask.shape[-2:]
        )
    q, k, v = (x.reshape(x.shape[0], -1, *x.shape[-2:]) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask, **options).reshape(shape)


def as_keys(
    ctx: Context, nodes: list[fx.Node], labels: list[list[Hashable]], out: list[Hashable], sizes: dict[Hashable, int]
) -> fx.Node:
    """Queries times keys, both ``(tokens, features)``."""
    batch = [label for label in out if label not in ("rows", "i", "j")]
    key = labels[1]
    shape = [
        -1 if label == "rows" else sizes.get(label, 1) if label in key else 1
        for label in [*(["rows"] if "rows" in key else []), *batch, "j", "k"]
    ]
    node = ctx.graph.call_function(torch.reshape, (nodes[1], tuple(shape)))
    node = ctx.graph.call_function(torch.transpose, (node, -2, -1))
    turned = [*(["rows"] if "rows" in key else []), *batch, "k", "j"]
    return as_matmul(ctx, [nodes[0], node], [labels[0], turned], out, sizes)


def blocked(ctx: Context, scores: Value, mask: Value) -> Value:
    """Scores under a mask: False, or what is added."""
    if not mask.constant:
        raise Refused("attention across time under a mask that is computed from the clip")
    if mask.dtype == torch.bool:
        low = ctx.constant(torch.full((), float("-inf"), dtype=scores.dtype), "blocked")
        return every(ctx, aten.where.self, mask, scores, low)
    return every(ctx, aten.add.Tensor, scores, mask)


def every(ctx: Context, target: Any, *args: Any) -> Value:
    """An elementwise operator on scores that may have a window of keys."""
    return elementwise(ctx, lambda ctx, *args, **kwargs: pointwise(ctx, target, args, kwargs), *args, target=target)


def inside(
    ctx: Context,
    values: list[Value],
    names: list[list[Hashable]],
    mask: Value | None,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> Value:
    """Attention among the tokens of one frame."""
    values = aligned(ctx, values)
    resolved = {
        label: resolve(values, names, label) for label in dict.fromkeys(label for labels in names for label in labels)
    }
    nodes = [framed(ctx, value, labels, resolved) for value, labels in zip(values, names, strict=True)]
    clock = joined(
        value.clock
        for value in sorted((value for value in values if not value.constant), key=lambda value: value.time is None)
    )
    out = [*names[0][:-1], "j"]
    axes = Axes(tuple(resolved[label] for label in out))
    extra: dict[str, Any] = {"is_causal": causal, "scale": scale}
    if mask is not None:
        if not mask.constant:
            raise Refused("attention under a mask that is computed from the clip")
        labels = [*range(-len(mask.shape) + 2, 0), "i", "s"]
        extra["attn_mask"] = framed(ctx, mask, labels, resolved)
    if gqa:
        extra["enable_gqa"] = True
    return ctx.call(attended, tuple(nodes), axes, clock.plain(), values[0].dtype, **extra)


@windowed(
    aten.matmul.default,
    aten.mm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.scaled_dot_product_attention.default,
)
def over_window(ctx: Context, convert: Callable[..., Value], *args: Any, **kwargs: Any) -> Value:
    return convert(ctx, *args, **kwargs)

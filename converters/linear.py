"""Linear layers and products of matrices inside a frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dissect.context import Context, Refused, Value
from dissect.converters.crowded import changed
from dissect.ledger import Axes, plain_axis
from dissect.primitives import Primitive, tap
from dissect.registry import converter

aten = torch.ops.aten


@converter(aten.linear.default)
def linear(ctx: Context, x: Value, weight: Value, bias: Value | None = None) -> Value:
    last = x.axes[len(x.axes) - 1]
    if not weight.constant or (bias is not None and not bias.constant):
        raise Refused("a linear layer whose weight is computed from the clip")
    out = x.axes.replace(len(x.axes) - 1, plain_axis(weight.shape[0]))
    if "T" in last.kinds:
        return window_linear(ctx, x, weight, bias, out)
    if not last.plain:
        raise Refused("a linear layer over the batch")
    x = ctx.settled(x)

    def kind(weight: Tensor, bias: Tensor | None) -> nn.Module:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        layer.weight = nn.Parameter(weight)
        layer.bias = None if bias is None else nn.Parameter(bias)  # type: ignore[assignment]
        return layer

    timing = x.clock.plain()
    layer = ctx.layer(kind, {"weight": weight, "bias": bias})
    if layer is not None:
        return ctx.module(*layer, (x,), out, timing, x.dtype)
    return ctx.call(F.linear, (x, weight, bias), out, timing, x.dtype)


class WindowLinear(Primitive):
    """A linear layer over the features of a window of positions, flattened as the original flattens them.

    ``beside`` are the dimensions of a frame that it leaves alone.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor | None,
        bias: Tensor | None,
        *,
        ages: list[int],
        before: int,
        after: int,
        beside: tuple[int, ...] = (),
    ) -> None:
        super().__init__()
        self.register_parameter("weight", None if weight is None else nn.Parameter(weight))
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias))
        self.ages = tuple(ages)
        self.before, self.after, self.beside = before, after, beside

    def forward(
        self, known: Any, weight: Tensor | None = None, bias: Tensor | None = None, frames: int | None = None
    ) -> Tensor:
        if weight is None:
            weight, bias = self.weight, self.bias
        assert weight is not None
        values = [tap(known, age, frames).reshape(-1, self.before, 1, self.after) for age in self.ages]
        return F.linear(torch.cat(values, 2).flatten(1), weight, bias).reshape(-1, *self.beside, weight.shape[0])


def window_linear(ctx: Context, x: Value, weight: Value, bias: Value | None, out: Any) -> Value:
    """A linear layer over flattened time: a window of all its positions."""
    last = x.axes[len(x.axes) - 1]
    if "N" in last.kinds:
        raise Refused("a linear layer over the batch")
    at = last.kinds.index("T")
    before = after = 1
    for index, factor in enumerate(last.factors):
        if index < at:
            before *= factor.size
        elif index > at:
            after *= factor.size
    positions = last.factors[at].size
    x = ctx.settled(x)
    clock = x.clock
    stride = clock.stride
    if ctx.preset == "d3d" and clock.removed > 1:
        stride = clock.removed  # a fixed linear layer keeps its clip: the same positions, the same frames apart
    ages = [index * stride for index in reversed(range(positions))]
    exact = ctx.exact
    timing = clock.plain().but(old=clock.old + ages[0], pooled=frozenset({len(ctx.rows)}))
    if exact:
        timing = timing.but(delay=clock.delay + ages[0], length=clock.length.then(-positions))
    ctx.row(
        f"linear over a window of {positions}",
        exact=exact,
        reason="" if exact else "the last positions",
        kernel=positions,
        stride=stride,
    )
    known = ctx.history(ctx.filled(x), ages[0])
    beside = Axes(x.axes.dims[:-1]).frame
    settings: dict[str, Any] = {"ages": ages, "before": before, "after": after, "beside": beside}
    layer = ctx.layer(lambda weight, bias: WindowLinear(weight, bias, **settings), {"weight": weight, "bias": bias})
    if layer is not None:
        return ctx.module(*layer, (known,), out, timing, x.dtype)
    return ctx.primitive("linear", WindowLinear(None, None, **settings), (known, weight, bias), out, timing, x.dtype)


def points(
    ctx: Context, x: Value, weight: Value, bias: Value | None, padding: Sequence[tuple[int, int]], groups: int
) -> Value:
    """Frames stacked on the channels of single points, in rows that carry more than the batch: a linear layer."""
    single = all(size == 1 for size in (*x.shape[2:], *weight.shape[2:]))
    if not single or groups != 1 or any(map(any, padding)):
        raise Refused(
            "a convolution of stacked frames whose rows carry more than the batch",
            "give rows and frames dimensions of their own",
        )
    flat = ctx.reframe(x, Axes(x.axes.dims[:2]))
    y: Value = linear(ctx, flat, changed(ctx, weight, Tensor.flatten, 1), bias)
    return ctx.reframe(y, Axes((*y.axes.dims, *x.axes.dims[2:])))


@converter(aten.bilinear.default)
def bilinear(ctx: Context, x: Value, y: Value, weight: Value, bias: Value | None = None) -> Value:
    """The last dimensions of two operands, each feature by each, with a weight for every pair and output."""
    if not weight.constant or (bias is not None and not bias.constant) or x.constant or y.constant:
        raise Refused("a bilinear layer of constants, or whose weight is computed from the clip")
    if not x.axes[len(x.axes) - 1].plain or not y.axes[len(y.axes) - 1].plain:
        raise Refused("a bilinear layer over flattened time", "give every frame its own features")
    if x.axes.dims[:-1] != y.axes.dims[:-1]:
        raise Refused("a bilinear layer of operands whose frames do not meet", "bring both to the same frames")
    (x, y), timing = ctx.align([x, y])
    axes = x.axes.replace(len(x.axes) - 1, plain_axis(weight.shape[0]))
    return ctx.call(paired, (x, y, weight, bias), axes, timing.plain(), x.dtype)


def paired(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.bilinear`` as one matrix product and one sum."""
    outputs, first, second = weight.shape
    table = weight.permute(1, 0, 2).reshape(first, outputs * second)
    each = (x.reshape(-1, first) @ table).reshape(-1, outputs, second)
    z = (each * y.reshape(-1, 1, second)).sum(-1)
    return (z if bias is None else z + bias).reshape(-1, *x.shape[1:-1], outputs)


@converter(aten.addmm.default)
def addmm(ctx: Context, bias: Value, x: Value, weight: Value, *, beta: float = 1, alpha: float = 1) -> Value:
    if not bias.constant or not weight.constant or (beta, alpha) != (1, 1) or not x.axes[1].plain:
        raise Refused("a matrix product with operands from the clip")
    x = ctx.settled(x)
    out = x.axes.replace(1, plain_axis(weight.shape[1]))
    return ctx.call(torch.addmm, (bias, x, weight), out, x.clock.plain(), x.dtype)

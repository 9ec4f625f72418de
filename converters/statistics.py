"""Statistics: means with variances, norms of vectors, and the normalisations that use them.

Inside a frame they are what they were. Over time they are taken over a window of positions, from the mean and the
variance of each position: the variance of the whole is the mean of the variances plus the variance of the means,
which needs two numbers a position in a cache, and loses no digits as a mean of squares would.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dissect.context import Context, Refused, Value
from dissect.converters.reduction import reduce
from dissect.ledger import Axes, Axis, Factor, plain_axis
from dissect.primitives import CumulativeMean, Primitive, Query
from dissect.registry import converter

aten = torch.ops.aten


class WindowMoments(Primitive):
    """Mean and variance of all that lies in a window, from those of each position: ``(rows, 2 * F)``, means first.

    ``seen`` is how many of the window's positions lie after the clip's start, ``inside`` how many of these before
    its end.
    """

    def __init__(self, positions: int, stride: int) -> None:
        super().__init__()
        self.positions = positions
        self.stride = stride

    def forward(self, known: Any, seen: Tensor, inside: Tensor, frames: int | None = None) -> Tensor:
        reach = (self.positions - 1) * self.stride
        if frames is None:
            cache, x = known
            past = cache.reshape(x.shape[0], -1, x.shape[1])
            window = torch.cat([past[:, past.shape[1] - reach :: self.stride], x.unsqueeze(1)], 1)
        else:
            start = known.shape[1] - frames - reach
            window = known[:, start:].unfold(1, reach + 1, 1)[..., :: self.stride].flatten(0, 1).transpose(1, 2)
        age = torch.arange(self.positions - 1, -1, -1, device=window.device, dtype=seen.dtype)
        mask = ((age < seen.unsqueeze(1)) & (age >= (seen - inside).unsqueeze(1))).unsqueeze(2)
        window = torch.where(mask, window, torch.zeros_like(window))
        means, variances = window.chunk(2, 2)
        share = 1 / inside.clamp(min=1).unsqueeze(1)
        mean = means.sum(1) * share
        apart = torch.where(mask, (means - mean.unsqueeze(1)).square(), torch.zeros_like(means))
        return torch.cat([mean, (variances + apart).sum(1) * share], 1)

    def extra_repr(self) -> str:
        return f"positions={self.positions}, stride={self.stride}"


def of_frame(x: Tensor, view: Sequence[int] | None, dims: Sequence[int]) -> Tensor:
    """Mean and variance of each row over ``dims``, ``(rows, 2 * F)``; without dims, each number is its own mean."""
    x = x if view is None else x.reshape(x.shape[0], *view)
    if not dims:
        x = x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)
        return torch.cat([x, torch.zeros_like(x)], 1)
    mean = x.mean(list(dims), keepdim=True)
    return torch.cat([mean.flatten(1), (x - mean).square().mean(list(dims), keepdim=True).flatten(1)], 1)


def over_all(moments: Tensor) -> Tensor:
    """Means of means and of squares as moments."""
    mean, square = moments.chunk(2, 1)
    return torch.cat([mean, (square - mean.square()).clamp(min=0)], 1)


def with_squares(moments: Tensor) -> Tensor:
    mean, variance = moments.chunk(2, 1)
    return torch.cat([mean, variance + mean.square()], 1)


def moments(
    ctx: Context,
    x: Value,
    view: Sequence[int] | None,
    dims: Sequence[int],
    size: int,
    over_time: bool,
    back: bool = False,
    counted: bool = False,
) -> tuple[Value, Any]:
    """Mean and variance over ``dims`` of the frame (seen as ``view``), and over time; and the count of positions.

    ``size`` is the number of means, ``back`` says that every position is then normalised by them, ``counted`` that the
    count is used.
    """
    axes = Axes((Axis((Factor("N", x.shape[0]),)), plain_axis(2 * size)))
    y = ctx.call(of_frame, (x, view, list(dims)), axes, x.clock.plain(), x.dtype)
    clock = y.clock
    count = clock.length(ctx.frames)
    if not over_time:
        return y, count
    ctx.mixes(x)
    settings = ctx.settings
    policy = settings.get("pool", "window" if "window" in settings else ctx.options.pool)
    given = settings.get("window", ctx.options.window)
    positions = given or (min(count * clock.removed, ctx.frames) if ctx.preset == "d3d" else count)
    facts: dict[str, Any] = {"kernel": count, "stride": clock.stride}
    if policy == "none" or (policy == "window" and positions == 1):
        exact = policy == "window" and count == 1
        ctx.row("statistics of the frame", exact=exact, reason="" if exact else "every frame for itself", **facts)
        return y, count
    if policy == "cumulative":
        masks = (ctx.inside(clock, phase=clock.stride > 1),) if ctx.exact else ()
        timing = clock.but(pooled=frozenset({len(ctx.rows)}))
        squares = ctx.call(with_squares, (y,), axes, clock, x.dtype)
        mean = ctx.primitive("statistics", CumulativeMean((2 * size,)), (squares, *masks), axes, timing, x.dtype)
        reason = "corrected by the example's count" if ctx.exact and counted and not back else _why(ctx, back, False)
        ctx.row("cumulative statistics", exact=not reason, reason=reason, **facts)
        return ctx.call(over_all, (mean,), axes, timing, x.dtype), count
    wait = ctx.exact and bool(settings.get("wait"))
    exact = ctx.exact and not given and (wait or not back)
    timing = clock.but(pooled=frozenset() if wait else frozenset({len(ctx.rows)}))
    ctx.waitable.add(len(ctx.rows))
    ctx.row(
        f"statistics of a window of {positions}",
        exact=exact,
        reason="" if exact else _why(ctx, back, bool(given)),
        **facts,
    )
    if wait:  # everything within reach on both sides: for a clip as long as the example's, all of it
        timing = timing.but(delay=clock.delay + (positions - 1) * clock.stride)
        positions = 2 * positions - 1
    reach = (positions - 1) * clock.stride
    inside = ctx.inside(clock, positions=positions)
    seen = ctx.ask(Query(clock.delay, clock.stride, None, positions=positions)) if wait else inside
    known = ctx.history(y, reach)
    window = WindowMoments(positions, clock.stride)
    return ctx.primitive(
        "statistics", window, (known, seen, inside), axes, timing.but(old=clock.old + reach), x.dtype
    ), (inside if ctx.exact else count)


def _why(ctx: Context, back: bool, given: bool) -> str:
    if given:
        return "a window of another length"
    if not back:
        return "" if ctx.exact else "the last positions instead of the clip's"
    return "window of the past, where every frame was normalised by the whole clip" + (
        f"; --set '{ctx.path}: wait=true' buys exactness with delay" if ctx.exact else ""
    )


# -- statistics as a result


def spread(ctx: Context, x: Value, dims: Any, correction: float, keepdim: bool, root: bool) -> tuple[Value, Value]:
    """The variance (or its root) and the mean over ``dims``."""
    rank = len(x.axes)
    chosen = sorted(
        {
            dim % rank
            for dim in (range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims)
        }
    )
    if any("N" in x.axes[dim].kinds for dim in chosen):
        raise Refused("a variance over the batch", "reduce over the other dimensions only")
    x = ctx.settled(x)
    inner = [kept + 1 for dim in chosen if (kept := x.axes.kept(dim)) is not None]
    over_time = any("T" in x.axes[dim].kinds for dim in chosen)
    ended = Axes(
        tuple(Axis() if dim in chosen else axis for dim, axis in enumerate(x.axes.dims) if keepdim or dim not in chosen)
    )
    size = prod(axis.space for dim, axis in enumerate(x.axes.dims) if dim not in chosen)
    each = prod(x.axes[dim].space for dim in chosen)
    both, count = moments(ctx, x, None, inner, size, over_time, counted=correction != 0)
    timing = both.clock
    shape = (-1, *ended.frame)
    count = count if over_time else 1
    args = (
        both,
        count if isinstance(count, int) else Value(count, both.axes, timing, x.dtype),
        each,
        float(correction),
        root,
        shape,
    )
    dispersed = ctx.call(dispersion, args, ended, timing, x.dtype)
    return dispersed, ctx.call(centre, (both, shape), ended, timing, x.dtype)


def dispersion(both: Tensor, count: Any, each: int, correction: float, root: bool, shape: Sequence[int]) -> Tensor:
    """The corrected variance, or its root; of one number alone, 0."""
    variance = both.chunk(2, 1)[1]
    if isinstance(count, Tensor):
        count = count.unsqueeze(1)
        variance = variance * (count * each) / (count * each - correction).clamp(min=1e-6)
    elif correction:
        variance = variance * (count * each / max(count * each - correction, 1e-6))
    return (rooted(variance, 2.0) if root else variance).reshape(shape)


def centre(both: Tensor, shape: Sequence[int]) -> Tensor:
    return both.chunk(2, 1)[0].reshape(shape)


def _register(name: str, root: bool, pair: bool) -> None:
    operator = getattr(aten, name)

    @converter(operator.correction)
    def corrected(
        ctx: Context, x: Value, dims: Any = None, *, correction: float | None = None, keepdim: bool = False
    ) -> Any:
        found = spread(ctx, x, dims, 1.0 if correction is None else correction, keepdim, root)
        return found if pair else found[0]

    @converter(operator.dim, operator.default)
    def unbiased(ctx: Context, x: Value, dims: Any = None, unbiased: bool = True, keepdim: bool = False) -> Any:
        if isinstance(dims, bool):  # the overload without dimensions
            dims, unbiased = None, dims
        found = spread(ctx, x, dims, float(unbiased), keepdim, root)
        return found if pair else found[0]


for _name in ("std", "var", "std_mean", "var_mean"):
    _register(_name, _name.startswith("std"), _name.endswith("mean"))


@converter(aten.linalg_vector_norm.default)
def vector_norm(
    ctx: Context, x: Value, order: float = 2, dims: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Value:
    power = float(order)
    kind = "max" if power == float("inf") else "min" if power == float("-inf") else "sum"
    clock = x.clock.but(fill=x.clock.fill if x.clock.fill == 0.0 else None, nonneg=True)
    parts = ctx.call(powered, (x, power), x.axes, clock, x.dtype)
    total = reduce(ctx, parts, kind, dims, keepdim)
    return ctx.call(rooted, (total, power), total.axes, total.clock.but(nonneg=True), x.dtype)


def powered(x: Tensor, power: float) -> Tensor:
    if power in (1.0, float("inf"), float("-inf")):
        return x.abs()
    return x.square() if power == 2.0 else (x != 0).to(x.dtype) if power == 0.0 else x.abs().pow(power)


def rooted(x: Tensor, power: float) -> Tensor:
    if power in (0.0, 1.0, float("inf"), float("-inf")):
        return x
    if x.requires_grad:  # torch's own norm and deviation have slope 0 at 0, where that of a root is infinite
        zero = x == 0
        return torch.where(zero, 0.0, torch.where(zero, 1.0, x).pow(1 / power))
    return x.sqrt() if power == 2.0 else x.pow(1 / power)

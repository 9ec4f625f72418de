"""Operators that treat every element, or every frame, on its own: nothing about them changes in a stream."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dissect.context import Context, Refused, Value
from dissect.converters.counted import counted
from dissect.ledger import plain
from dissect.meeting import by_position
from dissect.registry import converter, patient

aten = torch.ops.aten

#: zero stays zero, and a value that is never negative stays so
KEEPS_ZERO = (
    *(aten.__lshift__.Scalar, aten.__rshift__.Scalar),
    *(aten.bitwise_left_shift.Tensor_Scalar, aten.bitwise_right_shift.Tensor_Scalar),
    aten.relu.default,
    aten.relu6.default,
    aten.leaky_relu.default,
    aten.tanh.default,
    aten.silu.default,
    aten.gelu.default,
    aten.hardswish.default,
    aten.abs.default,
    aten.sqrt.default,
    aten.neg.default,
    aten.elu.default,
    aten.selu.default,
    aten.mish.default,
    aten.sign.default,
    aten.square.default,
    aten.floor.default,
    aten.trunc.default,
    aten.sin.default,
    aten.ceil.default,
    aten.round.default,
    *(aten.round.decimals, aten.erf.default, aten.expm1.default, aten.log1p.default),
    *(aten.tan.default, aten.asin.default, aten.atan.default),
    *(aten.sinh.default, aten.asinh.default, aten.atanh.default),
)
#: of these, a value that is never negative may come out negative
_TURNS = (aten.neg.default, aten.sin.default, aten.tan.default)
_NONNEG = (aten.relu.default, aten.relu6.default, aten.abs.default, aten.sqrt.default)
#: may give no number, or none that is finite, of a finite one
_WILD = (
    *(aten.sqrt.default, aten.rsqrt.default, aten.reciprocal.default),
    *(aten.log.default, aten.log1p.default, aten.log2.default, aten.log10.default),
    *(aten.asin.default, aten.acos.default, aten.acosh.default, aten.atanh.default),
    *(aten.exp2.default, aten.expm1.default, aten.sinh.default, aten.cosh.default),
    *(aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar, aten.addcdiv.default),
)
_QUOTIENTS = (aten.div, aten.remainder, aten.fmod)
_NONNEG_ALWAYS = (
    *(*_NONNEG, aten.sigmoid.default, aten.exp.default, aten.hardsigmoid.default, aten.softplus.default),
    *(aten.exp2.default, aten.erfc.default, aten.cosh.default, aten.acos.default, aten.acosh.default),
)
OTHER = (
    aten.sigmoid.default,
    aten.hardsigmoid.default,
    aten.softplus.default,
    aten.exp.default,
    *(aten.exp2.default, aten.log.default, aten.log2.default, aten.log10.default),
    aten.log_sigmoid.default,
    aten.rsqrt.default,
    aten.reciprocal.default,
    *(aten.cos.default, aten.cosh.default, aten.acos.default, aten.acosh.default, aten.erfc.default),
    aten.hardtanh.default,
    aten.hardshrink.default,
    aten.threshold.default,
    aten.celu.default,
    aten.clamp.default,
    aten.clamp_min.default,
    aten.clamp_max.default,
    *(aten.clamp.Tensor, aten.clamp_min.Tensor, aten.clamp_max.Tensor),
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.rsub.Tensor,
    aten.rsub.Scalar,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.div.Tensor_mode,
    aten.pow.Tensor_Scalar,
    aten.pow.Tensor_Tensor,
    aten.pow.Scalar,
    aten.maximum.default,
    *(aten.minimum.default, aten.fmax.default, aten.fmin.default, aten.hypot.default),
    aten.atan2.default,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.lerp.Scalar,
    aten.lerp.Tensor,
    aten.addcmul.default,
    aten.addcdiv.default,
    aten.logical_not.default,
    aten.logical_and.default,
    *(aten.logical_or.default, aten.logical_xor.default),
    aten.bitwise_not.default,
    aten.bitwise_and.Tensor,
    *(aten.bitwise_or.Tensor, aten.bitwise_xor.Tensor),
    *(aten.bitwise_and.Scalar, aten.bitwise_or.Scalar, aten.bitwise_xor.Scalar),
    *(aten.isnan.default, aten.isinf.default),
    aten.nan_to_num.default,
    *[
        getattr(getattr(aten, name), kind)
        for name in ("gt", "ge", "lt", "le", "eq", "ne")
        for kind in ("Scalar", "Tensor")
    ],
    *(aten.remainder.Scalar, aten.remainder.Tensor, aten.fmod.Scalar, aten.fmod.Tensor),
)


def pointwise(ctx: Context, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """An elementwise operator: operands meet at one delay and broadcast as frame tensors."""
    if target is aten.div.Tensor and isinstance(args[0], Value) and isinstance(args[1], Value):
        args = (args[0], counted(ctx, *args))
    values = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, Value)]
    axes = values[0].axes
    if len(values) > 1:
        values, timing = ctx.align(by_position(ctx, values))
        values, axes = ctx.broadcast(values)
    else:
        timing = values[0].clock
        if timing.delay < 0 and not timing.first and target not in KEEPS_ZERO:
            values = [ctx.settled(values[0])]
            timing = values[0].clock
    zero = target in KEEPS_ZERO and timing.fill == 0.0
    nonneg = target in _NONNEG_ALWAYS or (target in KEEPS_ZERO and target not in _TURNS and timing.nonneg)
    if target in (aten.add.Tensor, aten.mul.Tensor, aten.div.Tensor):
        nonneg = all(value.clock.nonneg for value in values if not value.constant) and all(
            not value.constant for value in values
        )
        nonneg = nonneg and kwargs.get("alpha", 1) >= 0
    timing = timing.but(nonneg=nonneg) if zero else timing.plain().but(nonneg=nonneg, first=timing.first)
    quotient = getattr(target, "overloadpacket", None) in _QUOTIENTS
    if target in _WILD or (quotient and isinstance(args[1], Value) and not args[1].constant):
        timing = timing.but(wild=True)
    operands = iter(values)
    args = tuple(next(operands) if isinstance(arg, Value) else arg for arg in args)
    kwargs = {key: next(operands) if isinstance(arg, Value) else arg for key, arg in kwargs.items()}
    dtype = ctx.node.meta["val"].dtype
    return ctx.call(_WRITTEN.get(target, target), args, axes, timing, dtype, **kwargs)


def fmax(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.maximum(x, y)))


def fmin(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.where(x.isnan(), y, torch.where(y.isnan(), x, torch.minimum(x, y)))


def hypot(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Without a square that leaves what floats can say."""
    x, y = x.abs(), y.abs()
    large, small = torch.maximum(x, y), torch.minimum(x, y)
    share = small / torch.where(large > 0, large, 1.0)
    return large * torch.sqrt(share * share + 1)


#: what ONNX has no operator for, written with those that it has
_WRITTEN: dict[Any, Callable[..., Any]] = {
    aten.fmax.default: fmax,
    aten.fmin.default: fmin,
    aten.hypot.default: hypot,
}


def _register(target: Any) -> None:
    @converter(target)
    def convert(ctx: Context, *args: Any, **kwargs: Any) -> Value:
        return pointwise(ctx, target, args, kwargs)


for _target in dict.fromkeys((*KEEPS_ZERO, *OTHER)):
    _register(_target)
    patient(_target)


@converter(aten.prelu.default, aten._prelu_kernel.default)
def prelu(ctx: Context, x: Value, weight: Value) -> Value:
    """A slope a channel, whose channel dimension is the second."""
    if weight.tensor is not None and weight.tensor.numel() > 1:
        shape = [1, -1, *[1] * (len(x.shape) - 2)]
        node = ctx.graph.call_function(torch.reshape, (weight.node, shape))
        weight = Value(
            node, plain([*weight.tensor.reshape(shape).shape]), None, weight.dtype, weight.tensor.reshape(shape)
        )
    low = pointwise(ctx, aten.clamp_max.default, (x, 0.0), {})
    high = pointwise(ctx, aten.relu.default, (x,), {})
    return pointwise(ctx, aten.add.Tensor, (high, pointwise(ctx, aten.mul.Tensor, (low, weight), {})), {})


@converter(aten.rrelu.default)
def rrelu(
    ctx: Context, x: Value, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, generator: Any = None
) -> Value:
    """Outside of training the mean of its slopes."""
    if training:
        raise Refused("a slope drawn at random", "put the network in eval mode")
    return pointwise(ctx, aten.leaky_relu.default, (x, (lower + upper) / 2), {})


@converter(
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.detach_.default,
)
def same(ctx: Context, x: Value, **_: Any) -> Value:
    return x


@converter(aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout, aten.to.device)
def to(ctx: Context, x: Value, *_: Any, **__: Any) -> Value:
    dtype = ctx.node.meta["val"].dtype
    if dtype == x.dtype:
        return x
    return ctx.call(torch.ops.aten.to.dtype, (x, dtype), x.axes, x.clock, dtype)


@converter(aten.copy.default)
def copy(ctx: Context, x: Value, source: Value, non_blocking: bool = False) -> Value:
    shape = x.shape
    if source.constant or source.shape != shape:
        return pointwise(ctx, aten.add.Tensor, (ctx.call(torch.zeros_like, (x,), x.axes, x.clock, x.dtype), source), {})
    return source


@converter(aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
def filled(ctx: Context, x: Value, *args: Any, **kwargs: Any) -> Value:
    """A constant of the shape of an activation: one number, whatever the frame."""
    value = {"aten.zeros_like": 0.0, "aten.ones_like": 1.0}.get(str(ctx.node.target).rpartition(".")[0])
    number = float(args[0]) if value is None else value
    tensor = torch.full(x.shape, number, dtype=ctx.node.meta["val"].dtype)
    return ctx.constant(tensor.flatten()[:1].reshape([1] * tensor.dim()).expand(x.shape), "filled")


@converter(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
def new_filled(ctx: Context, x: Value, size: list[int], *args: Any, **kwargs: Any) -> Value:
    name = str(ctx.node.target).split(".")[1]
    number = float(args[0]) if name == "new_full" else float(name == "new_ones")
    tensor = torch.full([1] * len(size), number, dtype=ctx.node.meta["val"].dtype)
    return ctx.constant(tensor.expand(size), "filled")


@converter(torch.ops.dissect.dropout.default)
def dropout(ctx: Context, x: Value, p: float, channels: bool) -> Value:
    """Identity in a stream; drops again when the clip form is trained."""
    if p <= 0:
        return x
    whole = channels and len(x.axes.frame) in (2, 3)
    kind = {2: torch.nn.Dropout1d, 3: torch.nn.Dropout2d}[len(x.axes.frame)] if whole else torch.nn.Dropout
    path = ctx.path if ctx.path and ctx.path not in ctx._installed else ctx.free("dropout")
    return ctx.module(path, kind(p), (x,), x.axes, x.clock, x.dtype)


patient(
    aten.clone.default,
    aten.detach.default,
    aten.alias.default,
    aten.contiguous.default,
    aten.lift_fresh_copy.default,
    aten.detach_.default,
    aten.to.dtype,
    aten.copy.default,
)

"""Who asks: of two dimensions with time, in what relates every frame to every other, which is that of the keys."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import fx

__all__ = ["key_of", "parsed"]

aten = torch.ops.aten
_CONVS: tuple[Any, ...] = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
#: what takes dimensions away, and which argument names them
_DROPS: dict[Any, int] = {
    **dict.fromkeys((aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.squeeze.dim, aten.squeeze.dims), 1),
    aten.linalg_vector_norm.default: 2,
}


def key_of(node: fx.Node, timed: Sequence[Hashable], out: Sequence[Hashable]) -> Hashable:
    """Which of two labels with time is that of the keys: what a softmax or a sum goes over next; the last, where none does."""
    gone = [label for label in timed if label not in out]
    if gone:
        return gone[0]
    order = list(out)
    spot = {order.index(label): label for label in timed}
    queue: list[tuple[fx.Node, tuple[int, ...]]] = [(node, tuple(range(len(order))))]
    for _ in range(64):
        if not queue:
            break
        source, dims = queue.pop(0)
        for user in source.users:
            over = reduced(user, source, len(dims))
            hit = [spot[dims[dim]] for dim in over if dims[dim] in spot]
            if hit:
                return hit[0]
            after = moved(user, source, dims)
            if after is not None:
                queue.append((user, after))
    return order[max(spot)]


def reduced(user: fx.Node, source: fx.Node, rank: int) -> list[int]:
    """The dimensions of ``source`` that ``user`` normalises or sums over."""
    args = user.args
    if user.target in (aten.softmax.int, aten.log_softmax.int, aten._softmax.default):
        return [int(args[1]) % rank]  # type: ignore[arg-type]
    if user.target in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default):
        return [int(dim) % rank for dim in args[1]]  # type: ignore[union-attr,arg-type]
    if user.target in (aten.matmul.default, aten.bmm.default):
        return [rank - 1] if args[0] is source else [rank - 2]
    if user.target is aten.einsum.default:
        labels, out = parsed(str(args[0]), [arg.meta["val"].dim() for arg in args[1]])  # type: ignore[union-attr]
        names = labels[list(args[1]).index(source)]  # type: ignore[arg-type]
        return [dim for dim, label in enumerate(names) if label not in out]
    return []


def moved(user: fx.Node, source: fx.Node, dims: tuple[int, ...]) -> tuple[int, ...] | None:
    """Where the dimensions are after an operator that keeps or permutes them."""
    val = user.meta.get("val")
    if user.op != "call_function" or not isinstance(val, torch.Tensor):
        return None
    if user.target is aten.transpose.int:
        order = list(dims)
        one, other = int(user.args[1]), int(user.args[2])  # type: ignore[arg-type]
        order[one], order[other] = order[other], order[one]
        return tuple(order)
    if user.target is aten.permute.default:
        return tuple(dims[dim] for dim in user.args[1])  # type: ignore[union-attr,index]
    shape = source.meta["val"].shape
    if user.target in _DROPS:
        given: Any = user.args[_DROPS[user.target]]
        gone = {int(dim) % len(dims) for dim in (given if isinstance(given, (list, tuple)) else [given])}
        return tuple(dim for at, dim in enumerate(dims) if at not in gone or len(val.shape) == len(dims))
    free = {aten.linear.default: len(shape) - 1}.get(user.target, 1 if user.target in _CONVS else None)  # type: ignore[call-overload]
    same = len(val.shape) == len(shape) and all(
        mine == its or dim == free for dim, (mine, its) in enumerate(zip(val.shape, shape, strict=True))
    )
    return dims if same else None


def parsed(equation: str, ranks: Sequence[int]) -> tuple[list[list[Hashable]], list[Hashable]]:
    """The labels of the operands and of the result; an ellipsis becomes numbers, counted from the right."""
    equation = equation.replace(" ", "")
    left, arrow, right = equation.partition("->")
    wide = 0
    labels: list[list[Hashable]] = []
    for term, rank in zip(left.split(","), ranks, strict=True):
        before, dots, after = term.partition("...")
        extra = rank - len(before) - len(after) if dots else 0
        wide = max(wide, extra)
        labels.append([*before, *range(-extra, 0), *after])
    if arrow:
        before, dots, after = right.partition("...")
        return labels, [*before, *(range(-wide, 0) if dots else ()), *after]
    flat = [label for names in labels for label in names]
    single = sorted(label for label in flat if isinstance(label, str) and flat.count(label) == 1)
    return labels, [*range(-wide, 0), *single]

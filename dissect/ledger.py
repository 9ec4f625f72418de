"""The axis ledger: which dimension of a tensor carries the batch, and which carries time.

Every dimension is an ordered product of named factors: the batch ``N``, time ``T``, a window ``K`` of the
last positions (the clip's time axis where one frame looks at all of it), or plain space ``S``. ``view``,
``flatten``, ``permute`` and ``squeeze`` only move factors, so time is found again after it was merged into the batch
(``(N*T, C, H, W)``) or into tokens (``(N, T*H*W, C)``).

A *frame tensor* is the same value without its ``N`` and ``T`` factors and with one leading
dimension that holds all rows: ``N*T`` of them in the clip form, ``N`` in the step form. The law:
a reshape of the clip is a reshape of the frame tensor, because no factor ever overtakes another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import gcd, prod
from typing import Literal

import torch
from torch import Tensor

from dissect.timing import Window

__all__ = [
    "Axes",
    "Axis",
    "Factor",
    "LedgerError",
    "alike",
    "alone",
    "apart",
    "bare",
    "broadcast",
    "join",
    "plain",
    "reshape",
    "split",
    "without",
]


class LedgerError(Exception):
    """A reshape or a broadcast through which axes of batch or time cannot be followed; what one could do."""

    def __init__(self, reason: str, fix: str = "reshape batch and time as whole axes") -> None:
        super().__init__(reason)
        self.fix = fix


@dataclass(frozen=True)
class Factor:
    """One factor of a dimension: ``kind`` is ``"N"``, ``"T"``, ``"K"`` or ``"S"``; ``size`` is the example's.

    ``window`` says which positions a ``K`` holds (see :mod:`dissect.windows`).
    """

    kind: Literal["N", "T", "K", "S"]
    size: int
    window: Window | None = None

    @property
    def inner(self) -> bool:
        """Part of a frame tensor."""
        return self.kind in "SK"


@dataclass(frozen=True)
class Axis:
    """One dimension of a tensor, an ordered product of factors; no factor at all means size 1."""

    factors: tuple[Factor, ...] = ()

    @property
    def size(self) -> int:
        return prod(factor.size for factor in self.factors)

    @property
    def kinds(self) -> str:
        return "".join(factor.kind for factor in self.factors)

    @property
    def plain(self) -> bool:
        """Neither batch nor time is in it."""
        return all(factor.kind == "S" for factor in self.factors)

    @property
    def dropped(self) -> bool:
        """Nothing but batch and time: a frame tensor does not have this dimension."""
        return bool(self.factors) and not any(factor.inner for factor in self.factors)

    @property
    def is_time(self) -> bool:
        return self.kinds == "T"

    @property
    def space(self) -> int:
        """The size left in a frame tensor."""
        return prod(factor.size for factor in self.factors if factor.inner)


@dataclass(frozen=True)
class Axes:
    """The ledger of one tensor: its dimensions in order."""

    dims: tuple[Axis, ...]

    def __len__(self) -> int:
        return len(self.dims)

    def __getitem__(self, dim: int) -> Axis:
        return self.dims[dim]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.dims)

    @property
    def kinds(self) -> str:
        return "".join(axis.kinds for axis in self.dims)

    @property
    def time(self) -> int | None:
        """The dimension that carries time, alone or merged; None where time has ended."""
        return next((dim for dim, axis in enumerate(self.dims) if "T" in axis.kinds), None)

    @property
    def rows(self) -> int | None:
        """The dimension that carries the batch, alone or merged."""
        return next((dim for dim, axis in enumerate(self.dims) if "N" in axis.kinds), None)

    @property
    def frame(self) -> tuple[int, ...]:
        """The shape of a frame tensor, without its leading dimension."""
        return tuple(axis.space for axis in self.dims if not axis.dropped)

    def kept(self, dim: int) -> int | None:
        """Where dimension ``dim`` stands in a frame tensor *without* its leading dimension."""
        if self.dims[dim].dropped:
            return None
        return sum(1 for axis in self.dims[:dim] if not axis.dropped)

    @property
    def window(self) -> int | None:
        """The dimension that carries a window of positions, alone or merged; None where there is none."""
        return next((dim for dim, axis in enumerate(self.dims) if "K" in axis.kinds), None)

    def windowed(self, change: Callable[[Window], Window]) -> Axes:
        """The same ledger with every window changed."""
        if self.window is None:
            return self
        return Axes(tuple(Axis(tuple(_changed(factor, change) for factor in axis.factors)) for axis in self.dims))

    def replace(self, dim: int, axis: Axis) -> Axes:
        return Axes((*self.dims[:dim], axis, *self.dims[dim + 1 :]))

    def sized(self, shape: Sequence[int]) -> Axes:
        """The same ledger after an operator that changed sizes in place (a convolution, a pool)."""
        dims = []
        for axis, size in zip(self.dims, shape, strict=True):
            if axis.plain:
                dims.append(plain_axis(size))
            elif axis.size == size:
                dims.append(axis)
            elif axis.is_time:
                dims.append(Axis((Factor("T", size),)))
            else:
                raise LedgerError(f"the operator resizes a dimension of {axis.kinds} from {axis.size} to {size}")
        return Axes(tuple(dims))


def _changed(factor: Factor, change: Callable[[Window], Window]) -> Factor:
    return factor if factor.window is None else replace(factor, window=change(factor.window))


def plain_axis(size: int) -> Axis:
    return Axis(() if size == 1 else (Factor("S", size),))


def plain(shape: Iterable[int]) -> Axes:
    """The ledger of a constant: space alone."""
    return Axes(tuple(plain_axis(size) for size in shape))


def reshape(axes: Axes, shape: Sequence[int]) -> Axes:
    """The ledger after ``view``/``reshape`` to ``shape``: factors are dealt out in order.

    A plain factor may be split over two dimensions; cutting through batch or time raises
    :class:`LedgerError`. A time factor of size 1 keeps a dimension of size 1 of its own where
    the new shape has one at its place, and ends otherwise.
    """
    same = 0  # dimensions in front that stay as they are: among several of size 1, it matters which is the batch
    if len(shape) >= len(axes):
        same = next((at for at, axis in enumerate(axes.dims) if axis.size != shape[at]), len(axes))
    dims: list[Axis] = [*axes.dims[:same]]
    queue = [factor for axis in axes.dims[same:] for factor in axis.factors if factor.size > 1 or factor.kind != "S"]
    for size in shape[same:]:
        taken: list[Factor] = []
        room = size
        if size == 1 and queue and queue[0].size == 1:
            taken.append(queue.pop(0))
        while room > 1:
            while queue and queue[0].size == 1:
                ended = queue.pop(0)
                if ended.kind == "N":
                    taken.append(ended)
            if not queue:
                raise LedgerError(f"({_sizes(axes, axes.shape)}) does not reshape to ({_sizes(axes, shape)})")
            head = queue.pop(0)
            while head.kind == "S" and room % head.size and queue and queue[0].kind == "S":
                head = Factor("S", head.size * queue.pop(0).size)  # plain neighbours may be dealt out anew
            if room % head.size == 0:
                taken.append(head)
                room //= head.size
                continue
            share = gcd(room, head.size)
            if head.kind != "S" or share != room:
                name = {"N": "the batch axis", "T": "the time axis", "K": "the time axis"}.get(head.kind, "an axis")
                cut = f"view({_sizes(axes, shape)}) cuts through {name} of size {head.size}"
                if head.kind == "T":
                    raise LedgerError(
                        f"{cut}: each piece begins anew and ends with a frame of its own, where a stream has no such places",
                        "let a window slide over time, or give the network one piece of that length at a time",
                    )
                raise LedgerError(cut)
            taken.append(Factor("S", share))
            queue.insert(0, Factor("S", head.size // share))
            room = 1
        dims.append(Axis(tuple(taken)))
    return Axes(tuple(dims))


def _sizes(axes: Axes, shape: Sequence[int]) -> str:
    """Sizes in words: N stands for the batch, which a capture sets to a number of its own."""
    batch = next((factor.size for axis in axes.dims for factor in axis.factors if factor.kind == "N"), 1)

    def said(size: int) -> str:
        many, rest = divmod(size, batch)
        return str(size) if batch == 1 or rest else "N" if many == 1 else f"N*{many}"

    return ", ".join(map(said, shape))


def _told(axis: Axis) -> str:
    """An axis in words."""
    names = {"N": "the batch", "T": "time", "S": "space or channels", "K": "a window of positions"}
    factors = [factor for factor in axis.factors if factor.size > 1 or len(axis.factors) == 1]
    told = (names[factor.kind] + ("" if factor.kind == "N" else f" ({factor.size})") for factor in factors)
    return f"a dimension of {' x '.join(told) or 'one entry'}"


def broadcast(ledgers: Sequence[Axes]) -> Axes:
    """The ledger of an elementwise operator's result; raises LedgerError where two axes disagree."""
    rank = max(len(axes) for axes in ledgers)
    dims: list[Axis] = []
    for dim in range(-rank, 0):
        present = [axes.dims[dim] for axes in ledgers if len(axes) >= -dim]
        wide = [axis for axis in present if axis.size > 1 or not axis.plain]
        first = max(wide, key=lambda axis: (axis.size, not axis.plain), default=Axis())
        for other in wide:
            if other.size > 1 and _woven(other) != _woven(first):
                raise LedgerError(
                    f"{_told(other)} meets {_told(first)}, and which entries of the one belong to which of the other is not known",
                    "broadcast positions (expand) where you repeat them, and keep time in a dimension of its own",
                )
        dims.append(first)
    return Axes(tuple(dims))


def _woven(axis: Axis) -> list[tuple[str, int]]:
    """The factors of an axis with neighbouring ones of space as one: axes that meet entry by entry have the same."""
    found: list[tuple[str, int]] = []
    for factor in axis.factors:
        if factor.kind == "S" and found and found[-1][0] == "S":
            found[-1] = ("S", found[-1][1] * factor.size)
        elif factor.kind != "S" or factor.size > 1:
            found.append((factor.kind, factor.size))
    return found


def aligned_shape(axes: Axes, out: Axes) -> tuple[int, ...]:
    """The frame shape of an operand, with ones where it broadcasts, so that it meets ``out``'s frame."""
    pad = len(out) - len(axes)
    shape = []
    for dim, axis in enumerate(out.dims):
        if axis.dropped:
            continue
        shape.append(1 if dim < pad or axes.dims[dim - pad].dropped else axes.dims[dim - pad].space)
    return tuple(shape)


def apart(axes: Axes) -> Axes:
    """The ledger with batch and time on axes of their own in front, where an axis merges time with others; else itself."""
    if axes.time is None or axes[axes.time].is_time or "K" in axes.kinds:
        return axes
    factors = [factor for axis in axes.dims for factor in axis.factors]
    front = [Axis((next(factor for factor in factors if factor.kind == kind),)) for kind in "NT"]
    return Axes((*front, *(plain_axis(size) for size in axes.frame)))


def alone(axes: Axes, dim: int) -> bool:
    """Whether a dimension is, or begins with, a batch of one: the network was captured for a single row."""
    return axes[dim].kinds[:1] == "N" and axes[dim].factors[0].size == 1


def without(axes: Axes, dim: int) -> Axes:
    """The ledger without a dimension of size 1; a batch of one goes to the dimension behind it."""
    rest = list(axes.dims[:dim] + axes.dims[dim + 1 :])
    if axes[dim].kinds == "N" and dim < len(rest):
        rest[dim] = Axis((*axes[dim].factors, *rest[dim].factors))
    return Axes(tuple(rest))


def bare(axes: Axes) -> Axes:
    """The ledger without dimensions of size 1 that would give a cache of its frames more than four dimensions."""
    spare = len(axes.frame) - 3
    dims = []
    for axis in axes.dims:
        spare -= (gone := spare > 0 and not axis.factors)
        dims += [] if gone else [axis]
    return Axes(tuple(dims))


def split(x: Tensor, time_dim: int | None, frames: int) -> Tensor:
    """A clip ``(N, ..., T, ...)`` as a frame tensor ``(N*T, ...)``; without a time axis, each row is repeated."""
    if time_dim is None:
        return x.repeat_interleave(frames, 0)
    x = x.movedim(time_dim, 1)
    return x.reshape(-1, *x.shape[2:])


def join(x: Tensor, axes: Axes, frames: int) -> Tensor:
    """A frame tensor ``(N*T, ...)`` in the original layout; an ended time axis comes back at dimension 2, or last."""
    parts = [factor for axis in axes.dims for factor in axis.factors]
    space = [factor.size for factor in parts if factor.inner]
    if x.numel() and prod(space) != prod(x.shape[1:]):  # other frame sizes than the example's
        if any(len(axis.factors) > 1 for axis in axes.dims):
            raise ValueError("a merged axis keeps the example's frame size")
        space = [
            x.shape[1 + kept]
            for dim, axis in enumerate(axes.dims)
            if axis.factors and (kept := axes.kept(dim)) is not None
        ]
    full = x.reshape(-1, frames, *space)
    order: list[int] = []
    shape: list[int] = []
    at = 2
    for axis in axes.dims:
        size = 1
        for factor in axis.factors:
            if factor.inner:
                order.append(at)
                at += 1
            else:
                order.append("NT".index(factor.kind))
            size *= full.shape[order[-1]]
        shape.append(size)
    if 0 not in order:
        raise ValueError("the batch axis is gone")
    if 1 not in order:
        dim = min(2, len(shape))
        order.insert(sum(len(axis.factors) for axis in axes.dims[:dim]), 1)
        shape.insert(dim, frames)
    return torch.permute(full, order).reshape(shape)


def split_frames(x: Tensor, axes: Axes) -> list[Tensor]:
    """The inverse of :func:`join`: an output of the clip form as frame tensors ``(N, ...)``, one a frame."""
    if axes.time is None:
        return [rows_first(frame, axes) for frame in x.unbind(min(2, len(axes)))]
    sizes: list[int] = []
    order: dict[str, int] = {}
    rest: list[int] = []
    for axis, length in zip(axes.dims, x.shape, strict=True):
        known = axis.space
        for factor in axis.factors:
            if factor.inner:
                rest.append(len(sizes))
                sizes.append(factor.size if len(axis.factors) > 1 else length)
                continue
            order[factor.kind] = len(sizes)
            others = [other for other in axis.factors if other.kind not in ("S", factor.kind)]
            if others:
                raise ValueError("batch and time are merged in the output; reshape it by hand")
            sizes.append(length // known)
        if not axis.factors:
            rest.append(len(sizes))
            sizes.append(length)
    full = x.reshape(sizes).permute(order["T"], order["N"], *rest)
    return [
        frame.reshape(frame.shape[0], *axes.frame) if frame.shape[1:].numel() == _numel(axes.frame) else frame
        for frame in full
    ]


def rows_first(x: Tensor, axes: Axes) -> Tensor:
    """An output without a time axis as a frame tensor: the batch, which may be anywhere, comes first."""
    rows = axes.rows
    if (
        rows is not None and axes[rows].kinds[:1] == "N" and axes[rows].space > 1
    ):  # of a network of one row, which has no dimension for it
        apart: Tensor = x.unflatten(rows, (-1, axes[rows].space)).movedim(rows, 0)
        return apart.reshape(-1, *axes.frame)
    if not rows or axes[rows].space > 1:
        return x
    return x.movedim(rows, 0).reshape(x.shape[rows], *axes.frame)


def _numel(shape: Sequence[int]) -> int:
    return prod(shape)


def alike(tensor: torch.Tensor, first: torch.Tensor) -> bool:
    """Whether every part of a tensor is the first, to rounding: a product's rows differ in the last bit for the same input."""
    tensor, first = tensor.detach(), first.detach()
    if torch.equal(tensor, first.expand_as(tensor)):
        return True
    if not tensor.is_floating_point() or not bool(first.isfinite().all()):
        return False
    near = 8 * torch.finfo(tensor.dtype).eps
    return torch.allclose(tensor, first.expand_as(tensor), near, near * float(first.abs().max()))

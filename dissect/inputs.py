"""Inputs: how a network's own inputs hold the frames of one stream.

A network may take its frames in many ways: as a clip with a time axis of its own, merged with the batch
(``(B*T, C, H, W)``) or with channels (``(B, T*C, H, W)``), as a list of frames, or at a rate of its own (every fourth
frame, for a slow pathway). The law: ``inputs.original(inputs.dense(args))`` are the ``args`` again. *Dense* is what the
chunk form takes: one tensor for each frame input of a step, with every frame of the stream on a time axis of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect import ledger
from dissect.errors import PlanError
from dissect.ledger import Axes, Axis, Factor, plain_axis

__all__ = ["Input", "Inputs", "parse"]

_TOKEN = re.compile(r"[()]|[A-Za-z_]\w*(?:=\d+)?|\S")
_NAME = re.compile(r"[A-Za-z_]\w*(=\d+)?")


@dataclass(frozen=True)
class Input:
    """One input of the network: a tensor, or a list of frames.

    axes      the ledger of the example (of a list: of its frames stacked, time first)
    rate      the stream's frames from one of its own to the next
    listed    a list with one tensor a frame
    group     the number of the step's frame that it takes its frames from
    scalar    a tensor without dimensions: in the step, one number a stream
    """

    axes: Axes
    dtype: torch.dtype
    device: torch.device
    rate: int = 1
    listed: bool = False
    group: int = 0
    scalar: bool = False

    @property
    def timed(self) -> bool:
        return self.axes.time is not None

    @property
    def frames(self) -> int:
        """The example's frames, between its own included."""
        return self.count * self.rate

    @property
    def count(self) -> int:
        """The example's own frames."""
        return next((factor.size for axis in self.axes.dims for factor in axis.factors if factor.kind == "T"), 1)

    @property
    def plain(self) -> bool:
        """Batch first, and time, if any, alone on an axis: dense as it is."""
        alone = all(axis.plain or axis.kinds in ("N", "T") for axis in self.axes.dims)
        return alone and not self.listed and not self.scalar and self.axes[0].kinds == "N"

    @property
    def inner(self) -> Axes:
        """The ledger of the tensor that the walk sees: a list of frames is one tensor there."""
        return self.axes if not self.listed else self.dense_axes

    @property
    def dense_axes(self) -> Axes:
        """The ledger of the dense tensor."""
        if self.plain:
            return self.axes
        batch = Axis((Factor("N", self.batch),))
        if self.scalar:
            return Axes((batch,))
        time = (Axis((Factor("T", self.count),)),) if self.timed else ()
        return Axes((batch, *time, *(plain_axis(size) for size in self.axes.frame)))

    @property
    def batch(self) -> int:
        return next((factor.size for axis in self.axes.dims for factor in axis.factors if factor.kind == "N"), 1)

    @property
    def time(self) -> int | None:
        """The dense tensor's dimension of time."""
        return self.dense_axes.time

    @property
    def frame(self) -> tuple[int, ...]:
        """The shape of its frame in a step, without the batch."""
        return self.dense_axes.frame

    def sized(self, batch: int) -> Input:
        """The same input for another batch."""
        dims = [
            Axis(tuple(replace(f, size=batch) if f.kind == "N" else f for f in axis.factors)) for axis in self.axes.dims
        ]
        return replace(self, axes=Axes(tuple(dims)))

    def dense(self, value: Any, frames: int | None) -> Tensor:
        """Its own tensors as one, time on an axis of its own; ``frames`` where batch and time are merged (else the example's)."""
        if self.listed:
            return torch.stack(tuple(value), 1)
        if self.scalar:
            return value.reshape(1)  # type: ignore[no-any-return]
        if self.plain or value.dim() != len(self.axes):
            return value  # type: ignore[no-any-return]
        sizes: list[int] = []
        order: dict[str, int] = {}
        space: list[int] = []
        for axis, length in zip(self.axes.dims, value.shape, strict=True):
            known = {"S": 0, "N": 0, "T": self.count if frames is None else frames}
            fixed = axis.space * (known["T"] if axis.kinds.count("N") and axis.kinds.count("T") else 1)
            for factor in axis.factors:
                if factor.kind == "S":
                    space.append(len(sizes))
                    sizes.append(factor.size if len(axis.factors) > 1 else length)
                    continue
                order[factor.kind] = len(sizes)
                sizes.append(known["T"] if factor.kind == "T" and "N" in axis.kinds else length // fixed)
            if not axis.factors:
                space.append(len(sizes))
                sizes.append(length)
        full = value.reshape(sizes).permute(order["N"], *([order["T"]] if "T" in order else []), *space)
        lead = full.shape[: 2 if self.timed else 1]
        return full.reshape(*lead, *self.frame)  # type: ignore[no-any-return]

    def original(self, dense: Tensor) -> Any:
        """The inverse of :meth:`dense`."""
        if self.listed:
            return list(dense.unbind(1))
        if self.scalar:
            return dense[0]
        if self.plain or not self.timed:
            return dense
        frames = dense.shape[1]
        return ledger.join(dense.flatten(0, 1), self.axes, frames)


@dataclass(frozen=True)
class Inputs:
    """All inputs of a network, in flat order; None stands for a Python value, which a graph holds as a constant."""

    units: tuple[Input | None, ...]
    spec: pytree.TreeSpec
    literals: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        args: tuple[Any, ...],
        time_dim: int | Sequence[int | None] = 2,
        layout: str | Sequence[str | None] | None = None,
        rates: Sequence[int] | None = None,
    ) -> Inputs:
        """The inputs of an example; raises PlanError where time, layout or rates do not fit it."""
        values, spec, layouts = _parted(args, layout)
        given = iter(time_dim if not isinstance(time_dim, int) else ())
        units: list[Input | None] = []
        for value, text in zip(values, layouts, strict=True):
            dim = time_dim if isinstance(time_dim, int) else next(given, None)
            if not isinstance(value, (Tensor, list, tuple)):
                units.append(None)
            elif layout is not None:
                units.append(_laid_out(value, text))
            else:
                units.append(_timed(value, dim))  # type: ignore[arg-type]
        timed = [unit for unit in units if unit is not None and unit.timed]
        if not timed:
            raise PlanError(
                f"layout {layout!r} names no time: call its dimension t, as in 'b c t h w'"
                if layout is not None
                else f"no input has a dimension {time_dim}: give a clip, for instance torch.randn(1, 3, 16, 112, 112), and its time_dim"
            )
        batches = {unit.batch for unit in units if unit is not None and not unit.scalar}
        if len(batches) > 1:
            raise PlanError(
                f"the inputs have batches of {' and '.join(map(str, sorted(batches)))}; give every input the same batch, batch first"
            )
        units = _grouped(_rated(units, rates))
        return cls(
            tuple(units),
            spec,
            tuple(None if unit is not None else value for unit, value in zip(units, values, strict=True)),
        )

    @property
    def tensors(self) -> tuple[Input, ...]:
        """The inputs that are tensors."""
        return tuple(unit for unit in self.units if unit is not None)

    @property
    def groups(self) -> tuple[Input, ...]:
        """One input for each frame of a step: of those that share a frame, the fastest."""
        fastest: dict[int, Input] = {}
        for unit in self.tensors:
            if unit.group not in fastest or unit.rate < fastest[unit.group].rate:
                fastest[unit.group] = unit
        return tuple(fastest[group] for group in sorted(fastest))

    @property
    def plain(self) -> bool:
        """The dense inputs are the network's own, in its own nesting."""
        return all(unit is not None and unit.plain for unit in self.units) and len(self.groups) == len(self.units)

    @property
    def given(self) -> int:
        """How many arguments the frames of a step are."""
        return self.spec.num_children if self.plain else len(self.groups)

    @property
    def frames(self) -> int:
        return max(unit.count for unit in self.tensors if unit.timed)

    @property
    def batch(self) -> int:
        return next(unit.batch for unit in self.tensors if unit.timed)

    def parted(self, args: Sequence[Any]) -> list[Any]:
        """The values of the units out of the network's own inputs; a list of frames may have any length."""
        leaves = pytree.tree_leaves(tuple(args))
        spare = len(leaves) - sum(1 for unit in self.units if unit is None or not unit.listed)
        lists = sum(1 for unit in self.units if unit is not None and unit.listed)
        values: list[Any] = []
        for unit in self.units:
            size = spare // lists if unit is not None and unit.listed else 1
            values.append(leaves[:size] if unit is not None and unit.listed else leaves[0])
            leaves = leaves[size:]
        return values

    def is_dense(self, args: Sequence[Any]) -> bool:
        """Whether ``args`` are dense inputs already."""
        leaves, groups = pytree.tree_leaves(tuple(args)), self.groups
        if len(leaves) != len(groups) or any(
            not isinstance(leaf, Tensor) or leaf.dim() != len(unit.dense_axes)
            for leaf, unit in zip(leaves, groups, strict=True)
        ):
            return False
        own = all(unit is not None and unit.plain for unit in self.units)
        return self.plain or len(groups) != len(self.tensors) or not own

    def streams(self, args: Sequence[Any], frames: int | None = None) -> list[Tensor]:
        """Every input as its frames at every frame of the stream, from the network's own inputs or dense ones.

        Between its own frames a slow input shows those of the input that it shares a frame with, or its last one again.
        """
        if self.is_dense(args):
            leaves = [leaf for leaf in pytree.tree_leaves(tuple(args)) if isinstance(leaf, Tensor)]
            found = [leaves[unit.group] for unit in self.tensors]
        else:
            values = [value for unit, value in zip(self.units, self.parted(args), strict=True) if unit is not None]
            found = [unit.dense(value, frames) for unit, value in zip(self.tensors, values, strict=True)]
        length = max(x.shape[unit.time] for unit, x in zip(self.tensors, found, strict=True) if unit.time is not None)
        rows = next(x.shape[0] for unit, x in zip(self.tensors, found, strict=True) if unit.time is not None)
        for index, unit in enumerate(self.tensors):
            x, dim = found[index], unit.time
            if unit.scalar and x.shape[0] != rows:
                found[index] = x.expand(rows)
            if dim is None or x.shape[dim] == length:
                continue
            mates = [
                y
                for other, y in zip(self.tensors, found, strict=True)
                if other.group == unit.group and other.time is not None and y.shape[other.time] == length
            ]
            if mates:
                own = torch.arange(0, length, unit.rate, device=x.device)[: x.shape[dim]]
                found[index] = mates[0].index_copy(dim, own, x)
            else:
                found[index] = x.repeat_interleave(unit.rate, dim).narrow(dim, 0, length)
        return found

    def dense(self, args: Sequence[Any], frames: int | None = None) -> tuple[Any, ...]:
        """What the chunk form takes: for a plain network its own inputs, else one tensor for each frame of a step."""
        found = self.streams(args, frames)
        return self.nested([found[self.tensors.index(unit)] for unit in self.groups])

    def nested(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """One value for each frame of a step, in the network's own nesting where that fits, else flat."""
        if not self.plain:
            return tuple(tensors)
        return pytree.tree_unflatten(list(tensors), self.spec)  # type: ignore[no-any-return]

    def original(self, dense: Sequence[Any]) -> tuple[Any, ...]:
        """The network's own inputs for a dense stream."""
        leaves = [leaf for leaf in pytree.tree_leaves(tuple(dense)) if isinstance(leaf, Tensor)]
        values: list[Any] = []
        for unit, literal in zip(self.units, self.literals, strict=True):
            if unit is None:
                values.append(literal)
                continue
            x = leaves[unit.group]
            if unit.rate > 1 and unit.time is not None:
                x = x.index_select(unit.time, torch.arange(0, x.shape[unit.time], unit.rate, device=x.device))
            values.append(unit.original(x))
        return pytree.tree_unflatten(values, self.spec)  # type: ignore[no-any-return]

    def rebatched(self, size: int) -> tuple[Any, ...]:
        """Inputs of zeros like the example with a batch of ``size``, for a capture, which reads no values."""
        values: list[Any] = []
        for unit, literal in zip(self.units, self.literals, strict=True):
            if unit is None:
                values.append(literal)
                continue
            shape = unit.sized(size).axes.shape
            zeros = torch.zeros(shape, dtype=unit.dtype, device=unit.device)
            values.append(list(zeros.unbind(0)) if unit.listed else zeros)
        return pytree.tree_unflatten(values, self.spec)  # type: ignore[no-any-return]


def parse(text: str, shape: Sequence[int]) -> Axes:
    """The ledger of ``shape`` by a layout such as ``b (t=8 c) h w``: ``b`` is the batch, ``t`` time, other names space.

    A dimension in parentheses is a product, its first factor the slowest; ``=8`` gives a factor's size. Raises PlanError.
    """
    dims: list[list[tuple[str, int | None]]] = []
    group: list[tuple[str, int | None]] | None = None
    for token in _TOKEN.findall(text):
        if token == "(" and group is None:
            group = []
        elif token == ")" and group is not None:
            dims.append(group)
            group = None
        elif _NAME.fullmatch(token):
            name, _, size = token.partition("=")
            factor = (name, int(size) if size else None)
            if group is None:
                dims.append([factor])
            else:
                group.append(factor)
        else:
            raise PlanError(
                f"layout {text!r} is not understood at {token!r}; write for instance 'b c t h w' or 'b (t=8 c) h w'"
            )
    names = [name for dim in dims for name, _ in dim]
    if group is not None or len(set(names)) != len(names):
        raise PlanError(
            f"layout {text!r} "
            + ("has a parenthesis that is not closed" if group is not None else "names a factor twice")
        )
    if "b" not in names:
        raise PlanError(f"layout {text!r} has no batch; name it b")
    if len(dims) != len(shape):
        raise PlanError(f"layout {text!r} has {len(dims)} dimensions, and the input has {len(shape)}: {tuple(shape)}")
    axes = []
    for dim, size in zip(dims, shape, strict=True):
        known = prod(given for _, given in dim if given is not None)
        free = [name for name, given in dim if given is None]
        if len(free) > 1:
            raise PlanError(
                f"layout {text!r}: the size of {' or '.join(free)} must be given, for instance ({free[0]}=8 {' '.join(free[1:])})"
            )
        if size % known or (not free and size != known):
            raise PlanError(f"layout {text!r}: a dimension of {size} is not a product with {known}")
        factors: list[Factor] = []
        for name, given in dim:
            kind = {"b": "N", "t": "T"}.get(name, "S")
            made = Factor(kind, given if given is not None else size // known)  # type: ignore[arg-type]
            if kind != "S" or made.size > 1:
                factors.append(made)
        axes.append(Axis(tuple(factors)))
    return Axes(tuple(axes))


def _parted(
    args: tuple[Any, ...], layout: str | Sequence[str | None] | None
) -> tuple[list[Any], pytree.TreeSpec, list[str | None]]:
    """The units of an example: its tensors, or whole lists where the layout says that time is the list."""
    queue = None if layout is None or isinstance(layout, str) else list(layout)
    values: list[Any] = []
    layouts: list[str | None] = []

    def visit(node: Any) -> None:
        text = layout if queue is None else queue[0] if queue else None
        frames = (
            isinstance(node, (list, tuple))
            and node is not args
            and bool(node)
            and all(isinstance(leaf, Tensor) for leaf in node)
        )
        children, spec = pytree.tree_flatten(node, is_leaf=lambda child: child is not node)
        if (frames and isinstance(text, str) and _is_listed(text)) or spec.is_leaf():
            values.append(node)
            layouts.append(text if isinstance(text, str) else None)
            if queue:
                queue.pop(0)
            return
        for child in children:
            visit(child)

    visit(args)
    if queue is not None and (queue or len(layout or ()) != len(values)):
        raise PlanError(
            f"{len(layout or ())} layouts were given for {len(values)} inputs; give one each, None for an input without time"
        )
    units = {id(value) for value in values}
    return values, pytree.tree_flatten(args, is_leaf=lambda node: id(node) in units)[1], layouts


def _is_listed(text: str) -> bool:
    return text.split()[:1] == ["t"]


def _laid_out(value: Any, text: str | None) -> Input:
    if isinstance(value, Tensor):
        if text is None or value.dim() == 0:
            return _timed(value, None)
        if _is_listed(text):
            raise PlanError(
                f"layout {text!r} has time first, which stands for a list of frames; a tensor has its batch first: "
                "wrap the network in one that calls it with x.transpose(0, 1)"
            )
        return Input(parse(text, value.shape), value.dtype, value.device)
    shapes = {tuple(frame.shape) for frame in value}
    if len(shapes) > 1:
        raise PlanError(f"the frames of the list differ in shape: {sorted(shapes)}")
    assert text is not None
    return Input(parse(text, (len(value), *shapes.pop())), value[0].dtype, value[0].device, listed=True)


def _timed(value: Tensor, dim: int | None) -> Input:
    dims = [plain_axis(int(size)) for size in value.shape]
    if value.dim() == 0:
        return Input(Axes(()), value.dtype, value.device, scalar=True)
    dims[0] = Axis((Factor("N", int(value.shape[0])),))
    if dim is not None and -value.dim() <= dim < value.dim():
        if dim % value.dim() == 0:
            raise PlanError(
                f"time_dim={dim} is the batch of an input of shape {tuple(value.shape)}; the batch comes first, time after it "
                "(for time merged with the batch give layout='(b t=8) c h w'; where time comes first, wrap the network in one "
                "that calls it with x.transpose(0, 1))"
            )
        dims[dim % value.dim()] = Axis((Factor("T", int(value.shape[dim])),))
    return Input(Axes(tuple(dims)), value.dtype, value.device)


def _rated(units: list[Input | None], rates: Sequence[int] | None) -> list[Input | None]:
    """The inputs with their rates: given, or found from the lengths of the example."""
    timed = [unit for unit in units if unit is not None and unit.timed]
    longest = max(unit.count for unit in timed)
    if rates is not None:
        if len(rates) != len(timed) or any(rate < 1 for rate in rates) or 1 not in rates:
            raise PlanError(
                f"rates={tuple(rates)} must be {len(timed)} whole numbers, one for each clip, 1 for the fastest: rates=(4, 1)"
            )
        found = list(rates)
    else:
        found = [max(1, round(longest / unit.count)) for unit in timed]
    for unit, rate in zip(timed, found, strict=True):
        if -(-longest // rate) != unit.count:
            raise PlanError(
                f"the inputs have {' and '.join(str(other.count) for other in timed)} frames, which is no whole rate; "
                "give lengths that divide each other"
            )
    given = iter(found)
    return [unit if unit is None or not unit.timed else replace(unit, rate=next(given)) for unit in units]


def _grouped(units: list[Input | None]) -> list[Input | None]:
    """Pathways of one video, whose frames look alike at rates that all differ, share one frame of a step."""
    keys = [
        None if unit is None else (unit.frame, unit.dtype) if unit.timed else index for index, unit in enumerate(units)
    ]
    groups: dict[Any, int] = {}
    done: list[Input | None] = []
    for index, (unit, key) in enumerate(zip(units, keys, strict=True)):
        if unit is None:
            done.append(None)
            continue
        rates = [other.rate for other, same in zip(units, keys, strict=True) if other is not None and same == key]
        mark = key if len(set(rates)) == len(rates) else (key, index)
        done.append(replace(unit, group=groups.setdefault(mark, len(groups))))
    return done

"""What a network writes along an axis where time meets others, in terms of frames.

``x[:, 3:6]`` of frames on channels is frame 1; ``torch.split(x, B)`` of frames behind each other in the batch are the
frames; a view of ``t`` as ``t // 2, 2`` is a stack of every second frame, and writes at every second frame are one, too.
Heads behind each other in the batch are a stack of them; the nearest of one frame more is the first frame twice.
Only what a walk has refused is reworded, and the law is: the graph computes what it computed before.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import fx

from dissect.capturing import Captured
from dissect.kernels import weighted
from dissect.ledger import Axes
from dissect.seams import unjoined
from dissect.unrolling import value_written
from dissect.unwrapping import derived
from dissect.values import Value

__all__ = ["reworded"]

aten = torch.ops.aten
_SPLITS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.tensor_split.sections)
_ADAPTIVE = {getattr(aten, f"adaptive_{kind}_pool{dims}d").default for kind in ("avg", "max") for dims in (1, 2, 3)}
_NEAREST = {
    getattr(getattr(aten, f"upsample_nearest{dims}d"), kind) for dims in (1, 2, 3) for kind in ("default", "vec")
}
_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.unflatten.int)


def reworded(captured: Captured, trace: Mapping[str, Value]) -> bool:
    """Say in terms of frames what ``captured`` says otherwise; whether there was anything. ``trace``: a walk's values."""
    changed = False
    for node in list(captured.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is operator.getitem:
            changed |= _part(node, trace)
        elif node.target is aten.slice.Tensor:
            changed |= _slice(node, trace)
        elif node.target in _VIEWS:
            changed |= _pieces(node, trace)
        elif node.target is aten.slice_scatter.default:
            changed |= _written_in_turn(node, trace)
        elif node.target in _NEAREST:
            changed |= _one_more(node, trace)
        elif node.target in _ADAPTIVE:
            changed |= _bins(node, trace)
        elif node.target is aten.cat.default:
            changed |= unjoined(node, trace) or _on_batch(node, trace)
        else:
            changed |= weighted(node, trace)
    if changed:
        captured.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
        captured.graph.lint()
    return changed


def _given(node: Any, trace: Mapping[str, Value]) -> Axes | None:
    """The ledger of a tensor that depends on the clip."""
    value = trace.get(node.name) if isinstance(node, fx.Node) else None
    return value.axes if value is not None and not value.constant else None


def _moving(node: Any, trace: Mapping[str, Value]) -> Axes | None:
    """The ledger of a tensor with a time axis."""
    axes = _given(node, trace)
    return axes if axes is not None and axes.time is not None else None


def _part(node: fx.Node, trace: Mapping[str, Value]) -> bool:
    """A part of a split."""
    split, index = node.args
    if not isinstance(split, fx.Node) or split.target not in _SPLITS:
        return False
    given: tuple[Any, ...] = (*split.args, 0)
    sizes: list[int] = [part.shape[given[2]] for part in split.meta["val"]]
    at: Any = index
    start = sum(sizes[:at])
    if _off_batch(node, given[0], given[2], int(start), sizes[at], trace):
        return True
    return _frames(node, given[0], given[2], start, start + sizes[at], trace)


def _on_batch(node: fx.Node, trace: Mapping[str, Value]) -> bool:
    """Parts of every row behind each other in the batch, as heads are: a stack of them, merged with it."""
    parts: Any = node.args[0]
    ledgers = [_given(part, trace) for part in parts]
    if (node.args[1] if len(node.args) > 1 else 0) != 0 or not all(
        axes and axes[0].kinds in ("N", "NT") for axes in ledgers
    ):
        return False
    if len({axes.shape for axes in ledgers if axes}) > 1:
        return False
    with node.graph.inserting_before(node):
        stack = derived(node, aten.stack.default, (parts, 0), "stack")
    _become(node, aten.reshape.default, (stack, [*node.meta["val"].shape]))
    return True


def _off_batch(node: fx.Node, source: Any, dim: Any, start: int, size: int, trace: Mapping[str, Value]) -> bool:
    """One of those parts again, as many rows as the batch has."""
    axes = _given(source, trace)
    if (
        axes is None
        or axes[dim % len(axes)].kinds not in ("SN", "SNT")
        or axes[dim % len(axes)].size != axes[dim % len(axes)].factors[0].size * size
        or start % size
    ):
        return False
    dim %= len(axes)
    shape = [*axes.shape]
    view = [*shape[:dim], shape[dim] // size, size, *shape[dim + 1 :]]
    with node.graph.inserting_before(node):
        apart = derived(node, aten.reshape.default, (source, view), "apart")
    _become(node, aten.select.int, (apart, dim, start // size))
    return True


def _slice(node: fx.Node, trace: Mapping[str, Value]) -> bool:
    given: tuple[Any, ...] = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    source, dim, start, stop, step = given
    first, last, _ = slice(start, stop).indices(source.meta["val"].shape[dim])
    return bool(step == 1) and _frames(node, source, dim, first, last, trace)


def _frames(node: fx.Node, source: Any, dim: Any, first: int, last: int, trace: Mapping[str, Value]) -> bool:
    """Entries of an axis that has time in front and others behind: whole frames, if they begin and end with one."""
    axes = _moving(source, trace)
    if axes is None:
        return False
    dim %= len(axes)
    axis = axes[dim]
    if axis.kinds[:1] != "T" or axis.is_time or axis.kinds.count("T") > 1:
        return False
    frames = axis.factors[0].size
    rest = axis.size // frames
    if frames < 2 or first % rest or last % rest or not first < last or (first, last) == (0, axis.size):
        return False
    shape = [*axes.shape]
    view = (source, [*shape[:dim], frames, rest, *shape[dim + 1 :]])
    apart = next((user for user in source.users if user.target is aten.reshape.default and user.args == view), None)
    with node.graph.inserting_after(source):
        apart = apart or derived(node, aten.reshape.default, view, "apart")
    with node.graph.inserting_before(node):
        if last - first == rest:
            _become(node, aten.select.int, (apart, dim, first // rest))
            return True
        part = derived(node, aten.slice.Tensor, (apart, dim, first // rest, last // rest), "frames")
        _become(node, aten.reshape.default, (part, [*shape[:dim], last - first, *shape[dim + 1 :]]))
    return True


def _pieces(node: fx.Node, trace: Mapping[str, Value]) -> bool:
    """A view that cuts time into pieces of a few frames: position ``i`` of the ``k``th of them is frame ``i * size + k``.

    The pieces are short, and more than a piece has frames: of few and long ones, the clip's length decides the frames.
    """
    source = node.args[0]
    axes = _moving(source, trace)
    if axes is None or axes.kinds.count("T") != 1 or node.name in trace:
        return False
    factors = [factor for axis in axes.dims for factor in axis.factors]
    dim = next(at for at, factor in enumerate(factors) if factor.kind == "T")
    frames = factors[dim].size
    inner = prod(factor.size for factor in factors[dim + 1 :])
    shape = [int(size) for size in node.meta["val"].shape]
    cuts = {prod(shape[at:]) for at in range(len(shape))}
    cuts = {cut for cut in cuts if inner < cut < inner * frames}
    size, left = divmod(cuts.pop(), inner) if len(cuts) == 1 else (0, 0)
    if left or size < 2 or frames % size or frames // size <= size:
        return False
    sizes = [factor.size for factor in factors]
    with node.graph.inserting_before(node):
        apart = source if sizes == [*axes.shape] else derived(node, aten.reshape.default, (source, sizes), "apart")
        windows = derived(node, aten.unfold.default, (apart, dim, size, size), "pieces")
        order = [*range(dim + 1), len(sizes), *range(dim + 1, len(sizes))]
        whole = derived(node, aten.permute.default, (windows, order), "pieces_in_order")
        _become(node, aten.reshape.default, (whole, shape))
    return True


def _written_in_turn(node: fx.Node, trace: Mapping[str, Value]) -> bool:
    """Writes at every ``k``th position, from 0 to ``k - 1``, so that nothing is left of what stood there."""
    given = _write(node)
    if given is None or any(_write(user) is not None and user.args[0] is node for user in node.users):
        return False
    _, dim, _, step = given
    parts: dict[int, fx.Node] = {}
    at: Any = node
    while isinstance(at, fx.Node) and (write := _write(at)) is not None and (write[1], write[3]) == (dim, step):
        parts.setdefault(write[2], write[0])
        at = at.args[0]
    if sorted(parts) != list(range(step)):
        return False
    shape = [int(size) for size in node.meta["val"].shape]
    wanted = [*shape[:dim], shape[dim] // step, *shape[dim + 1 :]]
    ledgers = [_moving(part, trace) for part in parts.values()]
    if shape[dim] % step or any(axes is None or not axes[dim].is_time for axes in ledgers):
        return False
    if any(
        [*part.meta["val"].shape] != wanted or part.meta["val"].dtype != node.meta["val"].dtype
        for part in parts.values()
    ):
        return False
    with node.graph.inserting_before(node):
        whole = derived(node, aten.stack.default, ([parts[at] for at in range(step)], dim + 1), "in_turn")
        _become(node, aten.reshape.default, (whole, shape))
    return True


def _bins(node: fx.Node, trace: Mapping[str, Value]) -> bool:
    """An adaptive pool over time whose bins are no pool with a stride, for they overlap: a mean, or a maximum, of each."""
    given: Any = node.args
    source, sizes = given[0], [int(size) for size in given[1]]
    axes = _moving(source, trace)
    results = [node] if isinstance(node.meta["val"], torch.Tensor) else [*node.users]
    if axes is None or any(result.name in trace for result in results):
        return False
    dim = next((dim for dim, axis in enumerate(axes.dims) if axis.is_time), -1)
    at = dim - (len(axes) - len(sizes))
    if dim < 0 or at < 0 or not axes[dim].size % sizes[at]:
        return False
    if results != [node] and any(user.args[1] != 0 for user in results):
        return False
    frames, wanted = axes[dim].size, sizes[at]
    pooled = aten.mean.dim if results == [node] else aten.amax.default
    with node.graph.inserting_before(node):
        inside = [*sizes[:at], frames, *sizes[at + 1 :]]
        y = source
        if inside != [*axes.shape[len(axes) - len(sizes) :]]:
            y = derived(node, node.target, (source, inside), "inside")
            y = y if results == [node] else derived(node, operator.getitem, (y, 0), "largest")
        bins = [(index * frames // wanted, -(-(index + 1) * frames // wanted)) for index in range(wanted)]
        parts = []
        for index, (start, stop) in enumerate(bins):
            part = derived(node, aten.slice.Tensor, (y, dim, start, stop), f"bin_{index}")
            part.meta["fixed"] = True  # the bins follow the length of the clip
            parts.append(derived(node, pooled, (part, [dim], True), f"pool_{index}"))
    for result in results:
        _become(result, aten.cat.default, (parts, dim))
    return True


def _one_more(node: fx.Node, trace: Mapping[str, Value]) -> bool:
    """The nearest of one frame more, or less: position ``i`` of ``n + 1`` is ``floor(i * n / (n + 1))``, the one before.

    So the first frame stands twice (or the last is cut off), whatever the length of the clip.
    """
    given: tuple[Any, ...] = node.args
    source, wanted = given[0], [int(size) for size in node.meta["val"].shape]
    axes = _moving(source, trace)
    dim = axes.time if axes is not None else None
    if axes is None or dim is None or dim < 2 or node.name in trace or not axes[dim].is_time:
        return False
    shape = [*axes.shape]
    if abs(wanted[dim] - shape[dim]) != 1:
        return False
    with node.graph.inserting_before(node):
        inside = [*wanted[2:dim], shape[dim], *wanted[dim + 1 :]]
        if inside != shape[2:]:
            where = (inside, None) if "vec" in str(node.target) else (inside,)
            source = derived(node, node.target, (source, *where), "inside")
        if wanted[dim] < shape[dim]:
            _become(node, aten.slice.Tensor, (source, dim, 0, -1))
            return True
        first = derived(node, aten.slice.Tensor, (source, dim, 0, 1), "first")
        _become(node, aten.cat.default, ([first, source], dim))
    return True


def _write(node: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """What is written with gaps, along which dimension, from where, at every how many positions."""
    if node.target is not aten.slice_scatter.default:
        return None
    given: tuple[Any, ...] = (*node.args, *(0, None, None, 1)[len(node.args) - 2 :])
    _, source, along, start, _, step = given
    dim = along % node.meta["val"].dim()
    first = slice(start, None).indices(node.meta["val"].shape[dim])[0]
    return (value_written(source), dim, first, step) if isinstance(source, fx.Node) and step > 1 else None


def _become(node: fx.Node, target: Any, args: Sequence[Any]) -> None:
    """The same value, said otherwise."""
    node.target, node.args, node.kwargs = target, tuple(args), {}

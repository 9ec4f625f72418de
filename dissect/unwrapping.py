"""Rolls that nobody sees wrap around: what is rolled in at one end is cut off, or written over, at once.

``torch.roll(x, 1, 1)[:, 1:]`` is ``x[:, :-1]``, and a roll whose first frame is written over is a concatenation: both
are shifts, which a stream can do, where a roll puts the clip's last frame in front of its first. The law: the graph
computes what it computed before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dissect.capturing import Captured

__all__ = ["derived", "unwrapped"]

aten = torch.ops.aten


def unwrapped(captured: Captured) -> Captured:
    """The graph with such rolls as slices and concatenations; ``captured`` changes, and keeps the names of its nodes."""
    for node in list(captured.graph.nodes):
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and source.target is aten.roll.default:
            if node.target in (aten.slice.Tensor, aten.select.int):
                _slice(node, source)
            elif node.target in (aten.slice_scatter.default, aten.select_scatter.default):
                _written(node, source)
            if not source.users:
                captured.graph.erase_node(source)
    return captured


def _parts(roll: fx.Node) -> tuple[fx.Node, int, int, int] | None:
    """What is rolled, along which dimension, by how much, of how many."""
    given: tuple[Any, ...] = (*roll.args, ())
    x, shifts, dims = given[:3]
    shift, dim = (list(value) if isinstance(value, (list, tuple)) else [value] for value in (shifts, dims))
    if not isinstance(x, fx.Node) or len(shift) != 1 or len(dim) != 1:
        return None
    shape = x.meta["val"].shape
    at = int(dim[0]) % len(shape)
    return x, at, int(shift[0]) % int(shape[at]), int(shape[at])


def _slice(node: fx.Node, roll: fx.Node) -> None:
    """A slice, or one entry, of a roll that does not hold both of its ends."""
    parts = _parts(roll)
    if parts is None:
        return
    x, dim, shift, size = parts
    given: tuple[Any, ...] = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
    along, start, stop, step = given[:4]
    if int(along) % len(x.meta["val"].shape) != dim:
        return
    if node.target is aten.select.int:
        node.args = (x, dim, (int(start) - shift) % size)
        return
    first, last, _ = slice(start, stop).indices(size)
    moved = -shift if first >= shift else size - shift if last <= shift else None
    if step == 1 and first < last and moved is not None:
        node.args = (x, dim, first + moved, last + moved, 1)


def _written(node: fx.Node, roll: fx.Node) -> None:
    """A write over all that a roll brings in at one end."""
    parts = _parts(roll)
    if parts is None:
        return
    x, dim, shift, size = parts
    held: tuple[Any, ...] = node.args
    _, given, along, *span = held
    if not isinstance(given, fx.Node) or int(along) % len(x.meta["val"].shape) != dim:
        return
    if node.target is aten.select_scatter.default:
        first = int(span[0]) % size
        last = first + 1
    else:
        bounds: tuple[Any, ...] = (*span, *(None, None, 1)[len(span) :])
        start, stop, step = bounds
        first, last, _ = slice(start, stop).indices(size)
        if step != 1:
            return
    if (first, last) not in ((0, shift), (shift, size)):
        return
    with node.graph.inserting_before(node):
        if node.target is aten.select_scatter.default:
            given = derived(node, aten.unsqueeze.default, (given, dim), "unrolled")
        rest = (0, size - shift) if first == 0 else (size - shift, size)
        kept = derived(node, aten.slice.Tensor, (x, dim, *rest, 1), "unrolled")
    node.target = aten.cat.default
    node.args = ([given, kept] if first == 0 else [kept, given], dim)


def derived(node: fx.Node, target: Any, args: tuple[Any, ...], suffix: str) -> fx.Node:
    """A new operator of a captured graph that helps to say what ``node`` says, at the same place of the user's code."""
    made = node.graph.create_node("call_function", target, args, name=f"{node.name}_{suffix}")
    made.meta = {**node.meta, "val": target(*fx.node.map_arg(args, lambda arg: arg.meta["val"]))}
    return made

"""Results that a loop writes into a tensor one by one, or joins to those before, as one stack or concatenation.

``out = torch.zeros(B, T, C); for t in range(T): out[:, t] = f(x[:, t])`` is captured as a chain of writes, each of which
holds all of ``out``; what is read from it on the way is what was written there. The law: the graph computes what it
computed before. A tensor that depends on the clip, and is written over, is left as it is: it has frames of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dissect.capturing import Captured
from dissect.carrying import FILLED
from dissect.copies import shape_of
from dissect.unrolling import value_written

__all__ = ["collected"]

aten = torch.ops.aten


def collected(captured: Captured) -> Captured:
    """The graph with such chains as one operator; ``captured`` changes, and keeps the names of its nodes."""
    fixed = {node for node in captured.graph.nodes if node.op == "placeholder" and node.name in captured.tensors}
    for node in list(captured.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in FILLED or fixed.issuperset(node.all_input_nodes):
            fixed.add(node)
        elif node.target is aten.select.int:
            _read(node, fixed)
        elif node.target is aten.select_scatter.default:
            _written(node, fixed)
        elif node.target is aten.cat.default:
            _grown(node)
    captured.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return captured


def _chain(node: Any, dim: int) -> tuple[dict[int, fx.Node], Any]:
    """What a chain of writes has written along a dimension, by index, and the tensor below."""
    found: dict[int, fx.Node] = {}
    while isinstance(node, fx.Node) and node.target is aten.select_scatter.default:
        base, value, along, index = _operands(node)
        shape = node.meta["val"].shape
        if along % len(shape) != dim:
            break
        found.setdefault(index % shape[dim], value_written(value))
        node = base
    return found, node


def _operands(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _read(node: fx.Node, fixed: set[fx.Node]) -> None:
    """A frame of a tensor that was written before is what was written."""
    source, along, index = _operands(node)
    if not isinstance(source, fx.Node) or source.target is not aten.select_scatter.default:
        return
    shape = source.meta["val"].shape
    dim = along % len(shape)
    found, base = _chain(source, dim)
    at = index % shape[dim]
    if base not in fixed:
        return
    if at not in found:
        node.args = (base, dim, at)
    elif shape_of(found[at]) == shape_of(node):
        node.replace_all_uses_with(found[at])


def _written(node: fx.Node, fixed: set[fx.Node]) -> None:
    """A tensor all of which has been written."""
    if any(user.target is node.target and user.args[0] is node for user in node.users):
        return
    shape = node.meta["val"].shape
    dim = _operands(node)[2] % len(shape)
    found, base = _chain(node, dim)
    frames = [found[at] for at in sorted(found)]
    rest = (*shape[:dim], *shape[dim + 1 :])
    if (
        base in fixed
        and len(frames) == shape[dim]
        and all(shape_of(at) == (rest, node.meta["val"].dtype) for at in frames)
    ):
        node.target, node.args = aten.stack.default, (frames, dim)


def _grown(node: fx.Node) -> None:
    """Frames joined to those before, one by one, are joined at once."""
    if any(user.target is node.target and user.args[0][0] is node for user in node.users):  # type: ignore[index]
        return
    dims = node.meta["val"].dim()
    dim = _along(node) % dims
    later: list[fx.Node] = []
    at = node
    while True:
        first, *others = _operands(at)[0]
        later = [*others, *later]
        if first.target is not node.target or len(first.users) > 1 or _along(first) % dims != dim:
            break
        at = first
    parts = [first, *later]
    if at is not node and len({shape_of(part) for part in parts}) == 1 and parts[0].meta["val"].shape[dim] == 1:
        node.args = (parts, dim)


def _along(node: fx.Node) -> int:
    return int(_operands(node)[1]) if len(node.args) > 1 else 0

"""Copies made as late as they can be: a layer on a repeated value is the layer on the value, repeated.

``self.w(h.unsqueeze(1).repeat(1, T, 1))`` asks a layer the same T times over. Behind it, what repeats is an operand that
broadcasts, which costs nothing, and a value of the whole clip (the last state, a mean) is one until it meets the frames.
And rows that are picked of a value which says the same in each (``x[:B, 0]`` of a batch of frames that all begin with the
class token, in TimeSformer) are that value. The law: the graph computes what it computed before.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from dissect.capturing import Captured
from dissect.unwrapping import derived

__all__ = ["sunk", "widened"]

aten = torch.ops.aten
_EXPANDS = (aten.expand.default, aten.expand_copy.default)
_REPEATS = (aten.repeat.default, aten.tile.default)
_UNARY = {
    *(aten.relu.default, aten.relu6.default, aten.leaky_relu.default, aten.elu.default, aten.gelu.default),
    *(aten.tanh.default, aten.sigmoid.default, aten.silu.default, aten.softplus.default, aten.hardtanh.default),
    *(aten.neg.default, aten.exp.default, aten.clone.default, aten.alias.default, aten.detach.default),
    torch.ops.dissect.dropout.default,
}
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
_TURNS = (aten.permute.default, aten.transpose.int)


def widened(node: fx.Node) -> bool:
    """Whether an operator does nothing but repeat dimensions of one entry."""
    if node.target in _EXPANDS:
        return True
    if node.target not in _REPEATS:
        return False
    source, times = node.args[:2]
    sizes: Any = reversed(source.meta["val"].shape)  # type: ignore[union-attr]
    return all(1 in pair for pair in zip(sizes, reversed(times), strict=False))  # type: ignore[arg-type]


def sunk(captured: Captured) -> Captured:
    """The graph with such copies behind the layers; ``captured`` changes, and keeps the names of its nodes."""
    for node in list(captured.graph.nodes):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or node.op != "call_function" or not widened(source):
            continue
        if _entrywise(node, source):
            value: Any = source.args[0]
            rest = node.args[1:]
            with captured.graph.inserting_before(node):
                missing = len(source.meta["val"].shape) - len(value.meta["val"].shape)
                if node.target in _TURNS and missing:
                    shape = [*[1] * missing, *value.meta["val"].shape]
                    value = derived(node, aten.reshape.default, (value, shape), "apart")
                made = derived(node, node.target, (value, *rest), "once")
            made.kwargs = dict(node.kwargs)
            node.target, node.args, node.kwargs = aten.expand.default, (made, [*node.meta["val"].shape]), {}
            if not source.users:
                captured.graph.erase_node(source)
    for node in list(captured.graph.nodes):
        if node.target is aten.select.int and _sliced(node.args[0]):
            _picked(node)
    return captured


def _sliced(node: Any) -> bool:
    """Whether it picks rows."""
    return isinstance(node, fx.Node) and node.target is aten.slice.Tensor and node.args[1:2] == (0,)


def _picked(node: fx.Node) -> None:
    """An entry of some rows; where it is the same in every row, of one."""
    rows, dim, index = node.args
    assert isinstance(rows, fx.Node)
    shape = rows.meta["val"].shape
    dim, index = int(dim) % len(shape), int(index)  # type: ignore[arg-type]
    if dim == 0:
        return
    source: Any = rows.args[0]
    before = node.prev
    with node.graph.inserting_before(node):
        entry = _entry(node, source, dim, index % int(shape[dim]))
    if entry is not None:
        node.target, node.args = aten.expand.default, (entry, [*node.meta["val"].shape])
        if not rows.users:
            node.graph.erase_node(rows)
        return
    while node.prev is not before:  # the one operand of a sum that is alike
        node.graph.erase_node(node.prev)


def _entry(node: fx.Node, source: Any, dim: int, index: int) -> fx.Node | None:
    """The entry ``index`` of dimension ``dim`` of a value, with one row; None where its rows need not be alike."""
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    if value.shape[0] == 1:
        at = index if value.shape[dim] > 1 else 0
        return derived(node, aten.select.int, (source, dim, at), "entry")
    if widened(source) and len(source.args[0].meta["val"].shape) == value.dim():
        return _entry(node, source.args[0], dim, index)
    if source.target in _UNARY:
        operand = _entry(node, source.args[0], dim, index)
        if operand is None:
            return None
        made = derived(node, source.target, (operand, *source.args[1:]), "alike")
        made.kwargs = dict(source.kwargs)
        return made
    if source.target is aten.cat.default and int((*source.args, 0)[1]) % value.dim() == dim:
        for part in source.args[0]:
            size = int(part.meta["val"].shape[dim])
            if index < size:
                return _entry(node, part, dim, index)
            index -= size
    if source.target in _SUMS and all(isinstance(arg, fx.Node) for arg in source.args) and not source.kwargs:
        if any(arg.meta["val"].dim() != value.dim() for arg in source.args):
            return None
        operands = [_entry(node, arg, dim, index) for arg in source.args]
        return derived(node, source.target, tuple(operands), "alike") if None not in operands else None
    return None


def _entrywise(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operator treats the copies of a value alike, and nothing else."""
    if node.target is aten.linear.default:
        before, after = source.args[0].meta["val"].shape, source.meta["val"].shape  # type: ignore[union-attr]
        return bool(before) and before[-1] == after[-1] and source not in node.args[1:]
    return (node.target in _UNARY or node.target in _TURNS) and node.all_input_nodes == [source]

"""A graph of a capture as it would be for any example: one node a view, and names that follow from the graph alone.

How often a capture makes a view, and what it calls its nodes, follows from the example: with a batch of one more
reshapes are views, and behind a layer that writes in place (``nn.ReLU(True)``) every view is made anew for each that
reads it. Captures of two examples are compared by the names of their nodes.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from dissect.copies import said

__all__ = ["names", "renamed", "viewed_once"]

aten = torch.ops.aten


def viewed_once(graph: fx.Graph) -> None:
    """One node for each view of a tensor, in place; frames are left: each copy of a loop takes its own."""
    known: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_view(node):
            continue
        first = known.setdefault(said(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _is_view(node: fx.Node) -> bool:
    """A view that is no single frame."""
    if node.target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and _is_view(source) and source.target is not aten.unbind.int
    if not isinstance(node.target, torch._ops.OpOverload) or node.target is aten.select.int:
        return False
    if node.target is aten.slice.Tensor and node.meta["val"].shape[node.args[1] if len(node.args) > 1 else 0] == 1:
        return False
    aliases = [argument.alias_info for argument in node.target._schema.arguments]
    return any(alias is not None and not alias.is_write for alias in aliases)


def names(graph: fx.Graph) -> dict[fx.Node, str]:
    """The names of a graph's nodes: its inputs keep theirs, an operator is called after itself and counted."""
    given = {node: node.name for node in graph.nodes if node.op != "call_function"}
    taken, counts = set(given.values()), dict.fromkeys(given.values(), 0)
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        stem = getattr(getattr(node.target, "overloadpacket", node.target), "__name__", "node").lower()
        name = stem
        while name in taken:
            counts[stem] = counts.get(stem, 0) + 1
            name = f"{stem}_{counts[stem]}"
        taken.add(name)
        given[node] = name
    return given


def renamed(graph: fx.Graph) -> fx.Graph:
    """A copy of the graph with these names."""
    called, made = names(graph), fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.__getitem__)
        env[node] = made.create_node(node.op, node.target, args, kwargs, called[node], node.type)
        env[node].name = called[node]  # a name that is a builtin's, as `input` is, would be changed
        env[node].meta = dict(node.meta)
    return made

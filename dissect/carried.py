"""A loop that carries values, written as a recurrence: what is before it, its body, and what is after.

See :mod:`dissect.carrying`, which finds such loops. The law: the graph computes what it computed before.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect.capturing import Captured
from dissect.carrying import Carrying
from dissect.unrolling import frame_in, frame_of, frames_to

__all__ = ["carried", "carry", "last_frame"]

aten = torch.ops.aten


def carry(inputs: Sequence[Tensor], first: Sequence[Tensor], shared: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Marks a recurrence; its body is in the node's ``meta``. Results: of every frame, then the carried values after it."""
    raise NotImplementedError


def last_frame(x: Tensor) -> Tensor:
    """Marks the result of the last frame of a loop."""
    return x


def carried(captured: Captured, loop: Carrying) -> Captured:
    """The graph with a :func:`carry` in place of a loop; ``captured`` changes."""
    _Writer(captured, loop).write()
    captured.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    captured.graph.lint()
    return captured


class _Writer:
    """Writes a loop as its parts: what is before the recurrence, its body, and what is after."""

    def __init__(self, captured: Captured, loop: Carrying) -> None:
        self.graph = captured.graph
        self.loop = loop
        self.nodes = list(loop.copies[1])
        self.before = {node: at for at, node in enumerate(loop.copies[0])}
        self.at = {node: at for at, node in enumerate(self.nodes)}
        self.clones: dict[Any, fx.Node] = {}

    def slot(self, node: fx.Node) -> int | None:
        """Which carried value the second copy reads in a node of the first."""
        if node in self.before:
            where: Any = ("node", self.before[node])
        else:
            frame = frame_in(node)
            if frame is None or frame.index != 0 or (frame.source, frame.dim) not in self.loop.sources:
                return None
            where = ("frame", frame.source, frame.dim, frame.keepdim)
        return next((at for at, slot in enumerate(self.loop.slots) if slot.place == where), None)

    def regions(self) -> tuple[set[int], set[int]]:
        """The places of the body, and of all that depends on carried values."""
        reads: list[list[int]] = []
        dependent: set[int] = set()
        body: set[int] = set()
        for at, node in enumerate(self.nodes):
            args = [] if node is None else node.all_input_nodes
            reads.append([self.at[arg] for arg in args if arg in self.at])
            if any(arg not in self.at and self.slot(arg) is not None for arg in args):
                body.add(at)
            if at in body or dependent & set(reads[at]):
                dependent.add(at)
        feeding: set[int] = set()
        queue = [slot.place[1] for slot in self.loop.slots if slot.place[0] == "node"]
        while queue:
            at = queue.pop()
            if at not in feeding:
                feeding.add(at)
                queue.extend(reads[at])
        body |= dependent & feeding
        for at, node in enumerate(self.nodes):  # the results of an operator with several stay with it
            if node is not None and node.target is operator.getitem and body & set(reads[at]):
                body.add(at)
        return body, dependent

    def write(self) -> None:
        body, dependent = self.regions()
        ends = [user for user, _ in self.loop.ends]
        lasts = [self.loop.copies[-1][at] for at in self.loop.last]
        inside = {node for nodes in self.loop.copies for node in nodes}
        after = [user for node in lasts if node is not None for user in node.users if user not in inside]
        order = {node: at for at, node in enumerate(self.graph.nodes)}
        spot = min((*ends, *after), key=lambda node: order[node])
        with self.graph.inserting_before(spot):
            for at, node in enumerate(self.nodes):
                if at not in dependent and node is not None:
                    self.clones[at] = self.clone(node, self.outer)
            self.write_body(body, {at for _, at in self.loop.ends} | set(self.loop.last))
            for at, node in enumerate(self.nodes):
                if at in dependent and at not in body and node is not None:
                    self.clones[at] = self.clone(node, self.outer)
            for user, at in self.loop.ends:
                self.finish(user, at)
            for at in self.loop.last:
                last = self.loop.copies[-1][at]
                assert last is not None
                result = self.graph.create_node(
                    "call_function", last_frame, (self.clones[at],), name=f"last_{last.name}"
                )
                result.meta = dict(last.meta)
                for user in [user for user in last.users if user not in inside and user not in ends]:
                    user.replace_input_with(last, result)

    def finish(self, user: fx.Node, at: int) -> None:
        """All results of a place, put together as the original puts them."""
        rank = user.meta["val"].dim()
        dim = int(user.args[1]) % rank if len(user.args) > 1 else 0  # type: ignore[arg-type]
        args = (self.clones[at], dim, len(self.loop.copies), user.target is aten.stack.default)
        result = self.graph.create_node("call_function", frames_to, args, name=f"rolled_{user.name}")
        result.meta = dict(user.meta)
        name = user.name
        user.replace_all_uses_with(result)
        self.graph.erase_node(user)
        result.name = name

    def clone(self, node: fx.Node, read: Any, graph: fx.Graph | None = None) -> fx.Node:
        leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
        args, kwargs = pytree.tree_unflatten(
            [read(leaf) if isinstance(leaf, fx.Node) else leaf for leaf in leaves], spec
        )
        made = (graph or self.graph).create_node("call_function", node.target, args, kwargs, name=f"rolled_{node.name}")
        made.meta = dict(node.meta)
        return made

    def outer(self, node: fx.Node) -> fx.Node:
        """What a node of the second copy is outside the body."""
        if node in self.at:
            return self.clones[self.at[node]]
        frame = frame_in(node)
        if frame is None or (frame.source, frame.dim) not in self.loop.sources:
            return node
        key = (frame.source, frame.dim, frame.keepdim)
        if key not in self.clones:
            marked = self.graph.create_node("call_function", frame_of, key, name=f"rolled_{node.name}")
            marked.meta = dict(node.meta)
            self.clones[key] = marked
        return self.clones[key]

    def write_body(self, body: set[int], read_outside: set[int]) -> None:
        """The carry node and, in its ``meta``, its body: a graph of inputs, carried values and shared values."""
        graph = fx.Graph()
        given: dict[str, dict[fx.Node, fx.Node]] = {"input": {}, "shared": {}}
        states = []
        for index, slot in enumerate(self.loop.slots):
            state = graph.placeholder(f"carried_{index}")
            state.meta = dict(slot.first.meta)
            states.append(state)
        inner: dict[int, fx.Node] = {}

        def hand(node: fx.Node, kind: str) -> fx.Node:
            if node not in given[kind]:
                held = graph.create_node("placeholder", f"{kind}_{len(given[kind])}")
                held.meta = dict(node.meta)
                given[kind][node] = held
            return given[kind][node]

        def read(node: fx.Node) -> fx.Node:
            if node in self.at:
                at = self.at[node]
                return inner[at] if at in inner else hand(self.outer(node), "input")
            index = self.slot(node)
            if index is not None:
                return states[index]
            outer = self.outer(node)
            return hand(outer, "input" if outer.target is frame_of else "shared")

        for at, node in enumerate(self.nodes):
            if at in body and node is not None:
                inner[at] = self.clone(node, read, graph)
        new = []
        for slot in self.loop.slots:
            kind, *rest = slot.place
            node = self.nodes[rest[0]] if kind == "node" else None
            if node is not None:
                new.append(read(node))
            else:
                source, dim, keepdim = rest
                frame = next(
                    n for n in source.users if (f := frame_in(n)) and (f.dim, f.index, f.keepdim) == (dim, 1, keepdim)
                )
                new.append(hand(self.outer(frame), "input"))
        wanted = [
            at
            for at in sorted(body)
            if at in read_outside or any(self.at.get(user, at) not in body for user in self.nodes[at].users)  # type: ignore[union-attr]
        ]
        graph.output(([inner[at] for at in wanted], new))
        first = [slot.first for slot in self.loop.slots]
        node = self.graph.create_node("call_function", carry, (list(given["input"]), first, list(given["shared"])))
        node.meta = dict(next(iter(node for node in self.nodes if node is not None)).meta)
        node.meta.update({"val": None, "body": graph, "given": given})
        for index, at in enumerate(wanted):
            part = self.graph.call_function(operator.getitem, (node, index))
            part.meta = dict(self.nodes[at].meta)  # type: ignore[union-attr]
            self.clones[at] = part

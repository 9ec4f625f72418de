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
from dissect.carrying import FILLED, Carrying, End, filled, number_in
from dissect.copies import operands, said
from dissect.unrolling import frame_in, frame_of, instead, together

__all__ = ["begin", "carried", "carry", "last_frame", "later"]

aten = torch.ops.aten
FAR = 64.0  # a cache that holds the difference to that loses six bits


def carry(inputs: Sequence[Tensor], first: Sequence[Tensor], shared: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Marks a recurrence; its body is in the node's ``meta``. Results: of every frame, then the carried values after it."""
    raise NotImplementedError


def later(x: Tensor) -> Tensor:
    """Marks a number for each row of the batch: 0 at the first frame of a loop, whose frame is ``x``, then 1."""
    raise NotImplementedError


def begin(first: Tensor, x: Tensor, late: Tensor) -> Tensor:
    """Marks a choice: ``first`` at the first frame of a loop, then ``x``."""
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


def far(node: fx.Node) -> bool:
    """Whether a constant is no number to start from: a cache, which is zeros at first, would hold what differs from it."""
    number = number_in(node)
    return number is not None and not abs(number) < FAR


class _Writer:
    """Writes a loop as its parts: what is before the recurrence, its body, and what is after."""

    def __init__(self, captured: Captured, loop: Carrying) -> None:
        self.captured = captured
        self.graph = captured.graph
        self.loop = loop
        self.clones: dict[Any, fx.Node] = {}
        self.opening: dict[fx.Node, fx.Node] = {}
        self.made: dict[Any, fx.Node] = {}
        self.given: set[fx.Node] = set()  # what depends on an input
        for node in self.graph.nodes:
            if (node.op == "placeholder" and node.name in captured.inputs) or (
                node.target not in FILLED and not self.given.isdisjoint(node.all_input_nodes)
            ):
                self.given.add(node)

    def regions(self) -> tuple[set[int], set[int]]:
        """The places of the body, and of all that depends on carried values."""
        reads = [[ref[1] for ref in refs if ref[0] == "node"] for refs in self.loop.reads]
        body = {at for at, refs in enumerate(self.loop.reads) if any(ref[0] == "slot" for ref in refs)}
        dependent: set[int] = set()
        for at, before in enumerate(reads):
            if at in body or dependent & set(before):
                dependent.add(at)
        feeding: set[int] = set()
        queue = [place[1] for place, _ in self.loop.slots if place[0] == "node"]
        while queue:
            at = queue.pop()
            if at not in feeding:
                feeding.add(at)
                queue.extend(reads[at])
        body |= dependent & feeding
        queue = list(body)
        while queue:  # what a node of the body reads of the carried values is in it, too
            for at in reads[queue.pop()]:
                if at in dependent and at not in body:
                    body.add(at)
                    queue.append(at)
        for at, node in enumerate(self.loop.nodes):  # the results of an operator with several stay with it
            if node.target is operator.getitem and body & set(reads[at]):
                body.add(at)
        return body, dependent

    def write(self) -> None:
        loop = self.loop
        body, dependent = self.regions()
        closing = [end.node for end in loop.ends]
        after = [user for _, node in loop.last for user in node.users if user not in loop.copied]
        order = {node: at for at, node in enumerate(self.graph.nodes)}
        spot = min((*(end.way for end in loop.ends), *after), key=lambda node: order[node])
        with self.graph.inserting_before(spot):
            self.write_opening()
            for at in range(len(loop.nodes)):
                if at not in dependent:
                    self.write_outside(at)
            self.write_body(body, {end.place for end in loop.ends} | {at for at, _ in loop.last})
            for at in range(len(loop.nodes)):
                if at in dependent and at not in body:
                    self.write_outside(at)
            lasts = [(self.last_of(at, node), node) for at, node in loop.last]
        for result, node in lasts:
            for user in [user for user in node.users if user not in loop.copied and user not in closing]:
                user.replace_input_with(node, result)
        for end in loop.ends:
            self.finish(end)

    def finish(self, end: End) -> None:
        """All results of a place, put together as the original puts them."""
        with self.graph.inserting_before(end.node):
            instead(end.node, together(end.node, end.way, self.clones[end.place], self.loop.count, end.start))

    def last_of(self, at: int, node: fx.Node) -> fx.Node:
        result = self.graph.create_node("call_function", last_frame, (self.clones[at],), name=f"last_{node.name}")
        result.meta = dict(node.meta)
        return result

    # -- outside of the body

    def clone(self, node: fx.Node, given: Sequence[fx.Node], graph: fx.Graph | None = None) -> fx.Node:
        """A node that reads ``given`` instead; outside of the body, what computes the same is made once."""
        leaves, spec = pytree.tree_flatten((node.args, dict(node.kwargs)))
        ready = iter(given)
        args, kwargs = pytree.tree_unflatten(
            [next(ready) if isinstance(leaf, fx.Node) else leaf for leaf in leaves], spec
        )
        made = (graph or self.graph).create_node("call_function", node.target, args, kwargs, name=f"rolled_{node.name}")
        made.meta = dict(node.meta)
        if graph is not None or node.target is torch.ops.dissect.dropout.default:
            return made
        first = self.made.setdefault(said(made), made)
        if first is not made:
            self.graph.erase_node(made)
        return first

    def marked(self, target: Any, args: tuple[Any, ...], like: fx.Node, graph: fx.Graph | None = None) -> fx.Node:
        node = (graph or self.graph).create_node("call_function", target, args, name=f"rolled_{like.name}")
        node.meta = dict(like.meta)
        return node

    def write_opening(self) -> None:
        """What the first frame alone computes, for every frame, as far as it is asked for."""
        wanted = [*self.loop.begun.values(), *(node for node in self.loop.slots.values() if node is not None)]
        needed: set[fx.Node] = set()
        inside = set(self.loop.opening)
        while wanted:
            node = wanted.pop()
            if node in inside and node not in needed:
                needed.add(node)
                wanted.extend(node.all_input_nodes)
        for node in self.loop.opening:
            if node in needed:
                self.opening[node] = self.clone(node, [self.early(arg) for arg in operands(node)])

    def early(self, node: fx.Node) -> fx.Node:
        """A node of the first frame, as what it is for every frame."""
        frame = frame_in(node)
        if node in self.opening:
            return self.opening[node]
        if frame is None or (frame.source, frame.dim) not in self.loop.sources:
            return node
        return self.fetch(("frame", frame.source, frame.dim, frame.keepdim))

    def moves(self, node: fx.Node | None) -> bool:
        """Whether something computed from the first frame stands for a value."""
        return node is not None and self.early(node) is not node

    def fetch(self, ref: Any) -> fx.Node:
        """What a node outside of the body reads."""
        kind, *rest = ref
        if kind == "same":
            node: fx.Node = rest[0]
            return node
        if kind == "node":
            return self.clones[rest[0]]
        if ref not in self.clones:
            source, dim, keepdim = rest
            node = self.graph.create_node("call_function", frame_of, (source, dim, keepdim))
            node.meta = {**source.meta, "val": frame_of(source.meta["val"], dim, keepdim)}
            self.clones[ref] = node
        return self.clones[ref]

    @property
    def late(self) -> fx.Node:
        """Which frames come after the first."""
        if "late" not in self.clones:
            source, dim = self.loop.sources[0]
            frame = self.fetch(("frame", source, dim, False))
            self.clones["late"] = self.marked(later, (frame,), frame)
            self.clones["late"].meta["val"] = frame.meta["val"].new_ones(self.captured.batch)
        return self.clones["late"]

    def write_outside(self, at: int) -> None:
        node = self.loop.nodes[at]
        made = self.clone(node, [self.fetch(ref) for ref in self.loop.reads[at]])
        if at in self.loop.begun:
            first = self.early(self.loop.begun[at])
            made = made if first is made else self.marked(begin, (first, made, self.late), node)
        self.clones[at] = made

    # -- the body

    def write_body(self, body: set[int], read_outside: set[int]) -> None:
        """The carry node and, in its ``meta``, its body: a graph of inputs, carried values and shared values."""
        graph = fx.Graph()
        given: dict[str, dict[fx.Node, fx.Node]] = {"input": {}, "shared": {}}
        inner: dict[int, fx.Node] = {}
        states: dict[Any, fx.Node] = {}

        def hand(node: fx.Node, kind: str) -> fx.Node:
            if node not in given[kind]:
                held = graph.create_node("placeholder", f"{kind}_{len(given[kind])}")
                held.meta = dict(node.meta)
                given[kind][node] = held
            return given[kind][node]

        def read(ref: Any) -> fx.Node:
            if ref[0] == "slot":
                return states[ref[1:]]
            if ref[0] == "node" and ref[1] in inner:
                return inner[ref[1]]
            return hand(self.fetch(ref), "shared" if ref[0] == "same" else "input")

        def first(node: fx.Node) -> fx.Node:
            return hand(self.early(node), "input" if self.moves(node) else "shared")

        for index, (place, age) in enumerate(self.loop.slots):
            states[place, age] = graph.placeholder(f"carried_{index}")
            states[place, age].meta = dict(self.like(place).meta)
        started = []
        for key, node in self.loop.slots.items():
            like = self.like(key[0])
            if node is not None and (self.moves(node) or far(node) or node in self.given):
                states[key] = self.marked(begin, (first(node), states[key], hand(self.late, "input")), like, graph)
                node = None
            started.append(filled(self.captured, like, 0.0) if node is None else node)
        for at, node in enumerate(self.loop.nodes):
            if at in body:
                inner[at] = self.clone(node, [read(ref) for ref in self.loop.reads[at]], graph)
                if at in self.loop.begun:
                    chosen = (first(self.loop.begun[at]), inner[at], hand(self.late, "input"))
                    inner[at] = self.marked(begin, chosen, node, graph)
        new = [read(place) if age == 1 else states[place, age - 1] for place, age in self.loop.slots]
        readers: dict[int, set[int]] = {at: set() for at in body}
        for at, refs in enumerate(self.loop.reads):
            for ref in refs:
                if ref[0] == "node" and ref[1] in body:
                    readers[ref[1]].add(at)
        wanted = [at for at in sorted(body) if at in read_outside or readers[at] - body]
        graph.output(([inner[at] for at in wanted], new))
        if "late" in self.clones and self.late in given["input"]:  # what has the caches' dtype comes first
            given["input"][self.late] = given["input"].pop(self.late)
        node = self.graph.create_node("call_function", carry, (list(given["input"]), started, list(given["shared"])))
        node.meta = dict(self.loop.nodes[0].meta)
        node.meta.update({"val": None, "body": graph, "given": given})
        for index, at in enumerate(wanted):
            part = self.graph.call_function(operator.getitem, (node, index))
            part.meta = dict(self.loop.nodes[at].meta)
            self.clones[at] = part

    def like(self, place: Any) -> fx.Node:
        """A node with the shape of a place."""
        return self.loop.nodes[place[1]] if place[0] == "node" else self.fetch(place)

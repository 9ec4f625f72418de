"""Loops that carry values from frame to frame, and that a capture wrote out, become one recurrence again.

``for t in range(T): h = cell(x[:, t], h)`` is captured as T copies of ``cell``, each of which reads the one before. Where all
copies are one function of their frame and of the values before, what they compute from the frame alone is done for every
frame by itself (between markers, see :mod:`dissect.unrolling`), what follows from the results too, and what lies between
is the body of a recurrence (:mod:`dissect.carried`). The law: the graph computes what it computed before. What differs from
copy to copy in anything but the index of the frame is left as it is; the first copies alone may differ (:mod:`dissect.first`),
since a stream knows its first frame.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from dissect.capturing import Captured
from dissect.copies import Differ, alike, operands, said
from dissect.first import first_frames
from dissect.unrolling import SUMS, Frame, ends, frame_in, instead

__all__ = ["FILLED", "Carrying", "End", "Reader", "filled", "number_in", "recurring"]

aten = torch.ops.aten
#: operators that give a tensor of one number, and the number; they read an activation for its size alone
FILLED = {
    aten.zeros_like.default: 0.0,
    aten.ones_like.default: 1.0,
    aten.full_like.default: None,
    aten.new_zeros.default: 0.0,
    aten.new_ones.default: 1.0,
    aten.new_full.default: None,
    aten.empty_like.default: 0.0,
    aten.new_empty.default: 0.0,
}
_FULL = {aten.zeros.default: 0.0, aten.ones.default: 1.0, aten.full.default: None}
_LAYERS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


@dataclass(frozen=True)
class End:
    """What puts results of a place together: ``node`` is the value, ``way`` the operator; the first ``start`` are left out."""

    node: fx.Node
    way: fx.Node
    place: int
    start: int = 0


@dataclass
class Carrying:
    """A loop that was written out.

    A *place* is a node of every copy: ``("node", k)`` for node ``k`` of each, ``("frame", source, dim, keepdim)`` for its
    frame. ``reads[k]`` says what node ``k`` reads, operand by operand: a place; ``("slot", place, age)`` for what the place
    was ``age`` frames ago; ``("same", node)`` for what is the same for all.

    count     how many frames it goes over
    nodes     one copy that stands for all
    slots     what is carried, ``(place, age)``, and what stands for it at the first frame; None where nothing reads it there
    begun     the places that are something else at the first frame, and what
    opening   all that is computed from the first frame alone
    sources   the tensors, and dimensions, whose frames it takes
    ends      what puts results together; ``last`` the places of results read once, at the end, and those results
    copied    every node of every copy
    """

    count: int
    nodes: list[fx.Node]
    reads: list[tuple[Any, ...]]
    slots: dict[tuple[Any, int], fx.Node | None] = field(default_factory=dict)
    begun: dict[int, fx.Node] = field(default_factory=dict)
    opening: list[fx.Node] = field(default_factory=list)
    sources: list[tuple[fx.Node, int]] = field(default_factory=list)
    shared: list[fx.Node] = field(default_factory=list)
    ends: list[End] = field(default_factory=list)
    last: list[tuple[int, fx.Node]] = field(default_factory=list)
    copied: set[fx.Node] = field(default_factory=set)

    @property
    def plain(self) -> bool:
        """Whether all copies are the same, from numbers that no frame has a part in."""
        first = [node for node in self.slots.values() if node in self.opening or (node and frame_in(node))]
        ends = all(end.start == 0 and end.way is end.node and end.way.target not in SUMS for end in self.ends)
        return not first and not self.begun and ends and all(age == 1 for _, age in self.slots)


def recurring(captured: Captured) -> list[Carrying]:
    """The loops of a graph that carry values; one at a time can be rolled."""
    _uproot(captured)
    _all_results(captured)
    if not _whole(captured):
        return []
    _one_constant(captured)
    whole = _whole(captured)
    done: list[Carrying] = []
    for (source, dim), found in whole.items():
        # One loop at a time: frames of what comes out of it are another's.
        beside = [key for key in whole if len(whole[key]) == len(found) and not _follows(key[0], found[0])]
        if (source, dim) not in beside or any(key in loop.sources for loop in done for key in beside):
            continue
        for base in range(min(3, len(found) - 1)):
            try:
                done.append(Reader(captured, len(found), beside, base).read())
                break
            except Differ:
                continue
    return done


def _whole(captured: Captured) -> dict[tuple[fx.Node, int], dict[int, list[fx.Node]]]:
    """The tensors, and dimensions, all frames of which are taken one by one."""
    frames: dict[tuple[fx.Node, int], dict[int, list[fx.Node]]] = {}
    for node in captured.graph.nodes:
        frame = frame_in(node) if node.op == "call_function" else None
        if frame is not None:
            frames.setdefault((frame.source, frame.dim), {}).setdefault(frame.index, []).append(node)
    return {key: found for key, found in frames.items() if len(found) == key[0].meta["val"].shape[key[1]] > 1}


def _uproot(captured: Captured) -> None:
    """Tensors of one number that take their size from a frame take it from the clip: they are the same for every copy."""
    for node in list(captured.graph.nodes):
        if node.target not in FILLED or node.args[0].op == "placeholder":
            continue
        value = FILLED[node.target]
        with captured.graph.inserting_before(node):
            instead(node, filled(captured, node, node.args[-1] if value is None else value))


def filled(captured: Captured, like: fx.Node, number: float) -> fx.Node:
    """A tensor of one number, as large as the value of ``like``."""
    root = next(node for node in captured.graph.nodes if node.op == "placeholder" and node.name in captured.inputs)
    kwargs = {} if like.meta["val"].dtype == root.meta["val"].dtype else {"dtype": like.meta["val"].dtype}
    args = (root, list(like.meta["val"].shape), number)
    made = captured.graph.create_node("call_function", aten.new_full.default, args, kwargs, name=f"{like.name}_like")
    made.meta = dict(like.meta)
    return made


def _all_results(captured: Captured) -> None:
    """Every result of a recurrent layer as a node, in order: the last copy of a loop reads others than those before it."""
    for node in list(captured.graph.nodes):
        if node.op != "call_function" or node.target not in _LAYERS:
            continue
        held = {user.args[1]: user for user in node.users if user.target is operator.getitem}
        after = node
        for index, value in enumerate(node.meta["val"]):
            if index not in held:
                held[index] = captured.graph.call_function(operator.getitem, (node, index))
                held[index].meta = {**node.meta, "val": value}
            after.append(held[index])
            after = held[index]


def number_in(node: fx.Node) -> float | None:
    """The number that fills a tensor; None where it is filled by more than one."""
    if node.target not in FILLED and node.target not in _FULL:
        return None
    number = {**FILLED, **_FULL}[node.target]
    return node.args[-1] if number is None else number  # type: ignore[return-value]


def _follows(node: fx.Node, frames: Sequence[fx.Node]) -> bool:
    """Whether a node depends on any of those."""
    queue, seen = [node], set()
    while queue:
        at = queue.pop()
        if at in frames:
            return True
        if at not in seen:
            seen.add(at)
            queue.extend(at.all_input_nodes)
    return False


def _one_constant(captured: Captured) -> None:
    """Constants that are computed alike are one node: each copy of a loop has made its own."""
    known: dict[Any, fx.Node] = {}
    fixed = {node for node in captured.graph.nodes if node.op == "placeholder" and node.name in captured.tensors}
    for node in list(captured.graph.nodes):
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if (
            node.op != "call_function"
            or random
            or not (node.target in FILLED or fixed.issuperset(node.all_input_nodes))
        ):
            continue
        fixed.add(node)
        first = known.setdefault(said(node), node)
        if first is not node:
            node.replace_all_uses_with(first)
            captured.graph.erase_node(node)


class Reader:
    """Reads the copies of a loop over frames, node by node, in the order of the graph; the first ``base`` may differ."""

    def __init__(self, captured: Captured, count: int, sources: Sequence[tuple[fx.Node, int]], base: int) -> None:
        self.count = count
        self.base = base
        self.frames: dict[fx.Node, Frame] = {}
        self.depth: dict[fx.Node, int] = {}
        owners = (aten.unbind.int, aten.split.Tensor, aten.chunk.default, aten.split_with_sizes.default)
        for node in captured.graph.nodes:
            if node.op != "call_function":
                continue
            frame = frame_in(node)
            if frame is not None and (frame.source, frame.dim) in sources:
                self.frames[node] = frame
                self.depth[node] = frame.index
                continue
            depth = max((self.depth.get(arg, -1) for arg in node.all_input_nodes), default=-1)
            if depth >= 0 and not (node.target in owners and any(user in self.frames for user in node.users)):
                self.depth[node] = depth
        self.chains: dict[fx.Node, tuple[fx.Node, list[fx.Node]]] = {}
        for node in self.depth:
            self.read_chain(node)
        self.lists: list[list[fx.Node]] = [[] for _ in range(count)]
        for node, depth in self.depth.items():
            if node not in self.frames and node not in self.chains:
                self.lists[depth].append(node)
        # What only a copy after the last would read is not there: of the last copy, and of the one before.
        short = count - base > 3 and len(self.lists[-2]) < len(self.lists[base])
        self.full = count - 2 if short else count - 1
        self.place = {node: at for nodes in self.lists[base : self.full] for at, node in enumerate(nodes)}
        self.first: dict[tuple[Any, int], fx.Node] = {}

    def read_chain(self, node: fx.Node) -> None:
        """Results added up one by one are an end."""
        if node.target not in SUMS:
            return
        least = max(3, self.count - self.base)
        for terms in ends(node):
            depths = [self.depth.get(term) for term in terms]
            inner, at = [node], node.args[0]
            while isinstance(at, fx.Node) and at not in terms:
                inner.append(at)
                at = at.args[0]
            if len(terms) >= least and depths == list(range(self.count - len(terms), self.count)):
                self.chains.update(dict.fromkeys(inner, (node, terms)))

    def read(self) -> Carrying:
        nodes = self.lists[self.base]
        if not nodes or any(len(other) != len(nodes) for other in self.lists[self.base : self.full]):
            raise Differ
        rest = self.compared() if self.count - self.base > 2 else [self.two(nodes)]
        wanted = [ref[1:] for refs in self.reads for ref in refs if ref[0] == "slot"]
        if not wanted:
            raise Differ
        ages: dict[Any, int] = {}
        for place, age in wanted:
            ages[place] = max(age, ages.get(place, 0))
        loop = Carrying(self.count, nodes, self.reads)
        loop.sources = list(dict.fromkeys((frame.source, frame.dim) for frame in self.frames.values()))
        loop.opening = self.lists[0]
        self.read_ends(loop, [*self.lists[self.base : self.full], *rest])
        firsts, loop.begun = first_frames(self, loop)
        loop.slots = {(place, age): firsts.get((place, -age)) for place in ages for age in range(1, ages[place] + 1)}
        same = [ref[1] for refs in self.reads for ref in refs if ref[0] == "same"]
        outside = [arg for node in self.lists[0] for arg in node.all_input_nodes if self.depth.get(arg, -1) < 0]
        loop.shared = list(dict.fromkeys(node for node in (*same, *outside)))
        return loop

    def compared(self) -> list[list[fx.Node | None]]:
        """What the nodes of one copy read, which all others must read, too; the nodes of those that are not whole."""
        index = self.full - 1
        given = [self.derived(node, index) for node in self.lists[index]]
        self.reads = [refs for refs in given if refs is not None]
        if len(self.reads) < len(given):
            raise Differ
        model = self.lists[index]
        for at in range(self.base, index):
            for like, node, refs in zip(model, self.lists[at], self.reads, strict=True):
                if not alike(like, node) or not self.read_as(node, refs, at):
                    raise Differ
        return [
            self.matched(index, model, lambda at, node, index: self.derived(node, index) == self.reads[at])
            for index in range(self.full, self.count)
        ]

    def two(self, nodes: list[fx.Node]) -> list[fx.Node | None]:
        """Two copies, the second of which may be followed by what comes after the loop."""
        self.reads = []

        def fits(at: int, node: fx.Node, index: int) -> bool:
            refs = self.derived(node, index)
            if refs is None or not self.read_as(nodes[at], refs, self.base):
                return False
            self.reads.append(refs)
            return True

        last = self.matched(self.count - 1, nodes, fits)
        if None in last:
            raise Differ
        return last

    def matched(self, index: int, model: Sequence[fx.Node], fits: Callable[..., bool]) -> list[fx.Node | None]:
        """The nodes of one of the last copies; what comes after the loop depends on the last frame, too."""
        found: list[fx.Node | None] = []
        free = dict.fromkeys(self.lists[index])
        for at, like in enumerate(model):
            match = next((node for node in free if alike(like, node) and fits(at, node, index)), None)
            found.append(match)
            if match is not None:
                del free[match]
                self.place[match] = at
        if free and index < self.count - 1:
            raise Differ
        return found

    def derived(self, node: fx.Node, index: int) -> tuple[Any, ...] | None:
        """What a node of copy ``index`` reads, as places; None where it reads what is no place."""
        refs: list[Any] = []
        for leaf in operands(node):
            depth = self.depth.get(leaf, -1)
            place = self.where(leaf)
            if depth < 0:
                refs.append(("same", leaf))
            elif place is None:
                return None
            else:
                refs.append(place if depth == index else ("slot", place, index - depth))
        return tuple(refs)

    def read_as(self, node: fx.Node, refs: tuple[Any, ...], index: int) -> bool:
        """Whether a node of copy ``index`` reads just that; what it reads of the first copies is noted."""
        noted: dict[tuple[Any, int], fx.Node] = {}
        for leaf, ref in zip(operands(node), refs, strict=True):
            if ref[0] == "same":
                if leaf is not ref[1]:
                    return False
                continue
            place, at = (ref[1], index - ref[2]) if ref[0] == "slot" else (ref, index)
            if self.there(leaf, place, at):
                continue
            known = noted.get((place, at), self.first.get((place, at), leaf))
            early = self.base > at > -self.count and self.depth.get(leaf, -1) <= max(at, 0)
            if not early or not self.equal(known, leaf):
                return False
            noted[place, at] = known
        self.first.update(noted)
        return True

    def there(self, node: fx.Node, place: Any, index: int) -> bool:
        """Whether a node is a place of copy ``index``."""
        return self.where(node) == place and self.depth.get(node) == index

    def equal(self, one: fx.Node, other: fx.Node) -> bool:
        """Whether two nodes are one, or the same frame."""
        frames = self.frames.get(one), self.frames.get(other)
        return one is other or (frames[0] is not None and frames[0] == frames[1])

    def where(self, node: fx.Node) -> Any:
        """A node's place in its copy."""
        frame = self.frames.get(node)
        if frame is not None:
            return ("frame", frame.source, frame.dim, frame.keepdim)
        return ("node", self.place[node]) if node in self.place else None

    def read_ends(self, loop: Carrying, copies: Sequence[Sequence[fx.Node | None]]) -> None:
        """Who reads results of the copies: what puts all together, in order, or what takes the last one."""
        loop.copied = {node for nodes in (*self.lists[: self.base], *copies) for node in nodes if node is not None}
        for at in range(len(loop.nodes)):
            row = [nodes[at] for nodes in copies]
            for index, node in enumerate(row):
                for user in node.users if node is not None else ():
                    if user in loop.copied:
                        continue
                    end, parts = self.end(user, row)
                    if end is not None:
                        end = replace(end, place=at)
                        if end not in loop.ends:
                            loop.ends.append(end)
                            start = end.start
                            for time, part in enumerate(parts[: self.base - start], start):
                                if not self.equal(self.first.setdefault((("node", at), time), part), part):
                                    raise Differ
                    elif index == len(row) - 1:
                        if node is not None and (at, node) not in loop.last:
                            loop.last.append((at, node))
                    else:
                        raise Differ
        if not loop.ends and not loop.last:
            raise Differ

    def end(self, user: fx.Node, row: Sequence[fx.Node | None]) -> tuple[End | None, list[fx.Node]]:
        """What puts a row together, and all that it puts together: what the first copies have made, too."""
        if user in self.chains:
            way, parts = self.chains[user]
        elif user.target in (aten.stack.default, aten.cat.default):
            way, parts = user, list(user.args[0])  # type: ignore[arg-type]
        else:
            return None, []
        node = way
        over = next(iter(way.users)) if len(way.users) == 1 else way
        if over is not way and over.target is aten.cat.default and len(parts) == self.count - 1:
            alone, rest = (*over.args[0], None)[:2]  # type: ignore[misc]
            along = [at.args[1] if len(at.args) > 1 else 0 for at in (way, over)]
            if rest is way and isinstance(alone, fx.Node) and along[0] == along[1]:
                if way.target is aten.stack.default and alone.target is aten.unsqueeze.default:
                    alone = alone.args[0] if alone.args[1] == along[0] else None
                if isinstance(alone, fx.Node) and alone.meta["val"].shape == parts[0].meta["val"].shape:
                    node, parts = over, [alone, *parts]
        start = self.count - len(parts)
        if not 0 <= start <= self.base or parts[self.base - start :] != row:
            return None, []
        return End(node, way, 0, start), parts

"""Loops that carry values from frame to frame, and that a capture wrote out, become one recurrence again.

``for t in range(T): h = cell(x[:, t], h)`` is captured as T copies of ``cell``, each of which reads the one before. Where all
copies are one function of their frame and of the values before, what they compute from the frame alone is done for every
frame by itself (between markers, see :mod:`dissect.unrolling`), what follows from the results too, and what lies between
is the body of a recurrence (:mod:`dissect.carried`). The law: the graph computes what it computed before. What differs from copy to copy in
anything but the index of the frame is left as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree  # the specs that torch.export itself hands out

from dissect.capturing import Captured
from dissect.unrolling import Frame, frame_in

__all__ = ["FILLED", "Carrying", "Slot", "recurring"]

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
_LAYERS = (aten.lstm.input, aten.gru.input, aten.rnn_tanh.input, aten.rnn_relu.input)


@dataclass(frozen=True)
class Slot:
    """A carried value: the node of a copy that makes it, by its place, and what stands for it in the first copy."""

    place: Any
    first: fx.Node


@dataclass
class Carrying:
    """A loop that was written out.

    copies    the nodes of each copy, in step: ``copies[i][k]`` is node ``k`` of copy ``i``; None where the last has none
    slots     the values that it carries
    sources   the tensors, and dimensions, whose frames it takes
    ends      nodes that put results together, and the place of those; ``last`` the places of results read once, at the end
    """

    copies: list[list[fx.Node | None]]
    slots: list[Slot] = field(default_factory=list)
    sources: list[tuple[fx.Node, int]] = field(default_factory=list)
    shared: list[fx.Node] = field(default_factory=list)
    ends: list[tuple[fx.Node, int]] = field(default_factory=list)
    last: list[int] = field(default_factory=list)


class _Differ(Exception):
    """The copies are not the same function."""


def recurring(captured: Captured) -> list[Carrying]:
    """The loops of a graph that carry values; one at a time can be rolled."""
    _uproot(captured)
    _all_results(captured)
    frames: dict[tuple[fx.Node, int], dict[int, list[fx.Node]]] = {}
    for node in captured.graph.nodes:
        frame = frame_in(node) if node.op == "call_function" else None
        if frame is not None:
            frames.setdefault((frame.source, frame.dim), {}).setdefault(frame.index, []).append(node)
    whole = {key: found for key, found in frames.items() if len(found) == key[0].meta["val"].shape[key[1]] > 1}
    done: list[Carrying] = []
    for (source, dim), found in whole.items():
        # One loop at a time: frames of what comes out of it are another's.
        beside = [key for key in whole if len(whole[key]) == len(found) and not _follows(key[0], found[0])]
        if (source, dim) not in beside or any(key in loop.sources for loop in done for key in beside):
            continue
        try:
            done.append(_Reader(captured, len(found), beside).read())
        except _Differ:
            continue
    return done


def _uproot(captured: Captured) -> None:
    """Tensors of one number that take their size from a frame take it from the clip: they are the same for every copy."""
    root = next(node for node in captured.graph.nodes if node.op == "placeholder" and node.name in captured.inputs)
    for node in list(captured.graph.nodes):
        if node.target not in FILLED or node.args[0].op == "placeholder":
            continue
        value = FILLED[node.target]
        number = node.args[-1] if value is None else value
        kwargs = {} if node.meta["val"].dtype == root.meta["val"].dtype else {"dtype": node.meta["val"].dtype}
        with captured.graph.inserting_before(node):
            args = (root, list(node.meta["val"].shape), number)
            made = captured.graph.create_node(
                "call_function", aten.new_full.default, args, kwargs, name=f"{node.name}_like"
            )
        made.meta = dict(node.meta)
        name = node.name
        node.replace_all_uses_with(made)
        captured.graph.erase_node(node)
        made.name = name


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


class _Reader:
    """Reads the copies of a loop over frames, node by node, in the order of the graph."""

    def __init__(self, captured: Captured, count: int, sources: Sequence[tuple[fx.Node, int]]) -> None:
        self.count = count
        self.frames: dict[fx.Node, Frame] = {}
        self.depth: dict[fx.Node, int] = {}
        self.lists: list[list[fx.Node]] = [[] for _ in range(count)]
        for node in captured.graph.nodes:
            if node.op != "call_function":
                continue
            frame = frame_in(node)
            if frame is not None and (frame.source, frame.dim) in sources:
                self.frames[node] = frame
                self.depth[node] = frame.index
                continue
            depth = max((self.depth.get(arg, -1) for arg in node.all_input_nodes), default=-1)
            owner = node.target in (
                aten.unbind.int,
                aten.split.Tensor,
                aten.chunk.default,
                aten.split_with_sizes.default,
            )
            if depth >= 0 and not (owner and any(user in self.frames for user in node.users)):
                self.depth[node] = depth
                self.lists[depth].append(node)
        self.place = {node: at for nodes in self.lists[:-1] for at, node in enumerate(nodes)}
        self.slots: dict[tuple[Any, fx.Node], Slot] = {}
        self.shared: dict[fx.Node, None] = {}

    def read(self) -> Carrying:
        size = len(self.lists[0])
        if not size or any(len(nodes) != size for nodes in self.lists[:-1]):
            raise _Differ
        if self.count == 2:
            self.place.update({node: at for at, node in enumerate(self.lists[1][:size])})
        for index in range(1, self.count - 1):
            for before, node in zip(self.lists[index - 1], self.lists[index], strict=True):
                if not self.same(before, node, index):
                    raise _Differ
        last = self.match_last()
        if not self.slots:
            raise _Differ
        copies: list[list[fx.Node | None]] = [*map(list, self.lists[:-1]), last]  # type: ignore[list-item]
        sources = dict.fromkeys((frame.source, frame.dim) for frame in self.frames.values())
        loop = Carrying(copies, list(self.slots.values()), list(sources), list(self.shared))
        self.read_ends(loop)
        return loop

    def same(self, before: fx.Node, node: fx.Node, index: int, places: dict[fx.Node, int] | None = None) -> bool:
        """Whether ``node`` does in copy ``index`` what ``before`` does in the copy before."""
        places = self.place if places is None else places
        if before.target is not node.target or _shape(before) != _shape(node):
            return False
        old, spec = pytree.tree_flatten((before.args, dict(before.kwargs)))
        new, other = pytree.tree_flatten((node.args, dict(node.kwargs)))
        if spec != other or len(old) != len(new):
            return False
        found: dict[tuple[Any, fx.Node], Slot] = {}
        for p, q in zip(old, new, strict=True):
            if not isinstance(p, fx.Node) or not isinstance(q, fx.Node):
                if isinstance(p, fx.Node) or isinstance(q, fx.Node) or type(p) is not type(q) or p != q:
                    return False
                continue
            if p is q and self.depth.get(p, -1) < 0:
                self.shared[p] = None
                continue
            one, two = self.where(p), self.where(q) if q in self.frames or q not in places else ("node", places[q])
            if self.depth.get(q) == index and self.depth.get(p) == index - 1 and one == two is not None:
                continue
            carried = self.depth.get(q) == index - 1 and two is not None
            if carried and index == 1 and self.depth.get(p, -1) < 0:
                found[two, p] = Slot(two, p)
            elif not (carried and index > 1 and self.depth.get(p) == index - 2 and one == two):
                return False
        self.slots.update(found)
        return len({slot.place for slot in self.slots.values()}) == len(self.slots)

    def where(self, node: fx.Node) -> Any:
        """A node's place in its copy."""
        frame = self.frames.get(node)
        if frame is not None:
            return ("frame", frame.source, frame.dim, frame.keepdim)
        return ("node", self.place[node]) if node in self.place else None

    def match_last(self) -> list[fx.Node | None]:
        """The nodes of the last copy; what comes after the loop depends on the last frame, too."""
        index = self.count - 1
        if index == 1:
            return self.first_is_last()
        places = dict(self.place)
        used: set[fx.Node] = set()
        found: list[fx.Node | None] = []
        for at, before in enumerate(self.lists[index - 1]):
            match = next(
                (node for node in self.lists[index] if node not in used and self.same(before, node, index, places)),
                None,
            )
            found.append(match)
            if match is not None:
                used.add(match)
                places[match] = at
        self.place = places
        return found

    def first_is_last(self) -> list[fx.Node | None]:
        """A loop over two frames."""
        for before, node in zip(self.lists[0], self.lists[1], strict=False):
            if not self.same(before, node, 1):
                raise _Differ
        if len(self.lists[1]) < len(self.lists[0]):
            raise _Differ
        self.place = {
            node: at for nodes in (self.lists[0], self.lists[1][: len(self.lists[0])]) for at, node in enumerate(nodes)
        }
        return list(self.lists[1][: len(self.lists[0])])

    def read_ends(self, loop: Carrying) -> None:
        """Who reads results of the copies: what puts all together, in order, or what takes the last one."""
        inside = {node for nodes in loop.copies for node in nodes}
        for at in range(len(loop.copies[0])):
            row = [nodes[at] for nodes in loop.copies]
            for index, node in enumerate(row):
                for user in node.users if node is not None else ():
                    if user in inside:
                        continue
                    if user.target in (aten.stack.default, aten.cat.default) and list(user.args[0]) == row:  # type: ignore[arg-type]
                        if (user, at) not in loop.ends:
                            loop.ends.append((user, at))
                    elif index == self.count - 1:
                        if at not in loop.last:
                            loop.last.append(at)
                    else:
                        raise _Differ
        for node in self.frames:
            if any(user not in inside for user in node.users):
                raise _Differ
        if not loop.ends and not loop.last:
            raise _Differ


def _shape(node: fx.Node) -> Any:
    return pytree.tree_map(
        lambda value: (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value, node.meta.get("val")
    )

"""The first frames of a loop that carries values: what they do as all others do, and what they do in another way.

``state = h if state is None else a * h + (1 - a) * state`` makes a first copy unlike the others. Its values are followed
back from where they are read, beside what the others do at the same place, until the two part: there the first frame has a
value of its own, and all that follows is one function again. See :mod:`dissect.carrying`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from dissect.copies import Differ, alike, operands, shape_of

if TYPE_CHECKING:
    from dissect.carrying import Carrying, Reader

__all__ = ["first_frames"]

Key = tuple[Any, int]  # a place, and a frame


def first_frames(reader: Reader, loop: Carrying) -> tuple[dict[Key, fx.Node], dict[int, fx.Node]]:
    """What stands for carried values before the first frame, and the places that are something else at the first frame."""
    return _First(reader, loop).read()


class _First:
    """Pairs the nodes of the first copies with the places of the others."""

    def __init__(self, reader: Reader, loop: Carrying) -> None:
        self.reader = reader
        self.loop = loop
        self.pairs = dict(reader.first)
        self.before: dict[Key, fx.Node] = {key: node for key, node in reader.first.items() if key[1] < 0}
        self.uniform: set[Key] = set()
        self.begun: set[Key] = set()

    def read(self) -> tuple[dict[Key, fx.Node], dict[int, fx.Node]]:
        wanted = [key for key in self.pairs if key[1] >= 0]
        self.pair(wanted)
        alone: list[Key] = []
        for at, _ in self.loop.last:
            for time in range(self.reader.base):
                key: Key = (("node", at), time)
                wanted.append(key)
                if key not in self.pairs:
                    self.pairs[key] = self.likely(at, time)
                    self.pair([key])
                    alone.append(key)
        for time, at in sorted((time, place[1]) for place, time in self.pairs if place[0] == "node" and time >= 0):
            self.settle(at, time)
        unknown = any(not self.known(place, time, self.pairs[place, time]) for place, time in wanted)
        if unknown or not self.uniform.issuperset(alone):
            raise Differ
        needed = self.needed(wanted)
        begun = {place[1]: self.pairs[place, time] for place, time in needed if (place, time) in self.begun}
        before = {key: node for key, node in self.reader.first.items() if key[1] < 0}
        for place, time in needed & self.uniform:
            for key, node in zip(self.reads(place[1], time), operands(self.pairs[place, time]), strict=True):
                if key[1] < 0 and key[0][0] != "same":
                    before[key] = node
        return before, begun

    def likely(self, at: int, time: int) -> fx.Node:
        """What a copy gives for a place that only the end of the clip asks for."""
        found = [node for node in self.reader.lists[time] if alike(self.loop.nodes[at], node)]
        if len(found) != 1:
            raise Differ
        return found[0]

    def reads(self, at: int, time: int) -> list[tuple[Any, int]]:
        """The places that a place reads, and when; ``("same", node)`` among them."""
        return [(ref[1], time - ref[2]) if ref[0] == "slot" else (ref, time) for ref in self.loop.reads[at]]

    def pair(self, wanted: list[Key]) -> None:
        """Follow pairs back to what they read, as long as the operators are the same."""
        queue = list(wanted)
        while queue:
            place, time = queue.pop()
            node = self.pairs[place, time]
            if place[0] != "node" or not alike(self.loop.nodes[place[1]], node):
                continue
            for key, leaf in zip(self.reads(place[1], time), operands(node), strict=True):
                if key[1] >= 0 and key[0][0] == "node" and key not in self.pairs:
                    self.pairs[key] = leaf
                    queue.append(key)

    def settle(self, at: int, time: int) -> None:
        """Whether a pair computes the same from the same; if not, whether the first frame can have a value of its own."""
        reader, node, like = self.reader, self.pairs[("node", at), time], self.loop.nodes[at]
        if alike(like, node):
            noted: dict[Key, fx.Node] = {}
            for (place, when), leaf in zip(self.reads(at, time), operands(node), strict=True):
                if when < 0 and place[0] != "same":
                    known = noted.setdefault((place, when), self.before.get((place, when), leaf))
                    if not reader.equal(known, leaf) or reader.depth.get(leaf, -1) > 0:
                        break
                elif not self.known(place, when, leaf):
                    break
            else:
                self.before.update(noted)
                self.uniform.add((("node", at), time))
                return
        value = node.meta.get("val")
        same = isinstance(value, torch.Tensor) and shape_of(node) == shape_of(like)
        if time == 0 and same and reader.depth.get(node, -1) <= 0:
            self.begun.add((("node", at), time))

    def known(self, place: Any, time: int, node: fx.Node) -> bool:
        """Whether a place is that node at that frame."""
        if place[0] == "same":
            return node is place[1]
        if place[0] == "frame":
            return self.reader.there(node, place, time)
        key = (place, time)
        return key in self.uniform | self.begun and self.pairs[key] is node

    def needed(self, wanted: list[Key]) -> set[Key]:
        """The pairs that those depend on."""
        needed: set[Key] = set()
        queue = list(wanted)
        while queue:
            key = queue.pop()
            if key not in needed:
                needed.add(key)
                if key in self.uniform:
                    queue += [read for read in self.reads(key[0][1], key[1]) if read[0][0] == "node" and read[1] >= 0]
        return needed

"""Rings: in which buffer each cache of a stream is, turn by turn.

A cache is read from one buffer and written to another, never to the same one, so two buffers in turn serve it. A
history of D frames kept as slots has one new frame a step, and every other slot becomes what its neighbour was: the
graph copies it. In a ring of more than D buffers nothing is copied: the newest frame is written where the oldest was
dropped, and the slots are looked for one place further on. Rings have a power of two of buffers, never more than two
for each cache, so that all of them come round together soon.

Law: after any number of steps a cache holds what it would hold if the graph had copied it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dissect.contract import CacheSpec

__all__ = ["Rings", "moves"]


def moves(caches: Sequence[CacheSpec], copies: Mapping[str, str]) -> dict[int, int]:
    """The caches that a step moves on: which one (by number) becomes what which other one was.

    ``copies`` names the graph's outputs that are copies of its inputs. Left out are those that do not fit a ring: of
    another kind or rhythm, a second copy of one cache, a circle that nothing new enters.
    """
    at = {spec.input: index for index, spec in enumerate(caches)}
    found: dict[int, int] = {}
    for index, spec in enumerate(caches):
        source = at.get(copies.get(spec.output, ""))
        if source is None or source in found.values():
            continue
        other = caches[source]
        if (spec.shape, spec.dtype, spec.due) == (other.shape, other.dtype, other.due):
            found[index] = source
    return {index: source for index, source in found.items() if len(_line(index, found)) <= len(found)}


def _line(index: int, moved: Mapping[int, int]) -> list[int]:
    """The caches through which a value came to this one, this one left out; longer than ``moved`` for a circle."""
    line: list[int] = []
    while index in moved and len(line) <= len(moved):
        index = moved[index]
        line.append(index)
    return line


class Rings:
    """Where the caches of a stream are.

    A *turn* counts a stream's steps, and repeats after ``turns`` of them. ``first`` is, for each cache, the one whose
    ring it is in (itself, if the graph writes it), ``sizes`` that ring's buffers.
    """

    def __init__(self, caches: Sequence[CacheSpec], moved: Mapping[int, int], period: int) -> None:
        lines = [_line(index, moved) for index in range(len(caches))]
        self.first = [line[-1] if line else index for index, line in enumerate(lines)]
        slots = [self.first.count(first) for first in self.first]
        self.sizes = [1 << count.bit_length() for count in slots]
        self.turns = max(self.sizes, default=2) * period
        self._places: list[list[int]] = []
        steps = [0] * len(caches)
        for turn in range(self.turns):
            self._places.append(
                [(step - len(line)) % size for step, line, size in zip(steps, lines, self.sizes, strict=True)]
            )
            steps = [step + (turn % spec.due[1] == spec.due[0]) for step, spec in zip(steps, caches, strict=True)]

    def place(self, turn: int, cache: int) -> int:
        """The buffer in which a cache of a stream at ``turn`` is."""
        return self._places[turn % self.turns][cache]

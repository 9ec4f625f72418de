"""Serving: one batch of a pool's streams through the table, on one thread; who gets what out of it.

The law is that of :mod:`dissect.pool`: a stream gets what it would get alone. Nothing here waits or locks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dissect.binding import Table
from dissect.contract import pack
from dissect.seating import Seat, Seats

__all__ = ["Progress", "Server", "Tail", "Work"]


@dataclass
class Work:
    """A frame that waits (or, without ``frames``, a flush), and who waits for it; ``fresh``: it begins a stream."""

    future: Future[Any]
    arrived: float
    frames: list[NDArray[Any]] | None
    fresh: bool = False


@dataclass
class Tail:
    """A flush under way: who waits, the time of the next step and of the last, the last of each output, results so far."""

    work: Work
    time: int
    last: int
    ends: list[int]
    results: list[Any] = field(default_factory=list)


@dataclass
class Progress:
    """Where a stream is: the frames that it has seen, its seat once it has one, its flush while there is one."""

    frames: int = 0
    seat: Seat | None = None
    tail: Tail | None = None

    @property
    def time(self) -> int:
        """The time of the next step."""
        return self.frames if self.tail is None else self.tail.time


Batch = Sequence[tuple[Progress, Work]]


class Server:
    """Steps streams of one table."""

    def __init__(self, table: Table) -> None:
        self.table, self.contract = table, table.contract
        self.seats = Seats(table)
        self.batches: Counter[int] = Counter()
        self._staged = [
            np.zeros(frames.shape, frames.dtype) if frames.array is None else frames.array for frames in table.frames
        ]

    def release(self, stream: Progress) -> None:
        """The stream is gone: its seat is free."""
        if stream.seat is not None:
            self.seats.leave(stream.seat)
            stream.seat = None

    def begin_flush(self, stream: Progress, work: Work) -> None:
        """Begin to step a stream on without frames; one in which nothing is left is done with at once."""
        seat, contract = self._seated(stream, work), self.contract
        age, length = contract.role("age"), contract.role("length")
        if age is None or length is None or stream.frames == 0 or contract.last(stream.frames) < stream.frames:
            self._end_flush(stream, work, [])
            return
        self.table.copy_one(seat.turn, np.array([seat.row]), age, length)
        ends = [output.last(stream.frames) for output in contract.outputs]
        stream.tail = Tail(work, stream.frames, contract.last(stream.frames), ends)

    def step(self, batch: Batch) -> None:
        """One step of streams that are at one phase; what it gives, or the error, goes to their futures."""
        seats = [self._seated(stream, work) for stream, work in batch]
        try:
            turn, start = self.seats.gather(seats)
            self._stage([(seat.row - start, work.frames) for seat, (_, work) in zip(seats, batch, strict=True)])
            self.table.run(turn, start, len(batch))
        except Exception as error:  # the caches are what they were: these frames alone are lost
            for stream, work in batch:
                if stream.tail is not None:
                    self._end_flush(stream, work, error)
                else:
                    work.future.set_exception(error)
            return
        self.seats.step(seats)
        self.batches[len(batch)] += 1
        made = self.table.results(turn)
        rows = [[None if part is None else part[seat.row - start][None].copy() for part in made] for seat in seats]
        for (stream, work), leaves in zip(batch, rows, strict=True):
            self._deliver(stream, work, leaves)

    def _seated(self, stream: Progress, work: Work) -> Seat:
        """The stream's seat, for a step on ``work``."""
        if stream.seat is None:
            stream.seat = self.seats.enter()
        elif work.fresh:
            self.seats.restart(stream.seat)
        if work.fresh:
            stream.frames, work.fresh = 0, False
        return stream.seat

    def _stage(self, frames: Sequence[tuple[int, list[NDArray[Any]] | None]]) -> None:
        """Put the frames of a batch into its rows; a flush has frames of zeros."""
        for index, (target, tensor) in enumerate(zip(self._staged, self.table.frames, strict=True)):
            for row, given in frames:
                target[row] = 0 if given is None else given[index]
            if tensor.array is None:
                tensor.fill(target)

    def _deliver(self, stream: Progress, work: Work, leaves: list[NDArray[Any] | None]) -> None:
        """The stream's part of a batch, to whom it belongs."""
        now, tail = stream.time, stream.tail
        for at, output in enumerate(self.contract.outputs):
            if now < output.delay or (tail is not None and now > tail.ends[at]):
                leaves[at] = None
        there = any(leaf is not None for leaf in leaves)
        result = pack(self.contract.structure, leaves) if there else None
        if tail is None:
            stream.frames += 1
            work.future.set_result(result)
            return
        tail.results += [result] if there else []
        tail.time += 1
        if tail.time > tail.last:
            self._end_flush(stream, work, tail.results)

    def _end_flush(self, stream: Progress, work: Work, result: list[Any] | Exception) -> None:
        stream.tail, stream.frames = None, 0
        if stream.seat is not None:
            self.seats.restart(stream.seat)
        if not work.future.set_running_or_notify_cancel():  # a flush can be cancelled until it is done
            return
        if isinstance(result, Exception):
            work.future.set_exception(result)
        else:
            work.future.set_result(result)

"""Seats: where the streams of a pool are in its table, and how those that step together come to lie side by side.

ONNX Runtime takes a batch as one piece of memory, so the streams of a batch must have neighbouring rows, at one turn.
They are brought there only when they are not there yet: streams whose frames come together stay together, and their
caches are not copied at all. A stream that must make room takes the row that the newcomer leaves.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from dissect.binding import Table
from dissect.moving import Move, Mover

__all__ = ["Seat", "Seats"]


@dataclass(eq=False)
class Seat:
    """A stream's row in the table and the turn it is at; ``fresh``: its caches are to be cleared before its next step."""

    row: int
    turn: int = 0
    fresh: bool = True


@dataclass
class Seats:
    """The seats of a table, whose rows fall into windows as wide as its largest batch.

    On a device all of a batch goes to the first window, since a row's address must suit the device. ``moved`` counts
    the rows that had to be copied.
    """

    table: Table
    moved: int = 0
    _taken: dict[int, Seat] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mover = Mover(self.table)
        step = self.table.rows if self.table.home.resident else self.table.batch
        self._windows = range(0, self.table.rows, step)

    def enter(self) -> Seat:
        """A seat for a new stream; there must be one."""
        free = next(row for row in range(self.table.rows) if row not in self._taken)
        seat = self._taken[free] = Seat(free)
        return seat

    def leave(self, seat: Seat) -> None:
        """The stream is gone."""
        del self._taken[seat.row]

    def gather(self, seats: Sequence[Seat]) -> tuple[int, int]:
        """Brings ``seats``, all at one phase, side by side and to one turn: the turn and the first row."""
        period = self.table.contract.period
        count = len(seats)
        starts = [start for start in self._windows if start + count <= self.table.rows]
        held = {start: [seat for seat in seats if start <= seat.row < start + count] for start in starts}
        start = max(held, key=lambda at: len(held[at]))
        settled = [seat.turn for seat in held[start] if not seat.fresh] or [
            seat.turn for seat in seats if not seat.fresh
        ]
        turn = Counter(settled).most_common(1)[0][0] if settled else 0
        assert all(seat.fresh or (seat.turn - turn) % period == 0 for seat in seats), "they are at one phase"
        free = [row for row in range(start, start + count) if self._taken.get(row) not in held[start]]
        moves: list[Move] = []
        for seat in seats:
            old, row = seat.row, seat.row if seat in held[start] else free.pop(0)
            other = self._taken.get(row)
            if seat.fresh or (row, turn) != (old, seat.turn):
                moves.append(Move(row, turn, None if seat.fresh else (old, seat.turn)))
            if other is not seat:
                del self._taken[old]
                if other is not None:
                    if not other.fresh:
                        moves.append(Move(old, other.turn, (row, other.turn)))
                    self._taken[old], other.row = other, old
                self._taken[row] = seat
            seat.row, seat.turn, seat.fresh = row, turn, False
        self._mover.move(moves)
        self.moved += sum(move.source is not None for move in moves)
        return turn, start

    def restart(self, seat: Seat) -> None:
        """The stream begins again: its caches will be cleared when it steps next."""
        seat.turn, seat.fresh = 0, True

    def step(self, seats: Sequence[Seat]) -> None:
        """The streams have made a step."""
        for seat in seats:
            seat.turn = (seat.turn + 1) % self.table.turns

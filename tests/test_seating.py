"""Rows that move: each stream finds its own caches wherever it sits, and what need not be copied is not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from step_models import windows

from dissect import binding
from dissect.batching import Batching, calibrated
from dissect.binding import Table
from dissect.moving import Move, Mover
from dissect.opening import open_step
from dissect.seating import Seat, Seats
from dissect.sessions import Home


@pytest.fixture(params=["host", "resident", "graphs"])
def table(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Table:
    """Six rows in batches of three, in host memory or where numpy does not reach (played by the CPU)."""
    if request.param != "host":
        home = Home("cpu", 0, resident=True, rebind=True, graphs=request.param == "graphs")
        monkeypatch.setattr(binding, "home_of", lambda session: home)
    return Table(open_step(windows((3, 1, 1)), rings=False), 6, 3)


def fill(table: Table) -> dict[tuple[int, int, int], float]:
    """Another number in every row of every cache of both sets; what is where."""
    held = {}
    for side, at, row in itertools.product(range(2), range(len(table.contract.caches)), range(table.rows)):
        held[side, at, row] = 1 + side + 10 * at + 100 * row
        table.buffers[at][side].write(np.array([row]), np.asarray(held[side, at, row]))
    return held


def contents(table: Table) -> dict[tuple[int, int, int], float]:
    every = np.arange(table.rows)
    return {
        (side, at, row): float(np.ravel(values)[0])
        for side in range(2)
        for at, buffers in enumerate(table.buffers)
        for row, values in zip(every, buffers[side].read(every), strict=True)
    }


@pytest.mark.parametrize("seed", range(6))
def test_moves_are_made_at_once(table: Table, seed: int) -> None:
    random = np.random.default_rng(seed)
    held = fill(table)
    places = [(int(row), int(turn)) for row in range(table.rows) for turn in range(2)]
    targets = random.permutation(len(places))[: random.integers(1, 9)]
    moves = [
        Move(*places[to], None if random.random() < 0.2 else places[random.integers(len(places))]) for to in targets
    ]
    wanted = dict(held)
    for move, at in itertools.product(moves, range(len(table.contract.caches))):
        source = None if move.source is None else held[table.place(move.source[1], at), at, move.source[0]]
        wanted[table.place(move.turn, at), at, move.row] = source or 0.0
    Mover(table).move(moves)
    assert contents(table) == wanted


@pytest.mark.parametrize(("rows", "batch"), [(6, 3), (7, 3), (5, 4), (2, 2)])
def test_random_batches_find_their_caches(table: Table, rows: int, batch: int) -> None:
    """A stream's caches hold its own number plus its steps, wherever it has been moved."""
    random = np.random.default_rng(0)
    table = Table(table.model, rows, batch)
    seats = Seats(table)
    seated: dict[Seat, list[float]] = {}  # its number, its steps
    numbers = itertools.count(1)
    for _ in range(120):
        if seated and random.random() < 0.2:
            gone = list(seated)[random.integers(len(seated))]
            seats.leave(gone)
            del seated[gone]
        elif len(seated) < table.rows and random.random() < 0.5:
            seated[seats.enter()] = [100.0 * next(numbers), 0]
        elif seated and random.random() < 0.2:
            again = list(seated)[random.integers(len(seated))]
            seats.restart(again)
            seated[again][1] = 0
        if not seated:
            continue
        chosen = [list(seated)[at] for at in random.permutation(len(seated))[: random.integers(1, table.batch + 1)]]
        turn, start = seats.gather(chosen)
        assert sorted(seat.row for seat in chosen) == list(range(start, start + len(chosen)))
        assert start + len(chosen) <= rows
        assert len({seat.row for seat in seated}) == len(seated)
        for seat in chosen:
            number, steps = seated[seat]
            row = np.array([seat.row])
            for before, after in zip(table.caches(turn), table.caches((turn + 1) % table.turns), strict=True):
                value = float(np.ravel(before.read(row))[0])
                assert value == (number + steps if steps else 0), "another's caches, or none that were cleared"
                after.write(row, np.asarray(number + steps + 1))  # as a step does it
            seated[seat][1] += 1
        seats.step(chosen)


def test_who_comes_together_stays_together(table: Table) -> None:
    seats = Seats(table)
    held = [seats.enter() for _ in range(6)]
    groups = [held[::2], held[1::2]]
    for _ in range(2):
        for group in groups:
            seats.gather(group)
            seats.step(group)
    moved = seats.moved
    for _ in range(5):
        for group in groups:
            seats.gather(group)
            seats.step(group)
    resident = table.home.resident  # where every batch goes to the first rows, and others must make room
    assert (seats.moved > moved) == resident


def test_rows_beyond_the_batch_are_untouched(table: Table) -> None:
    held = fill(table)
    table.frames[0].fill(np.ones(table.frames[0].shape, np.float32))
    table.run(0, 1, 2)
    after = contents(table)
    changed = {place for place in held if after[place] != held[place]}
    assert {(side, row) for side, _, row in changed} == {(1, 1), (1, 2)}


@pytest.mark.parametrize("seed", range(20))
def test_what_is_ready_is_never_split_for_the_worse(seed: int) -> None:
    random = np.random.default_rng(seed)
    costs = list(random.uniform(0.2, 2, size=6) * np.arange(1, 7) ** random.uniform(0.3, 1.3))
    batching = Batching.of(costs)

    def ways(count: int) -> list[tuple[int, ...]]:
        return [()] if not count else [(first, *rest) for first in range(1, count + 1) for rest in ways(count - first)]

    for ready in range(1, 7):
        left, spent = ready, 0.0
        while left:
            size = batching.take(left)
            spent, left = spent + costs[size - 1], left - size
        best = min(sum(costs[size - 1] for size in way) for way in ways(ready))
        assert best <= spent + 1e-12 <= best * 1.02**6 + 1e-9
    assert batching.take(50) == batching.take(6)
    shares = [cost / size for size, cost in enumerate(costs, 1)]
    assert shares[batching.enough - 1] <= min(shares) * 1.02
    assert all(share > min(shares) * 1.02 for share in shares[: batching.enough - 1])


@pytest.mark.parametrize(
    ("costs", "sizes", "enough"),
    [
        ([1.0, 1.1, 1.2, 1.3], (1, 2, 3, 4), 4),  # a small network: the larger the better
        ([1.0, 2.2, 3.6, 5.0], (1, 1, 1, 1), 1),  # a large one: never two at once
        ([1.0, 1.5, 3.0, 4.0], (1, 2, 2, 2), 2),
    ],
)
def test_batches_follow_their_costs(costs: list[float], sizes: tuple[int, ...], enough: int) -> None:
    batching = Batching.of(costs)
    assert (batching.sizes, batching.enough) == (sizes, enough)


def test_without_costs_all_goes() -> None:
    batching = Batching.greedy(5)
    assert [batching.take(ready) for ready in (1, 4, 5, 9)] == [1, 4, 5, 5]


def test_calibration_measures_every_size() -> None:
    batching = calibrated(Table(open_step(windows((3, 1, 1)), rings=False), 6, 6), seconds=0.05)
    assert len(batching.costs) == 6
    one, two, three, four, five, six = batching.costs
    assert min(one, two, four, six) > 0
    assert three == pytest.approx((two + four) / 2)
    assert five == pytest.approx((four + six) / 2)

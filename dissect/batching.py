"""How many streams go through a step model at once: as many as pay, which is measured.

A larger batch costs less a frame where a step is small, and may cost more where it is large and its activations leave
the processor's cache. Law: what is ready is never split so that it takes longer, by the costs, than in any other way.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from dissect.binding import Table

__all__ = ["Batching", "calibrated"]

#: a larger batch is taken unless it costs this much more: one call has more to it than its run
_TOLERANCE = 1.02


@dataclass(frozen=True)
class Batching:
    """Sizes of batches by what they cost.

    costs    seconds of a batch of 1, 2, ... streams; empty where nobody measured
    sizes    how many streams to take first of 1, 2, ... that are ready
    enough   the size that no larger one beats by more than a little: no use in waiting for more
    """

    costs: tuple[float, ...]
    sizes: tuple[int, ...]
    enough: int

    @classmethod
    def greedy(cls, most: int) -> Batching:
        """All that are ready, up to ``most``."""
        return cls((), tuple(range(1, most + 1)), most)

    @classmethod
    def of(cls, costs: Sequence[float]) -> Batching:
        """The cheapest way through for each number of ready streams."""
        best, sizes = [0.0], []
        for count in range(1, len(costs) + 1):
            totals = {size: costs[size - 1] + best[count - size] for size in range(1, count + 1)}
            best.append(min(totals.values()))
            sizes.append(max(size for size, total in totals.items() if total <= best[-1] * _TOLERANCE))
        shares = [cost / size for size, cost in enumerate(costs, 1)]
        enough = next(size for size, share in enumerate(shares, 1) if share <= min(shares) * _TOLERANCE)
        return cls(tuple(costs), tuple(sizes), enough)

    def take(self, ready: int) -> int:
        """How many of the streams that are ready go through now."""
        return self.sizes[min(ready, len(self.sizes)) - 1]


def calibrated(table: Table, seconds: float = 1.0) -> Batching:
    """Measure batches of several sizes in turn, for about ``seconds`` (three rounds at least); rows are left dirty.

    Sizes are powers of two and the largest; those between are taken to lie on a line. Of each, the best time counts.
    """
    measured = sorted({1 << power for power in range(table.batch.bit_length())} | {table.batch})
    best = dict.fromkeys(measured, float("inf"))
    period = table.contract.period
    deadline = time.perf_counter() + seconds
    rounds = 0
    while rounds < 3 or (rounds < 20 and time.perf_counter() < deadline):
        for size in measured:
            began = time.perf_counter()
            for turn in range(period):
                table.run(turn, 0, size)
            if rounds:  # the first one warms up
                best[size] = min(best[size], (time.perf_counter() - began) / period)
        rounds += 1
    costs = []
    for count in range(1, table.batch + 1):
        low = max(size for size in measured if size <= count)
        high = min(size for size in measured if size >= count)
        share = (count - low) / (high - low) if high > low else 0.0
        costs.append(best[low] + (best[high] - best[low]) * share)
    return Batching.of(costs)

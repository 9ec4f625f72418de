"""The one law, for every primitive: a chunk of T frames equals T steps, whatever the chunking and the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dissect.primitives import (
    CacheSpec,
    Clock,
    CumulativeMean,
    Gate,
    History,
    Primitive,
    Query,
    Tap,
    WindowReduce,
    stacked,
    tap,
)
from dissect.timing import Length

FRAMES, FRAME = 9, (3, 2)


@dataclass(frozen=True)
class Case:
    """A primitive behind what it reads: ``reads`` is the history's depth, or None where it takes the value itself."""

    make: Callable[[], Primitive]
    reads: int | None = None
    masks: int = 0
    frame: tuple[int, ...] = FRAME


CASES = {
    "tap": Case(lambda: Tap(4), reads=4),
    "tap, deeper history": Case(lambda: Tap(2), reads=5),
    "scalar tap": Case(lambda: Tap(3, scalar=True), reads=3, frame=()),
    "mean": Case(lambda: WindowReduce("mean", (2, 1, 0), 3.0), reads=2),
    "long mean": Case(lambda: WindowReduce("mean", tuple(range(8))[::-1], 8.0), reads=7),
    "long mean of a deeper history": Case(lambda: WindowReduce("mean", tuple(range(6))[::-1]), reads=9),
    "long mean of scores": Case(lambda: WindowReduce("mean", tuple(range(6))[::-1]), reads=5, frame=(4,)),
    "dilated sum": Case(lambda: WindowReduce("sum", (6, 3, 0)), reads=6),
    "max": Case(lambda: WindowReduce("max", (3, 2, 1, 0)), reads=3),
    "min": Case(lambda: WindowReduce("min", (4, 2, 0)), reads=4),
    "masked max": Case(lambda: WindowReduce("max", (2, 1, 0)), reads=2, masks=3),
    "of the present alone": Case(lambda: WindowReduce("mean", (0,)), reads=0),
    "cumulative mean": Case(lambda: CumulativeMean(FRAME)),
    "cumulative mean that forgets": Case(lambda: CumulativeMean(FRAME, horizon=3)),
    "cumulative max": Case(lambda: CumulativeMean(FRAME, kind="max")),
    "cumulative min": Case(lambda: CumulativeMean(FRAME, kind="min")),
    "gated cumulative mean": Case(lambda: CumulativeMean(FRAME), masks=-1),
    "gate": Case(lambda: Gate(), masks=-1),
    "gate with a fill": Case(lambda: Gate(0.5), masks=-1),
}


class Whole(nn.Module):
    """A primitive with the history that it reads, in both forms."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.history = None if case.reads is None else History(case.frame, case.reads)
        self.primitive = case.make()

    @property
    def specs(self) -> tuple[CacheSpec, ...]:
        own = self.primitive.specs
        return own if self.history is None else (*self.history.specs, *own)

    def forward(self, x: Tensor, masks: Sequence[Tensor], caches: Any, frames: int | None) -> Any:
        known: Any = x
        given = list(caches) if caches is not None else None
        new: tuple[Tensor, ...] = ()
        if self.history is not None:
            if self.history.specs:
                known, new = self.history(x, None if given is None else (given.pop(0),), frames)
            else:
                known = self.history(x, frames=frames)
        extra: dict[str, Any] = {"masks": tuple(masks)} if self.case.masks > 0 else {}
        args = (known, *masks) if self.case.masks < 0 else (known,)
        if self.primitive.specs:
            y, made = self.primitive(*args, caches=None if given is None else tuple(given), frames=frames)
            return y, (*new, *made)
        return self.primitive(*args, frames=frames, **extra), new


def rows(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def run(whole: Whole, x: Tensor, masks: Tensor, sizes: Sequence[int | None], fresh: bool) -> tuple[list[Tensor], Any]:
    """Outputs frame by frame; a size of None is a step."""
    batch, at = x.shape[0], 0
    caches: Any = None if fresh else tuple(spec.zeros(batch, x.dtype) for spec in whole.specs)
    given = [cache.clone() for cache in caches] if caches is not None else None
    outputs = []
    for size in sizes:
        count = size or 1
        now = [rows(mask[:, at : at + count]) for mask in masks]
        old = None if caches is None else [cache.clone() for cache in caches]
        y, new = whole(rows(x[:, at : at + count]), now, caches, size)
        if old is not None:
            assert all(torch.equal(a, b) for a, b in zip(old, caches, strict=True)), "the caller's caches were changed"
        caches = new
        outputs += y.unflatten(0, (batch, count)).unbind(1)
        at += count
    assert given is None or all(not cache.any() for cache in given)
    return outputs, caches


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_chunks_equal_steps(name: str, batch: int) -> None:
    case = CASES[name]
    torch.manual_seed(0)
    x = torch.randn(batch, FRAMES, *case.frame, dtype=torch.float64)
    masks = (torch.rand(abs(case.masks), batch, FRAMES) > 0.4).double()
    whole = Whole(case)
    wanted, last = run(whole, x, masks, [None] * FRAMES, fresh=False)
    for sizes in ([FRAMES], [1] * FRAMES, [2, 2, 5], [5, 4], [1, 3, 3, 2]):
        for fresh in (False, True):
            got, caches = run(whole, x, masks, sizes, fresh)
            torch.testing.assert_close(torch.stack(got), torch.stack(wanted), rtol=0, atol=1e-12)
            for cache, other, spec in zip(caches, last, whole.specs, strict=True):
                assert cache.shape == (batch, *spec.shape)
                torch.testing.assert_close(cache, other, rtol=0, atol=1e-12)
    assert all(len(spec.zeros(1, x.dtype).shape) <= 4 for spec in whole.specs)


@pytest.mark.parametrize("name", CASES)
def test_rows_do_not_see_each_other(name: str) -> None:
    case = CASES[name]
    torch.manual_seed(1)
    x = torch.randn(3, FRAMES, *case.frame, dtype=torch.float64)
    masks = (torch.rand(abs(case.masks), 3, FRAMES) > 0.4).double()
    whole = Whole(case)
    together, _ = run(whole, x, masks, [None] * FRAMES, fresh=False)
    alone, _ = run(whole, x[1:2], masks[:, 1:2], [None] * FRAMES, fresh=False)
    torch.testing.assert_close(torch.stack(together)[:, 1:2], torch.stack(alone), rtol=0, atol=0)


# What each computes, by definition.


def window(x: Tensor, ages: Sequence[int]) -> Tensor:
    """``(T, len(ages), N, ...)``: the values of those ages, zeros before the stream."""
    padded = torch.cat([x.new_zeros(x.shape[0], max(ages), *x.shape[2:]), x], 1)
    parts = [padded[:, max(ages) - age : max(ages) - age + x.shape[1]] for age in ages]
    return torch.stack(parts).transpose(1, 2).transpose(0, 1)


@pytest.mark.parametrize("ages", [(3, 2, 1, 0), (4, 2, 0), (6, 5, 4, 3, 2, 1, 0), (0,)], ids=str)
@pytest.mark.parametrize("kind", ["mean", "sum", "max", "min"])
def test_windows_by_definition(kind: str, ages: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    x = torch.randn(2, FRAMES, *FRAME, dtype=torch.float64)
    whole = Whole(Case(lambda: WindowReduce(kind, ages, len(ages) if kind == "mean" else 1.0), reads=ages[0]))
    got, _ = run(whole, x, torch.empty(0, 2, FRAMES), [None] * FRAMES, fresh=False)
    values = window(x, ages)
    wanted = {"mean": values.mean(1), "sum": values.sum(1), "max": values.amax(1), "min": values.amin(1)}[kind]
    torch.testing.assert_close(torch.stack(got), wanted)


def test_a_masked_maximum_sees_what_is_inside_and_stays_finite_where_nothing_is() -> None:
    x = torch.tensor([[-1.0, -2.0, -3.0, -4.0]]).reshape(1, 4, 1)
    masks = torch.tensor([[[0.0, 0.0, 1.0, 0.0]], [[0.0, 1.0, 1.0, 0.0]]])
    whole = Whole(Case(lambda: WindowReduce("max", (1, 0)), reads=1, masks=2, frame=(1,)))
    got, _ = run(whole, x, masks, [None] * 4, fresh=False)
    assert torch.stack(got).flatten().tolist() == [0.0, -2.0, -2.0, 0.0]


def test_a_cumulative_mean_is_the_mean_of_all_and_then_forgets() -> None:
    x = torch.randn(2, 40, 3, dtype=torch.float64)
    got, caches = run(Whole(Case(lambda: CumulativeMean((3,)))), x, torch.empty(0, 2, 40), [None] * 40, fresh=False)
    wanted = x.cumsum(1) / torch.arange(1, 41)[:, None]
    torch.testing.assert_close(torch.stack(got, 1), wanted)
    assert caches[1].flatten().tolist() == [40, 40]
    got, caches = run(
        Whole(Case(lambda: CumulativeMean((3,), horizon=5))), x, torch.empty(0, 2, 40), [None] * 40, fresh=False
    )
    assert caches[1].flatten().tolist() == [5, 5], "the counter does not grow without bound"
    average = x[:, 0]
    for time in range(1, 40):
        average = average + (x[:, time] - average) / min(time + 1, 5)
    torch.testing.assert_close(got[-1], average)


def test_one_history_serves_all_its_readers() -> None:
    x = torch.randn(2, 6, 3, 4, dtype=torch.float64)
    history = History((3, 4), 5)
    known, _ = history(rows(x), frames=6)
    for age in range(6):
        past = tap(known, age, 6).unflatten(0, (2, 6))
        torch.testing.assert_close(past[:, age:], x[:, : 6 - age])
        assert not past[:, :age].any()
    cache = x[:, :5].flatten(1, 2)
    step = (cache, x[:, 5])
    for ages in ((5, 4, 3, 2, 1, 0), (5, 3, 1), (4, 2, 0), (0,), (3,)):
        wanted = torch.cat([x[:, 5 - age] for age in ages], 1)
        torch.testing.assert_close(stacked(step, ages), wanted)


def test_a_history_of_one_frame_hands_the_frame_on() -> None:
    x = torch.randn(2, 3)
    _, (new,) = History((3,), 1)(x, (torch.zeros(2, 3),))
    assert new is x


def test_a_history_of_nothing_keeps_nothing() -> None:
    x = torch.randn(6, 3)
    history = History((3,), 0)
    assert history.specs == ()
    assert torch.equal(tap(history(x), 0, None), x)
    assert torch.equal(tap(history(x, frames=3), 0, 3), x)


# The clock.

QUERIES = [
    Query(delay, stride, Length().then(add, stride), shift, positions, phase)
    for delay, stride, add, shift, positions, phase in [
        (0, 1, -1, 0, 1, False),
        (2, 1, 1, 0, 1, False),
        (3, 2, -2, 0, 1, False),
        (3, 2, -2, 0, 1, True),
        (1, 3, 0, 2, 1, False),
        (2, 2, -1, 0, 4, False),
        (0, 1, 2, 3, 3, False),
    ]
]


def counted(query: Query, time: int, ended: int) -> int:
    """A query's answer by definition: how many values, ``stride`` apart, lie between the first position and the last."""
    seen = time - query.shift
    if query.phase and (seen - query.delay) % query.stride:
        return 0
    bound = query.length is not None and ended
    last = query.delay + query.stride * (query.length(ended) - 1) if bound and query.length else seen
    times = [seen - query.stride * index for index in range(query.positions)]
    return sum(query.delay <= moment <= last for moment in times)


@pytest.mark.parametrize("length", [0, 7, 12])
@pytest.mark.parametrize("live", [True, False])
def test_the_clock_counts_positions(length: int, live: bool) -> None:
    """Steps and chunks give the definition's counts; ``live`` streams are told their length only when they end."""
    clock = Clock()
    queries = [query for query in QUERIES if length or query.length is not None]
    for query in queries:
        clock.ask(query)
    clock.period, clock.settled = 6, 24
    like = torch.zeros(2, 1, dtype=torch.float64)
    caches: Any = tuple(spec.zeros(2, like.dtype) for spec in clock.specs)
    if length and not live:
        caches = (caches[0], torch.full_like(caches[1], length))
    steps = (length or 40) + 9
    for time in range(steps):
        if live and length and time == length:
            caches = (caches[0], caches[0].clone())
        answers, caches = clock(like, caches)
        ended = length if length and (not live or time >= length) else 0
        assert [int(answer[1]) for answer in answers] == [counted(query, time, ended) for query in queries], time
    if not length:
        assert int(caches[0].max()) <= clock.settled + clock.period, "the age grows without bound"


def test_a_clock_asked_twice_answers_once() -> None:
    clock = Clock()
    assert [clock.ask(QUERIES[0]), clock.ask(QUERIES[1]), clock.ask(Query(**vars(QUERIES[0])))] == [0, 1, 0]


def test_the_clock_in_chunks() -> None:
    clock = Clock()
    for query in QUERIES:
        clock.ask(query)
    clock.period, clock.settled = 6, 24
    zeros = tuple(spec.zeros(3, torch.float64) for spec in clock.specs)
    zeros[1][1] = 11
    caches: Any = zeros
    steps = []
    for _ in range(20):
        answers, caches = clock(torch.zeros(3, 1, dtype=torch.float64), caches)
        steps.append(torch.stack(answers))
    got, late = clock(torch.zeros(60, 1, dtype=torch.float64), zeros, 20)
    assert torch.equal(torch.stack(got).unflatten(1, (3, 20)), torch.stack(steps, 2))
    assert all(torch.equal(one, other) for one, other in zip(caches, late, strict=True))

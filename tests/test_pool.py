"""The stream pool: whatever the interleaving, each stream gets what a runner of its own would give it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_networks import scrambled
from step_models import convolutions, running_sum, windows
from test_cadence import Net

import dissect
from dissect import StreamPool, binding
from dissect.errors import StreamError
from dissect.sessions import Home

SECONDS = 60  # nobody waits longer in a test; a hang is a failure


@pytest.fixture(params=["host", "resident", "graphs"])
def home(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory, or caches kept where numpy does not reach (as on a GPU, here played by the CPU)."""
    if request.param != "host":
        home = Home("cpu", 0, resident=True, rebind=True, graphs=request.param == "graphs")
        monkeypatch.setattr(binding, "home_of", lambda session: home)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = scrambled(Net(2, 2, head="each"), 0).float()
    stream = dissect.convert(network, torch.randn(1, 2, 12, 5, 5), "exact")
    return dissect.export(stream, tmp_path_factory.mktemp("native") / "net.onnx", cadence="native")


def pool(model: Any, **options: Any) -> StreamPool:
    return StreamPool(model, **{"calibrate": False, "threads": 1, **options})


def wait(futures: Any) -> Any:
    if isinstance(futures, Future):
        return futures.result(SECONDS)
    return [future.result(SECONDS) for future in futures]


def same(got: Any, wanted: Any) -> None:
    """Equal structures of arrays, None where the other is None."""
    if isinstance(wanted, (list, tuple)):
        assert len(got) == len(wanted)
        for left, right in zip(got, wanted, strict=True):
            same(left, right)
    elif isinstance(wanted, dict):
        same([got[key] for key in wanted], list(wanted.values()))
    elif wanted is None:
        assert got is None
    else:
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


class Script:
    """What one stream does, and what a runner of its own gives for it."""

    def __init__(self, model: Any, shape: tuple[int, ...], seed: int, length: int = 60) -> None:
        random = np.random.default_rng(seed)
        alone = dissect.Runner(model, threads=1)
        self.actions: list[tuple[str, Any]] = []
        self.wanted: list[Any] = []
        for _ in range(length):
            draw = random.random()
            if draw < 0.04:
                self.actions.append(("reset", None))
                alone.reset()
            elif draw < 0.08:
                self.actions.append(("flush", None))
                self.wanted.append(alone.flush())
            elif draw < 0.25:
                self.actions.append(("pause", random.random() * 0.004))
            else:
                frame = random.normal(size=shape).astype(np.float32)
                self.actions.append(("push", frame))
                self.wanted.append(alone.step(frame))

    def play(self, stream: dissect.pool.PoolStream) -> list[Any]:  # type: ignore[attr-defined]
        futures = []
        for action, value in self.actions:
            if action == "reset":
                stream.reset()
            elif action == "flush":
                futures.append(stream.flush())
            elif action == "pause":
                time.sleep(value)
            else:
                futures.append(stream.push(value))
        return wait(futures)  # type: ignore[no-any-return]


def together(jobs: list[Callable[[], None]]) -> None:
    """Run all jobs on threads of their own; raise what they raise."""
    errors: list[BaseException] = []

    def guarded(job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
        assert not thread.is_alive(), "it hangs"
    if errors:
        raise errors[0]


def plays(model: Any, shape: tuple[int, ...], streams: int, **options: Any) -> StreamPool:
    """Streams that come and go on threads of their own, each against a runner of its own."""
    scripts = [Script(model, shape, seed) for seed in range(2 * streams)]

    def job(mine: list[Script]) -> Callable[[], None]:
        def run() -> None:
            for script in mine:
                with pooled.open() as stream:
                    same(script.play(stream), script.wanted)

        return run

    with pool(model, streams=streams, **options) as pooled:
        together([job(scripts[index::streams]) for index in range(streams)])
        assert pooled.streams == 0
    return pooled


@pytest.mark.parametrize(("streams", "max_batch"), [(1, 1), (5, 8), (7, 3), (6, 2)])
def test_streams_get_what_they_would_get_alone(streams: int, max_batch: int, home: None) -> None:
    pooled = plays(windows((5, 2, 2), (4, 1, 2)), (2,), streams, max_batch=max_batch, max_wait=0.002)
    assert max(pooled.batches) <= min(max_batch, streams)
    assert max(pooled.batches) > 1 or streams == 1, "nothing was batched: the test tests nothing"


def test_streams_in_the_native_cadence(native: Path, home: None) -> None:
    pooled = plays(native, (2, 5, 5), 4, max_batch=4, max_wait=0.001)
    assert max(pooled.batches) > 1


def test_a_calibrated_pool() -> None:
    model = convolutions(channels=4, size=8, layers=2)
    pooled = plays(model, (4, 8, 8), 3, calibrate=True)
    assert len(pooled.costs) == 3
    assert all(cost > 0 for cost in pooled.costs)


def test_streams_in_step_are_never_copied(home: None) -> None:
    model = windows((3, 1, 1))
    with pool(model, streams=4, max_wait=SECONDS) as pooled:
        cameras = [pooled.open() for _ in range(4)]
        for frame in np.random.default_rng(0).normal(size=(20, 4, 2)).astype(np.float32):
            wait([camera.push(part) for camera, part in zip(cameras, frame, strict=True)])
        assert pooled.batches == {4: 20}
        assert pooled.moved == 0


def test_two_groups_of_streams_keep_their_places() -> None:
    """16 cameras, batches of 8: each half has its own rows, and none moves once they have met."""
    model = windows((3, 1, 1))
    with pool(model, streams=16, max_batch=8, max_wait=SECONDS) as pooled:
        cameras = [pooled.open() for _ in range(16)]
        halves = cameras[::2], cameras[1::2]
        for turn in range(12):
            for half in halves:
                wait([camera.push(np.ones(2, np.float32)) for camera in half])
            if turn == 1:
                settled = pooled.moved
        assert pooled.batches == {8: 24}
        assert pooled.moved == settled


def test_an_idle_stream_stays_what_it_was(home: None) -> None:
    model = running_sum()
    with pool(model, streams=3) as pooled:
        idle, busy, other = (pooled.open() for _ in range(3))
        one = np.ones(3, np.float32)
        wait([idle.push(one), idle.push(one)])
        for _ in range(7):
            wait([busy.push(one), other.push(one)])
            wait(busy.push(one))
        np.testing.assert_array_equal(wait(idle.push(one)), [[3, 3, 3]])
        np.testing.assert_array_equal(wait(busy.push(one)), [[15, 15, 15]])
        assert (idle.frames, busy.frames, other.frames) == (3, 15, 7)


def test_a_frame_waits_no_longer_than_it_must() -> None:
    with pool(running_sum(), streams=2, max_wait=0.2) as pooled:
        first, second = pooled.open(), pooled.open()
        began = time.perf_counter()
        wait(first.push(np.ones(3, np.float32)))
        alone = time.perf_counter() - began
        assert 0.19 < alone < 5, "it waited for the other, and for no longer than it was told"
        began = time.perf_counter()
        wait([first.push(np.ones(3, np.float32)), second.push(np.ones(3, np.float32))])
        assert time.perf_counter() - began < 0.19, "nobody else can come"
        second.close()
        began = time.perf_counter()
        wait(first.push(np.ones(3, np.float32)))
        assert time.perf_counter() - began < 0.19
        assert pooled.batches == {1: 2, 2: 1}


def test_an_error_in_one_stream_harms_no_other() -> None:
    with pool(running_sum(), streams=3, max_wait=SECONDS) as pooled:
        good, bad, sick = (pooled.open() for _ in range(3))
        one = np.ones(3, np.float32)
        for time_ in range(1, 4):
            with pytest.raises(StreamError, match=r"frame: a frame has the shape \(1, 3\)"):
                bad.push(np.ones(4, np.float32))
            with pytest.raises(StreamError, match="frames are float32, and this one is uint8"):
                bad.push(np.ones(3, np.uint8))
            with pytest.raises(StreamError, match=r"push\(\) takes 1 frame\(s\) \(frame\), and 2 were given"):
                bad.push(one, one)
            futures = [good.push(one), bad.push(one), sick.push(one * np.nan)]
            for stream, want in zip(futures[:2], (time_, time_), strict=True):
                np.testing.assert_array_equal(wait(stream), [[want] * 3])
            assert np.isnan(wait(futures[2])).all()
        sick.reset()
        futures = [good.push(one), bad.push(one), sick.push(one)]
        np.testing.assert_array_equal(wait(futures[2]), [[1, 1, 1]])


class Broken:
    """A session that fails when it is told to."""

    def __init__(self, session: Any) -> None:
        self.session, self.fails = session, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.session, name)

    def run_with_iobinding(self, *args: Any) -> None:
        if self.fails:
            raise RuntimeError("out of memory")
        self.session.run_with_iobinding(*args)


def test_a_batch_that_fails_leaves_its_streams_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    session: list[Broken] = []
    from dissect import opening

    original = opening.open_session
    monkeypatch.setattr(opening, "open_session", lambda *args: session.append(Broken(original(*args))) or session[0])
    model = windows((3, 1, 1))
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    with pool(model, streams=2, max_wait=SECONDS) as pooled:
        cameras = [pooled.open(), pooled.open()]
        got = [[], []]  # type: list[list[Any]]
        for time_, frame in enumerate(x):
            if time_ in (2, 5):
                session[0].fails = True
                for future in [camera.push(frame) for camera in cameras]:
                    with pytest.raises(StreamError, match="out of memory"):
                        wait(future)
                session[0].fails = False
            for results, future in zip(got, [camera.push(frame) for camera in cameras], strict=True):
                results.append(wait(future))
        session[0].fails = True
        flushes = [camera.flush() for camera in cameras]
        for future in flushes:
            with pytest.raises(StreamError, match="out of memory"):
                wait(future)
        session[0].fails = False
        monkeypatch.undo()
        alone = dissect.Runner(model)
        wanted = [alone.step(frame) for frame in x]
        for results in got:
            same(results, wanted)
        alone.reset()
        same(wait([camera.push(x[0]) for camera in cameras]), [alone.step(x[0])] * 2)


# Queues.


@pytest.fixture
def held() -> Iterator[tuple[StreamPool, Any, Any, threading.Event]]:
    """A pool whose thread is busy until the event is set, and two streams, the first of which keeps it so."""
    go, there = threading.Event(), threading.Event()
    with pool(running_sum(), streams=2, max_wait=0.0, queue=2) as pooled:
        first, second = pooled.open(), pooled.open()

        def hold(_: Future[Any]) -> None:
            there.set()
            assert go.wait(SECONDS)

        with pooled._changed:  # the batch cannot start before the callback is there
            future = first.push(np.zeros(3, np.float32))
            future.add_done_callback(hold)
        assert there.wait(SECONDS)
        yield pooled, first, second, go
        go.set()


def test_backpressure(held: tuple[StreamPool, Any, Any, threading.Event]) -> None:
    _, _, stream, go = held
    one = np.ones(3, np.float32)
    futures = [stream.push(one), stream.push(one)]
    assert stream.waiting == 2
    for timeout in (0, 0.01):
        with pytest.raises(StreamError, match="2 frames of this stream wait already"):
            stream.push(one, timeout=timeout)
    later: list[Any] = []
    blocked = threading.Thread(target=lambda: later.append(stream.push(one)))
    blocked.start()
    blocked.join(0.05)
    assert blocked.is_alive(), "push waits for room"
    go.set()
    blocked.join(SECONDS)
    assert [int(out[0, 0]) for out in wait([*futures, *later])] == [1, 2, 3]


def test_a_cancelled_frame_was_never_seen(held: tuple[StreamPool, Any, Any, threading.Event]) -> None:
    _, _, stream, go = held
    one = np.ones(3, np.float32)
    first, second = stream.push(one), stream.push(5 * one)
    assert second.cancel()
    go.set()
    np.testing.assert_array_equal(wait(first), [[1, 1, 1]])
    np.testing.assert_array_equal(wait(stream.push(one)), [[2, 2, 2]])
    assert stream.frames == 2


def test_a_cancelled_frame_keeps_its_reset(held: tuple[StreamPool, Any, Any, threading.Event]) -> None:
    _, first, stream, go = held
    one = np.ones(3, np.float32)
    stream.push(one)
    stream.reset()
    assert stream.push(5 * one).cancel()
    first.push(one)
    first.reset()
    cancelled = first.push(one)
    go.set()
    cancelled.cancel()
    np.testing.assert_array_equal(wait(stream.push(one)), [[1, 1, 1]])
    np.testing.assert_array_equal(wait(first.push(one)) <= 2, [[True] * 3])


def test_closing_a_stream_drops_what_waits(held: tuple[StreamPool, Any, Any, threading.Event]) -> None:
    pooled, _, stream, go = held
    future, flush = stream.push(np.ones(3, np.float32)), stream.flush()
    with pytest.raises(StreamError, match=r"2 streams are open, .* streams=4"):
        pooled.open()
    stream.close()
    stream.close()
    assert future.cancelled()
    assert flush.cancelled()
    with pytest.raises(StreamError, match=r"The stream is closed; pool.open\(\) begins another"):
        stream.push(np.ones(3, np.float32))
    with pooled.open() as another:
        go.set()
        np.testing.assert_array_equal(wait(another.push(np.ones(3, np.float32))), [[1, 1, 1]])


def test_a_closed_pool_refuses(held: tuple[StreamPool, Any, Any, threading.Event]) -> None:
    pooled, first, stream, go = held
    one = np.ones(3, np.float32)
    waiting = [stream.push(one), stream.push(one), first.push(one)]
    errors: list[BaseException] = []

    def push() -> None:
        try:
            stream.push(one)
        except StreamError as error:
            errors.append(error)

    blocked = threading.Thread(target=push)
    blocked.start()
    blocked.join(0.05)
    closing = threading.Thread(target=pooled.close)
    closing.start()
    blocked.join(SECONDS)
    assert [str(error) for error in errors] == ["The pool is closed; make another dissect.StreamPool."]
    go.set()
    closing.join(SECONDS)
    pooled.close()
    for future in waiting:
        with pytest.raises(CancelledError):
            wait(future)
    for call in (pooled.open, lambda: first.push(one), first.flush):
        with pytest.raises(StreamError, match="The pool is closed"):
            call()
    assert not pooled._thread.is_alive()


def test_a_callback_may_push_but_never_waits_for_itself() -> None:
    with pool(running_sum(), streams=1, queue=1) as pooled:
        stream = pooled.open()
        seen: list[Any] = []
        done = threading.Event()

        def more(future: Future[Any]) -> None:
            seen.append(int(future.result()[0, 0]))
            if len(seen) == 3:
                stream.push(np.ones(3, np.float32))
                with pytest.raises(StreamError, match="wait already"):
                    stream.push(np.ones(3, np.float32))
                done.set()
            elif len(seen) < 3:
                stream.push(np.ones(3, np.float32)).add_done_callback(more)

        stream.push(np.ones(3, np.float32)).add_done_callback(more)
        assert done.wait(SECONDS)
        assert seen == [1, 2, 3]


def test_a_frame_is_copied() -> None:
    with pool(running_sum(), streams=2, max_wait=0.05) as pooled:
        stream, _ = pooled.open(), pooled.open()
        frame = np.ones(3, np.float32)
        future = stream.push(frame)
        frame[:] = 7
        np.testing.assert_array_equal(wait(future), [[1, 1, 1]])
        np.testing.assert_array_equal(wait(stream.push(np.ones((1, 3)))), [[2, 2, 2]])


def test_a_model_without_a_flush_warns() -> None:
    with pool(windows((3, 1, 1), live=True), streams=1) as pooled:
        stream = pooled.open()
        wait(stream.push(np.ones(2, np.float32)))
        with pytest.warns(RuntimeWarning, match="exported without a flush"):
            assert wait(stream.flush()) == []


@pytest.mark.parametrize("options", [{"streams": 0}, {"max_batch": 0}, {"queue": 0}, {"max_wait": -1.0}])
def test_options_that_make_no_sense(options: dict[str, Any]) -> None:
    with pytest.raises(StreamError, match="at least one stream"):
        StreamPool(running_sum(), **options)


def test_what_the_pool_says_of_itself() -> None:
    with pool(windows((5, 2, 2)), streams=2) as pooled:
        assert (pooled.delay, pooled.streams, pooled.costs) == (2, 0, ())
        assert [spec.name for spec in pooled.inputs] == ["frame"]
        with pooled.open() as stream:
            assert (pooled.streams, stream.frames, stream.waiting) == (1, 0, 0)

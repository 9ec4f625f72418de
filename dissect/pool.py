"""Many streams through one step model: frames arrive when they arrive, and go through in batches.

    with dissect.StreamPool("net.onnx", streams=16) as pool:
        camera = pool.open()
        scores = camera.push(frame).result()       # what Runner.step gives for this stream alone
        rest = camera.flush().result()
        camera.close()

Law: each stream gets what a :class:`~dissect.Runner` of its own would give it, whatever the others do and however their
frames interleave. Every stream has its clock, its resets, its flush; an error in one harms no other. One batch runs at a
time, on the pool's own thread; a frame starts at the latest ``max_wait`` seconds after it came, if no batch runs then.
Streams that sit a batch out keep their caches where they are (:mod:`dissect.seating`).
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dissect.batching import Batching, calibrated
from dissect.binding import Table
from dissect.contract import InputSpec
from dissect.errors import StreamError
from dissect.opening import NO_FLUSH, open_step
from dissect.serving import Progress, Server, Work
from dissect.sessions import Home, Provider
from dissect.tensors import Tensor, checked

__all__ = ["PoolStream", "StreamPool"]


class PoolStream:
    """One stream of a pool; made by :meth:`StreamPool.open`. Its methods may be called from any thread."""

    def __init__(self, pool: StreamPool) -> None:
        self._pool = pool
        self._queue: deque[Work] = deque()
        self._restart = False
        self._open = True
        self._progress = Progress()  # the pool's thread alone writes it

    @property
    def frames(self) -> int:
        """Frames that have gone through since the stream began."""
        return self._progress.frames

    @property
    def waiting(self) -> int:
        """Frames that wait."""
        return len(self._queue)

    def push(self, *frames: Any, timeout: float | None = None) -> Future[Any]:
        """Hands over a frame, one argument for each of the pool's inputs; the future gives what ``Runner.step`` would.

        The frame is copied. Where ``queue`` frames of this stream wait already, this waits for room, at most
        ``timeout`` seconds (None: for ever). A future that is cancelled before its batch starts takes its frame back.

        Raises :class:`~dissect.StreamError` for a frame of the wrong shape or kind, where no room came, and where the
        stream or the pool is closed; the stream then stays as it is.
        """
        return self._pool._push(self, frames, timeout)

    def flush(self) -> Future[list[Any]]:
        """Ends the stream behind the frames that wait: the outputs still inside, as ``Runner.flush``; then a fresh start.

        A model that was exported without a flush gives [], with a warning if outputs are lost by that.
        """
        contract = self._pool._contract
        if contract.role("length") is None and contract.delay > 0:
            warnings.warn(
                NO_FLUSH,
                RuntimeWarning,
                stacklevel=2,
            )
        return self._pool._push(self, None, None)

    def reset(self) -> None:
        """The next frame that is pushed begins a fresh stream; those that wait still belong to the old one."""
        with self._pool._changed:
            self._restart = True

    def close(self) -> None:
        """Leaves the pool. What still waits is dropped and its futures cancelled: :meth:`flush` first to have all."""
        self._pool._leave(self)

    def __enter__(self) -> PoolStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class StreamPool:
    """Streams that come and go, through one session, in batches.

    Args:
        model: the ONNX file that :func:`dissect.export` wrote, or its bytes.
        streams: how many can be open at once; room for the caches of all of them is taken at the start.
        max_batch: how many go through at once at most. How many do is decided by what batches cost here.
        max_wait: seconds that a frame waits for others to come.
        queue: frames of one stream that may wait; then its ``push`` waits.
        calibrate: measure what batches of several sizes cost when the pool is made, so that none is run that is
            slower than smaller ones; without it, all that is ready goes at once.
        providers, threads, options, spin: as for :class:`dissect.Runner`.

    Callbacks of the futures run on the pool's thread: one that takes long holds up every stream.
    Raises :class:`dissect.StreamError` for a file that is no step model.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | bytes,
        streams: int = 8,
        max_batch: int = 8,
        max_wait: float = 0.01,
        queue: int = 4,
        calibrate: bool = True,
        providers: str | Sequence[Provider] | None = None,
        threads: int | None = None,
        options: Any = None,
        spin: bool | None = None,
    ) -> None:
        if streams < 1 or max_batch < 1 or queue < 1 or max_wait < 0:
            raise StreamError(
                "A pool has at least one stream, a batch and a queue of at least 1, and no negative wait."
            )
        self.max_wait, self.queue = max_wait, queue
        opened = open_step(model, providers, threads, options, spin, rings=False)
        self._contract = opened.contract
        table = Table(opened, streams, min(max_batch, streams))
        self._capacity = streams
        self._batching = calibrated(table) if calibrate else Batching.greedy(table.batch)
        self._server = Server(table)
        self._like = [Tensor((1, *frames.shape[1:]), frames.dtype.name, Home()) for frames in table.frames]
        self._streams: list[PoolStream] = []
        self._gone: list[PoolStream] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="dissect-pool", daemon=True)
        self._thread.start()

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The frame inputs, in the order in which ``push`` takes them."""
        return self._contract.inputs

    @property
    def delay(self) -> int:
        """Frames between a frame's arrival and the output that is centred on it; the largest over the outputs."""
        return self._contract.delay

    @property
    def streams(self) -> int:
        """How many streams are open."""
        return len(self._streams)

    @property
    def costs(self) -> tuple[float, ...]:
        """Seconds that a batch of 1, 2, ... streams took when the pool was made; empty without ``calibrate``."""
        return self._batching.costs

    @property
    def batches(self) -> dict[int, int]:
        """How many batches of each size there have been."""
        return dict(sorted(self._server.batches.items()))

    @property
    def moved(self) -> int:
        """How often the caches of a stream had to be copied to lie beside those of its batch."""
        return self._server.seats.moved

    def open(self) -> PoolStream:
        """A fresh stream. Raises :class:`~dissect.StreamError` where ``streams`` are open, or the pool is closed."""
        with self._changed:
            self._check_open()
            if len(self._streams) >= self._capacity:
                raise StreamError(
                    f"{self._capacity} streams are open, and the pool has no more room: close one, or make the pool "
                    f"with streams={2 * self._capacity}."
                )
            stream = PoolStream(self)
            self._streams.append(stream)
            return stream

    def close(self) -> None:
        """Ends the pool: the batch that runs is finished, all that waits is cancelled, every later call refused."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        for stream in list(self._streams):
            stream.close()

    def __enter__(self) -> StreamPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # On the callers' threads.

    def _push(self, stream: PoolStream, frames: Sequence[Any] | None, timeout: float | None) -> Future[Any]:
        arrays: list[NDArray[Any]] | None = None
        if frames is not None:
            if len(frames) != len(self.inputs):
                names = ", ".join(spec.name for spec in self.inputs)
                raise StreamError(f"push() takes {len(self.inputs)} frame(s) ({names}), and {len(frames)} were given.")
            arrays = [
                np.array(checked(frame, like, spec), like.dtype).reshape(like.shape[1:])
                for frame, like, spec in zip(frames, self._like, self.inputs, strict=True)
            ]
        if threading.current_thread() is self._thread:
            timeout = 0  # a callback: nobody would make room while it waits
        with self._changed:
            room = self._changed.wait_for(
                lambda: self._closed or not stream._open or arrays is None or len(stream._queue) < self.queue, timeout
            )
            self._check_open()
            if not stream._open:
                raise StreamError("The stream is closed; pool.open() begins another.")
            if not room:
                raise StreamError(
                    f"{self.queue} frames of this stream wait already, and none went through in time: the frames come "
                    "faster than the network runs. Drop this one, or give push() more time."
                )
            work = Work(Future(), time.monotonic(), arrays, stream._restart)
            stream._restart = False
            stream._queue.append(work)
            self._changed.notify_all()
        return work.future

    def _leave(self, stream: PoolStream) -> None:
        with self._changed:
            if not stream._open:
                return
            stream._open = False
            self._streams.remove(stream)
            self._gone.append(stream)
            dropped = list(stream._queue)
            stream._queue.clear()
            if stream._progress.tail is not None:
                dropped.append(stream._progress.tail.work)
            self._changed.notify_all()
        for work in dropped:
            work.future.cancel()

    def _check_open(self) -> None:
        if self._closed:
            raise StreamError("The pool is closed; make another dissect.StreamPool.")

    # On the pool's thread.

    def _serve(self) -> None:
        try:
            while (batch := self._next()) is not None:
                flushes = [
                    (progress, work) for progress, work in batch if work.frames is None and progress.tail is None
                ]
                for progress, work in flushes:
                    self._server.begin_flush(progress, work)
                if not flushes:
                    self._server.step(batch)
        except BaseException:  # a bug of ours: nobody shall wait for ever
            with self._changed:
                self._closed = True
                self._changed.notify_all()
            for stream in list(self._streams):
                stream.close()
            raise

    def _next(self) -> list[tuple[Progress, Work]] | None:
        """Waits for a batch, and takes it off the queues: flushes to begin, or frames at one phase. None: all is over."""
        with self._changed:
            while not self._closed:
                for stream in self._gone:
                    self._server.release(stream._progress)
                self._gone.clear()
                ready = sorted((stream for stream in self._streams if _waits(stream)), key=_since)
                begun = [stream for stream in ready if _begins_flush(stream)]
                if not ready:
                    self._changed.wait()
                    continue
                phase = self._phase(ready[0])
                group = [stream for stream in ready if self._phase(stream) == phase]
                rest = _since(ready[0]) + self.max_wait - time.monotonic()
                missing = any(not _waits(stream) and self._phase(stream) == phase for stream in self._streams)
                if not begun and missing and rest > 0 and len(group) < self._batching.enough:
                    self._changed.wait(rest)
                    continue
                taken = self._taken(begun or group[: self._batching.take(len(group))])
                if taken:
                    return taken
            return None

    def _taken(self, streams: Sequence[PoolStream]) -> list[tuple[Progress, Work]]:
        """The heads of the queues of ``streams``, without those that were cancelled."""
        taken = []
        for stream in streams:
            if stream._progress.tail is not None:
                taken.append((stream._progress, stream._progress.tail.work))
                continue
            work = stream._queue.popleft()
            flush = work.frames is None
            if not work.future.cancelled() if flush else work.future.set_running_or_notify_cancel():
                taken.append((stream._progress, work))
            elif work.fresh and stream._queue:
                stream._queue[0].fresh = True
            else:
                stream._restart = stream._restart or work.fresh
        self._changed.notify_all()  # there is room in queues
        return taken

    def _phase(self, stream: PoolStream) -> int:
        """The phase of the stream's next step."""
        fresh = stream._queue[0].fresh if stream._queue else stream._restart
        return 0 if fresh and stream._progress.tail is None else stream._progress.time % self._contract.period


def _waits(stream: PoolStream) -> bool:
    return stream._progress.tail is not None or bool(stream._queue)


def _begins_flush(stream: PoolStream) -> bool:
    return stream._progress.tail is None and bool(stream._queue) and stream._queue[0].frames is None


def _since(stream: PoolStream) -> float:
    """When the stream's next frame came."""
    return stream._progress.tail.work.arrived if stream._progress.tail is not None else stream._queue[0].arrived

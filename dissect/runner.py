"""Runs step models: numpy and ONNX Runtime alone, torch is never imported.

    run = dissect.Runner("net.onnx")
    for frame in camera:
        scores = run.step(frame)          # None while no output exists yet
    tail = run.flush()                    # the delayed outputs, in order

A runner holds ``batch`` streams, each with its own clock, in the rows of one batch. A step reads and writes buffers
that were allocated and bound when the runner was made; all that it allocates is the copy of its result.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dissect.binding import BoundStep
from dissect.contract import CacheSpec, InputSpec, OutputSpec, pack
from dissect.errors import StreamError
from dissect.opening import NO_FLUSH, open_step
from dissect.sessions import Provider
from dissect.tensors import checked

__all__ = ["Runner", "Snapshot"]

Rows = int | slice | Sequence[int] | Sequence[bool] | NDArray[Any]


@dataclass(frozen=True)
class Snapshot:
    """Streams at one moment, in host memory: pickle it, keep it, restore it into any runner of the same file."""

    model: str
    rows: tuple[int, ...]
    frames: NDArray[np.int64]
    caches: tuple[NDArray[Any], ...]


class Runner:
    """Streams frames through a step model, ``batch`` streams at a time.

    Args:
        path_or_bytes: the ONNX file that :func:`dissect.export` wrote, or its bytes.
        batch: how many streams run side by side.
        providers: ONNX Runtime's providers, best first, by full or short name (``"cuda"``); None takes CUDA where it
            works, else the CPU. A provider that does not load costs one warning.
        threads: threads of one operator; None takes one for each core, 1 where the cores have other work.
        spin: whether threads that wait for work spin. None: during a step, and sleep between steps, so that a
            camera's pauses cost nothing. True: always, for frames without pauses. False: never, for busy machines.
        options: an ``onnxruntime.SessionOptions``, taken as it is, or a mapping of session configuration entries, as
            ``{"session.disable_prepacking": "1"}``.

    Raises :class:`dissect.StreamError` for a file that is missing, no ONNX, no step model, or of a newer format.
    A runner is not thread-safe: one thread steps it at a time.
    """

    def __init__(
        self,
        path_or_bytes: str | os.PathLike[str] | bytes,
        batch: int = 1,
        providers: str | Sequence[Provider] | None = None,
        threads: int | None = None,
        options: Any = None,
        spin: bool | None = None,
    ) -> None:
        if batch < 1:
            raise StreamError(f"batch={batch}: a runner holds at least one stream.")
        self._opened = open_step(path_or_bytes, providers, threads, options, spin)
        self._contract = self._opened.contract
        self._bound = BoundStep(self._opened, batch)
        phases = range(self._contract.period)
        self._due = [[self._contract.output_due(spec, phase) for spec in self.outputs] for phase in phases]
        self._delays = np.array([[output.delay] for output in self._contract.outputs], np.int64)
        self._frames = np.zeros(batch, np.int64)
        self._seen = np.zeros((len(self._contract.outputs), batch), bool)  # rows that have seen an output's first frame
        self._all_seen = False

    # What the model is.

    @property
    def delay(self) -> int:
        """Frames between a frame's arrival and the output that is centred on it; the largest over the outputs."""
        return self._contract.delay

    @property
    def receptive_field(self) -> int:
        """Frames that one output depends on."""
        return self._contract.receptive_field

    @property
    def warmup(self) -> int:
        """Frames until the receptive field lies inside the stream."""
        return self._contract.warmup

    @property
    def stride(self) -> int:
        """Frames between two of the offline network's outputs."""
        return self._contract.stride

    @property
    def cadence(self) -> str:
        """``"every"``: an output at each frame. ``"native"``: those of the offline network alone."""
        return self._contract.cadence

    @property
    def period(self) -> int:
        """Frames after which it repeats which layers are due; 1 where all of them are at every frame."""
        return self._contract.period

    @property
    def preset(self) -> str:
        """The preset that the model was dissected with."""
        return self._contract.preset

    @property
    def labels(self) -> tuple[str, ...] | None:
        """The names of the classes; None if the file holds none."""
        return self._contract.labels

    @property
    def preprocess(self) -> dict[str, Any] | None:
        """How to make a frame of an image: size, mean, std, range, color, layout, frame_stride; None if nobody said."""
        return self._contract.preprocess

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """The frame inputs of one step, in the order in which :meth:`step` takes them."""
        return self._contract.inputs

    @property
    def outputs(self) -> tuple[OutputSpec, ...]:
        """The outputs, in the order of the leaves of the result's structure."""
        return self._contract.outputs

    @property
    def caches(self) -> tuple[CacheSpec, ...]:
        """What is kept from one step to the next."""
        return self._contract.caches

    @property
    def cache_bytes(self) -> int:
        """Bytes of the caches of one stream; a runner holds them twice for each of its rows."""
        return self._contract.cache_bytes

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's metadata as they stand there, other programs' entries included."""
        return self._opened.metadata

    @property
    def providers(self) -> list[str]:
        """The providers that the session runs with, best first."""
        return list(self._opened.sessions[0].get_providers())

    # Where the streams are.

    @property
    def batch(self) -> int:
        """How many streams run side by side."""
        return self._bound.batch

    @property
    def frames(self) -> NDArray[np.int64]:
        """Frames that each row has seen, ``(batch,)``; a copy."""
        return self._frames.copy()

    @property
    def ready(self) -> NDArray[np.bool_]:
        """Which rows have a real output in the last result, ``(batch,)``; the other rows of it mean nothing."""
        return np.asarray(self.exists.any(axis=0))

    @property
    def exists(self) -> NDArray[np.bool_]:
        """Which rows are real in each output of the last result, ``(outputs, batch)``: outputs may differ in delay."""
        due = np.array(self._due[(self._bound.turn - 1) % self.period])
        real: NDArray[np.bool_] = np.logical_and(self._seen, due[:, None])
        return real

    def __repr__(self) -> str:
        return (
            f"<Runner {self.preset or 'step model'}: {self.batch} stream(s), delay {self.delay}, "
            f"{len(self.caches)} caches of {self.cache_bytes} bytes a stream, {self.providers[0]}>"
        )

    # What can be done with them.

    def step(self, *frames: Any, copy: bool = True) -> Any:
        """One frame for every row, one argument for each of :attr:`inputs`; the newest outputs, or None.

        A frame is an array of ``inputs[i].shape``, ``(batch, ...)``; with ``batch=1`` the first axis may lack. It is
        converted within its kind (float64 to float32), never between kinds: bytes are not normalised pixels.
        The result is an array ``(batch, ...)``, or the model's structure of arrays (tuples and dicts); None while no
        row has an output yet, and, in the native cadence, at frames without a position. An output that exists in no
        row is None in the structure; for rows that are at different times see :attr:`ready`.
        With ``copy=False`` the arrays are the runner's own: read only, and overwritten by the next step but one.

        Raises :class:`dissect.StreamError` for a frame of the wrong shape or kind; the streams then stay as they are.
        """
        targets = self._bound.frames
        if len(frames) != len(targets):
            names = ", ".join(spec.name for spec in self.inputs)
            raise StreamError(f"step() takes {len(targets)} frame(s) ({names}), and {len(frames)} were given.")
        arrays = [
            checked(frame, target, spec) for frame, target, spec in zip(frames, targets, self.inputs, strict=True)
        ]
        for array, target in zip(arrays, targets, strict=True):
            target.fill(array)
        self._bound.run()
        self._frames += 1
        due = self._due[(self._bound.turn - 1) % self.period]
        if not self._all_seen:
            np.greater(self._frames, self._delays, out=self._seen)
            self._all_seen = bool(self._seen.all())
            due = [there and bool(row.any()) for there, row in zip(due, self._seen, strict=True)]
        return self._result(self._bound, due, copy)

    def flush(self, row: int | None = None) -> list[Any]:
        """Ends streams: the outputs that are still inside, in order, as from :meth:`step`; then a fresh start.

        Steps on without frames until the offline network's last position for the frames that were seen; [] if nothing
        is inside or no frame came. ``row=None`` ends every row, which must have seen equally many frames; ``row=i``
        ends that stream alone, with results of batch 1, and leaves the others where they are.

        A model that was exported without a flush gives [] too, with a warning if outputs are lost by that.
        Raises :class:`dissect.StreamError` where rows have seen different numbers of frames.
        """
        rows = self._rows(row)
        self._check_phase(rows, 0)
        if row is not None and len(rows) != 1:
            raise StreamError(f"flush(row={row!r}): give one row, or None for all of them.")
        frames = int(self._frames[rows[0]])
        if (self._frames[rows] != frames).any():
            raise StreamError(
                f"The rows have seen {self._frames.tolist()} frames, so their last outputs do not come together: "
                "flush them one by one with flush(row=0), flush(row=1), ..."
            )
        try:
            return self._drain(rows, frames)
        finally:
            self.reset(rows)

    def reset(self, rows: Rows | None = None) -> None:
        """Makes ``rows`` (None: all) fresh streams at frame 0, at a scene cut or for a new camera; no trace is left.

        In the native cadence the rows of a batch share their phase: raises :class:`dissect.StreamError` for some of
        them in the middle of a period.
        """
        chosen = np.unique(self._rows(rows))
        self._check_phase(chosen, 0)
        self._bound.clear(chosen)
        self._restart(chosen, 0)

    def snapshot(self, rows: Rows | None = None) -> Snapshot:
        """A copy of the streams in ``rows`` (None: all), to go back to or to move elsewhere with :meth:`restore`."""
        chosen = self._rows(rows)
        return Snapshot(
            self._opened.fingerprint, tuple(chosen.tolist()), self._frames[chosen], tuple(self._bound.read(chosen))
        )

    def restore(self, snapshot: Snapshot, rows: Rows | None = None) -> None:
        """Puts the streams of ``snapshot`` into ``rows``, in order (None: the rows that they were taken from).

        Raises :class:`dissect.StreamError` if the snapshot is another model's or its size is not that of ``rows``.
        """
        if snapshot.model != self._opened.fingerprint:
            raise StreamError(
                "The snapshot was taken from another model; caches fit only the file that they came from."
            )
        chosen = self._rows(snapshot.rows if rows is None else rows)
        if len(chosen) != len(snapshot.rows):
            raise StreamError(
                f"The snapshot holds {len(snapshot.rows)} stream(s), and {len(chosen)} row(s) were named."
            )
        phases = {int(frames) % self.period for frames in snapshot.frames}
        if len(phases) > 1:
            raise StreamError("The streams of the snapshot are at different phases, which one batch cannot be.")
        for phase in phases:
            self._check_phase(np.unique(chosen), phase)
            self._bound.write(chosen, snapshot.caches, phase)
        self._restart(chosen, snapshot.frames)

    def _drain(self, rows: NDArray[np.intp], frames: int) -> list[Any]:
        last = self._contract.last(frames)
        if frames == 0 or last < frames:
            return []
        age, length = self._contract.role("age"), self._contract.role("length")
        if age is None or length is None:
            warnings.warn(
                NO_FLUSH,
                RuntimeWarning,
                stacklevel=3,
            )
            return []
        bound = self._bound
        if len(rows) < self.batch:
            # Beside the batch, not in it: the other rows' caches must not see these steps.
            caches = bound.read(rows)
            bound, rows = BoundStep(self._opened, 1, frames % self.period), np.arange(1)
            bound.write(rows, caches)
        bound.copy_one(age, length)
        for target, spec in zip(bound.frames, self.inputs, strict=True):
            target.fill(np.zeros(target.shape, spec.dtype))
        ends = [output.last(frames) for output in self.outputs]
        results: list[Any] = []
        for time in range(frames, last + 1):
            bound.run()
            due = self._due[time % self.period]
            real = [
                there and output.delay <= time <= end
                for there, output, end in zip(due, self.outputs, ends, strict=True)
            ]
            result = self._result(bound, real, copy=True)
            if result is not None:  # a stream shorter than the delay has steps before its first output
                results.append(result)
        return results

    def _result(self, bound: BoundStep, real: list[bool], copy: bool) -> Any:
        """The outputs of the last run; ``real`` says which of them exist at all."""
        if not any(real):
            return None
        leaves = [
            (array.copy() if copy and array is not None else array) if there else None
            for array, there in zip(bound.results, real, strict=True)
        ]
        return pack(self._contract.structure, leaves)

    def _check_phase(self, rows: NDArray[np.intp], phase: int) -> None:
        """Raises where ``rows``, unless they are all, would be at another phase than the others."""
        now = self._bound.turn % self.period
        if len(rows) < self.batch and now != phase:
            raise StreamError(
                f"The rows of a batch share their phase in a native cadence of {self.period} frames, and they are at "
                f"frame {now} of it, not {phase}: take all rows, or step {(phase - now) % self.period} more frames first."
            )

    def _restart(self, rows: NDArray[np.intp], frames: NDArray[np.int64] | int) -> None:
        self._frames[rows] = frames
        self._seen[:, rows] = False
        self._all_seen = False

    def _rows(self, rows: Rows | None) -> NDArray[np.intp]:
        every = np.arange(self.batch)
        if rows is None:
            return every
        try:
            index = rows if isinstance(rows, slice) else np.asarray(rows)
            chosen = every[index] if isinstance(index, slice) or index.size else every[:0]
        except (IndexError, TypeError, ValueError) as error:
            raise StreamError(
                f"There is no row {rows!r} in a batch of {self.batch}: give 0 to {self.batch - 1}."
            ) from error
        return np.atleast_1d(chosen)

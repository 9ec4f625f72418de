"""Calibrating: a step model's values over real streams, its caches evolving as they do in use.

A stream is a video, a clip as the offline network takes it (``.npy``, ``.npz`` or an array with time in its third
dimension), or any iterable of frames as :meth:`dissect.Runner.step` takes them. numpy and ONNX Runtime alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dissect.contract import Contract
from dissect.errors import StreamError
from dissect.playing import preprocess_of
from dissect.runner import Runner
from dissect.sessions import open_session
from dissect.video import Video

__all__ = ["Frames", "gives", "steps", "streams_of"]

Frames = tuple[NDArray[Any], ...]
"""One time of a stream: an array ``(1, ...)`` for each of the model's inputs."""

Feed = dict[str, NDArray[Any]]


def streams_of(source: Any, runner: Runner, limit: int) -> list[list[Frames]]:
    """The first ``limit`` frames of each stream that ``source`` holds, for the inputs of ``runner``.

    Raises :class:`~dissect.StreamError` for what is no stream of such frames.
    """
    found = []
    for stream in _streams(source, runner):
        frames = [
            tuple(_frame(part, spec) for part, spec in zip(parts, runner.inputs, strict=True))
            for parts in islice(stream, limit)
        ]
        found += [frames] if frames else []
    if not found:
        raise StreamError(f"{_name(source)} holds no frames.")
    return found


def _streams(source: Any, runner: Runner) -> list[Iterator[Sequence[Any]]]:
    """The rows of a clip are streams of their own; a video or an iterable is one."""
    count = len(runner.inputs)
    if isinstance(source, (str, os.PathLike)) and Path(source).suffix in (".npy", ".npz"):
        source = _loaded(Path(source), count)
    elif isinstance(source, (str, os.PathLike)):
        return [_pictures(source, runner)]
    clips = source if isinstance(source, tuple) else (source,)
    if all(hasattr(clip, "shape") for clip in clips):
        return _clips(clips, runner, source)
    return [_parts(source, count)]


def _parts(frames: Iterable[Any], count: int) -> Iterator[Sequence[Any]]:
    for frame in frames:
        parts = frame if isinstance(frame, (tuple, list)) else (frame,)
        if len(parts) != count:
            raise StreamError(f"A frame of this model has {count} part(s), and one of the stream has {len(parts)}.")
        yield parts


def _loaded(path: Path, count: int) -> tuple[NDArray[Any], ...]:
    try:
        held = np.load(path)
    except (OSError, ValueError) as error:
        raise StreamError(f"{path} cannot be read as an array: {error}") from error
    clips = (held,) if isinstance(held, np.ndarray) else tuple(held[name] for name in held.files)
    if len(clips) != count:
        raise StreamError(f"{path} holds {len(clips)} array(s); the model takes {count}.")
    return clips


def _clips(clips: Sequence[Any], runner: Runner, source: Any) -> list[Iterator[Sequence[Any]]]:
    """A stream for each row of clips ``(N, C, T, H, W)`` or ``(C, T, H, W)``."""
    rows = []
    for clip, spec in zip(clips, runner.inputs, strict=True):
        array = np.asarray(clip)
        array = array[None] if array.ndim == len(spec.shape) else array
        if array.ndim != len(spec.shape) + 1 or array.shape[:1] + array.shape[1:2] + array.shape[3:] != (
            len(array), *spec.shape[1:],
        ):  # fmt: skip
            channels, *space = spec.shape[1:]
            raise StreamError(
                f"{_name(source)}: a clip for {spec.name} is (N, {channels}, T, {', '.join(map(str, space))}), "
                f"and this one {array.shape}."
            )
        rows.append(array)
    return [_row([array[row] for array in rows]) for row in range(len(rows[0]))]


def _row(clips: Sequence[NDArray[Any]]) -> Iterator[Sequence[Any]]:
    """The frames of one stream; an input of a slower rate shows its last one until the next is there."""
    frames = clips[0].shape[1]
    for time in range(frames):
        yield [clip[:, time * clip.shape[1] // frames] for clip in clips]


def _pictures(source: Any, runner: Runner) -> Iterator[Sequence[Any]]:
    preprocess, _ = preprocess_of(runner)
    with Video(source) as video:
        for picture in video:
            if picture.index % preprocess.frame_stride == 0:
                frame = preprocess(picture.image)
                yield [frame] * len(runner.inputs)


def _frame(part: Any, spec: Any) -> NDArray[Any]:
    array = np.asarray(part, np.dtype(spec.dtype))
    shape = tuple(spec.shape[1:])
    if array.shape != shape and array.shape != (1, *shape):
        raise StreamError(f"{spec.name}: a frame is {shape}, and one of the stream {array.shape}.")
    return np.ascontiguousarray(array.reshape(1, *shape))


def _name(source: Any) -> str:
    return os.fspath(source) if isinstance(source, (str, os.PathLike)) else f"A {type(source).__name__}"


def steps(model: bytes, contract: Contract, streams: Iterable[Sequence[Frames]]) -> Iterator[tuple[int, Feed, Feed]]:
    """Step ``model`` through the streams, each from fresh caches and with its flush: the time, what goes in, what comes out.

    What is not due at a time keeps its place in what comes out (caches as they were, outputs of no meaning), see
    :func:`gives`.
    """
    session = open_session(model, "cpu")
    names = [entry.name for entry in session.get_outputs()]
    reset = {"reset": np.zeros(1, bool)} if any(entry.name == "reset" for entry in session.get_inputs()) else {}
    age, length = contract.role("age"), contract.role("length")
    for frames in streams:
        caches = {
            cache.input: np.zeros((1, *(int(size) for size in cache.shape[1:])), cache.dtype)
            for cache in contract.caches
        }
        blank = tuple(np.zeros_like(part) for part in frames[0])
        count = len(frames)
        for time in range(count if age is None or length is None else max(count, contract.last(count) + 1)):
            if time == count and age is not None and length is not None:
                caches[contract.caches[length].input] = caches[contract.caches[age].input]
            parts = frames[time] if time < count else blank
            feed = {**dict(zip((spec.name for spec in contract.inputs), parts, strict=True)), **caches, **reset}
            results = dict(zip(names, session.run(names, feed), strict=True))
            for cache in contract.caches:
                if time % cache.due[1] != cache.due[0]:
                    results[cache.output] = caches[cache.input]
            yield time, feed, results
            caches = {cache.input: results[cache.output] for cache in contract.caches}


def gives(contract: Contract, time: int, frames: int) -> bool:
    """Whether the first output has a position at a time of a stream of ``frames`` frames and its flush."""
    output = contract.outputs[0]
    late = time >= frames and time > output.last(frames)
    return time >= output.delay and not late and contract.output_due(output, time % contract.period)

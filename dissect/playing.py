"""Plays a video through a step model: pictures in, scores out, in order: :func:`play`.

Law: one :class:`Scores` for each frame that the step model answers, numbered by the picture that it is about; the
delayed ones come after the last picture, when the stream is flushed. numpy and ONNX Runtime alone.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dissect.contract import leaves_of
from dissect.errors import StreamError, VideoError
from dissect.preprocess import Preprocess
from dissect.runner import Runner
from dissect.video import Picture

__all__ = ["Scores", "play", "preprocess_of", "read_labels"]


@dataclass(frozen=True)
class Scores:
    """The scores (K,) for one picture: its number and time (seconds) in the video, and the milliseconds they took.

    The time taken is that of preprocessing and of the step that brought the scores out; 0 in a flush.
    """

    frame: int
    time: float
    values: NDArray[Any]
    ms: float

    def top(self, count: int, labels: Sequence[str] | None = None) -> list[tuple[str, float]]:
        """The ``count`` highest scores with their labels (their numbers where there are none), best first."""
        best = np.argsort(self.values, kind="stable")[::-1][:count]
        return [(labels[i] if labels and i < len(labels) else str(i), float(self.values[i])) for i in best]


def play(
    runner: Runner,
    pictures: Iterable[Picture],
    preprocess: Preprocess,
    output: str | None = None,
    softmax: bool = True,
) -> Iterator[Scores]:
    """Step ``runner`` through the pictures (every ``frame_stride``-th), flush it, and give the scores of each frame.

    ``output`` names the output that holds the scores, (1, K); None takes the first. ``softmax`` makes them add up to 1.
    Raises :class:`~dissect.errors.StreamError` for a step model whose inputs are no pictures or whose output is no
    list of scores. A :class:`~dissect.errors.VideoError` of the pictures is raised after the flush.
    """
    if runner.batch != 1:
        raise StreamError(f"One video is one stream: make the runner with batch=1, not {runner.batch}.")
    index, delay = _place(runner, output)
    _check_inputs(runner, preprocess)
    waiting: deque[tuple[int, float]] = deque()  # the frames whose scores are still to come
    apart = runner.outputs[index].stride if runner.period > 1 else 1  # frames between two outputs
    skipped = 0
    broken: VideoError | None = None
    upcoming = iter(pictures)
    while True:
        try:
            picture = next(upcoming, None)
        except VideoError as error:
            picture, broken = None, error
        if picture is None:
            break
        if picture.index % preprocess.frame_stride:
            continue
        waiting.append((picture.index, picture.time))
        began = time.perf_counter()
        frame = preprocess(picture.image)
        result = runner.step(*(_as(frame, spec.dtype) for spec in runner.inputs))
        taken = (time.perf_counter() - began) * 1e3
        values = _values(result, runner, index, softmax)
        if values is not None and len(waiting) > delay:
            yield Scores(*_after(waiting, skipped), values, taken)
            skipped = apart - 1
    for result in runner.flush():
        values = _values(result, runner, index, softmax)
        if values is not None and len(waiting) > skipped:
            yield Scores(*_after(waiting, skipped), values, 0.0)
            skipped = apart - 1
    if broken is not None:
        raise broken


def _after(waiting: deque[tuple[int, float]], skipped: int) -> tuple[int, float]:
    """The frame that the next output belongs to: those before it have none."""
    for _ in range(skipped):
        waiting.popleft()
    return waiting.popleft()


def preprocess_of(runner: Runner) -> tuple[Preprocess, bool]:
    """The preprocessing that the step model's file asks for, and True; or a guess by its input's shape, and False."""
    if runner.preprocess is not None:
        return Preprocess.from_json(runner.preprocess), True
    shape = runner.inputs[0].shape
    if len(shape) == 4 and shape[1] in (1, 3):
        size = (int(shape[2]), int(shape[3]))
        return (Preprocess(size) if shape[1] == 3 else Preprocess(size, (0.5,), (0.5,), color="gray")), False
    if len(shape) == 4 and shape[3] in (1, 3):
        return Preprocess((int(shape[1]), int(shape[2])), layout="nhwc"), False
    raise StreamError(
        f"The step model's input {runner.inputs[0].name} has the shape {list(shape)}, which is no picture."
    )


def read_labels(path: Path) -> tuple[str, ...]:
    """The labels in a text file, one a line; raises :class:`~dissect.errors.StreamError` where it cannot be read."""
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise StreamError(f"{path} cannot be read as a list of labels, one a line: {error}.") from error


def _place(runner: Runner, output: str | None) -> tuple[int, int]:
    """The index of the output that holds the scores, and its delay."""
    names = [spec.name for spec in runner.outputs]
    if output is not None and output not in names:
        raise StreamError(f"The step model has no output {output!r}; it has {', '.join(names)}.")
    index = names.index(output) if output is not None else 0
    return index, runner.outputs[index].delay


def _check_inputs(runner: Runner, preprocess: Preprocess) -> None:
    """Raise where a frame of this preprocessing does not fit the step model."""
    channels = len(preprocess.mean)
    shape = (channels, *preprocess.size) if preprocess.layout == "nchw" else (*preprocess.size, channels)
    for spec in runner.inputs:
        if tuple(spec.shape[1:]) != shape or spec.rate != 1:
            raise StreamError(
                f"The step model's input {spec.name} takes {list(spec.shape[1:])} at every {spec.rate}. frame, and the "
                f"preprocessing makes {list(shape)} at every one: feed this network from Python, with dissect.Runner."
            )


def _as(frame: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """The frame in the type of an input; a network that normalises by itself takes rounded bytes."""
    return np.clip(np.rint(frame), 0, 255).astype(np.uint8) if dtype == "uint8" else frame


def _values(result: Any, runner: Runner, index: int, softmax: bool) -> NDArray[Any] | None:
    """The scores (K,) in a result of the runner; None while they do not exist."""
    leaf = None if result is None else next(islice(leaves_of(result), index, None))
    if leaf is None:
        return None
    values = np.asarray(leaf, np.float64)
    if values.ndim != 2:
        name = runner.outputs[index].name
        raise StreamError(
            f"The output {name} has the shape {list(values.shape)}, which is no list of scores; name another with "
            "--output, or use dissect.Runner in Python."
        )
    values = np.asarray(values[0])
    if softmax:
        powers = np.exp(values - values.max())
        values = np.asarray(powers / powers.sum())
    return values

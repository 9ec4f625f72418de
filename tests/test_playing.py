"""Which scores belong to which picture, delay and flush included; against step models made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from step_models import Sketch, cache

from dissect import Runner
from dissect.contract import CacheSpec, Contract, InputSpec, OutputSpec
from dissect.errors import StreamError, VideoError
from dissect.playing import Scores, play, preprocess_of, read_labels
from dissect.preprocess import Preprocess
from dissect.video import Picture

PLAIN = Preprocess((4, 4), (0, 0, 0), (1, 1, 1), (0, 255))


def echo(dtype: str = "float32", **contract: Any) -> bytes:
    """A step whose scores are the mean of each channel of the frame."""
    sketch = Sketch()
    frame = "frame"
    if dtype != "float32":
        frame = sketch.op("Cast", "frame", to=1)
    sketch.op("ReduceMean", frame, sketch.const([2, 3], "int64"), out="scores", keepdims=0)
    made = Contract(
        (InputSpec("frame", ("batch", 3, 4, 4), dtype),), (OutputSpec("scores", length=((-1, 1),)),), (), **contract
    )
    return sketch.model(made, {"scores": ("batch", 3)})


def delayed(delay: int) -> bytes:
    """As :func:`echo`, ``delay`` frames later: each cache holds the scores of one frame before."""
    sketch = Sketch()
    now = sketch.op("ReduceMean", "frame", sketch.const([2, 3], "int64"), keepdims=0)
    caches = [cache(index, f"wait{index}", (3,)) for index in range(delay)]
    sketch.op("Identity", caches[-1].input, out="scores")
    for index, kept in enumerate(caches):
        sketch.op("Identity", now if index == 0 else caches[index - 1].input, out=kept.output)
    age = CacheSpec("cache_900.age", "new_cache_900.age", ("batch",), "int64", "age", "age")
    length = CacheSpec("cache_901.length", "new_cache_901.length", ("batch",), "int64", "length", "length")
    sketch.op("Add", age.input, sketch.const(1, "int64"), out=age.output)
    sketch.op("Identity", length.input, out=length.output)
    made = Contract(
        (InputSpec("frame", ("batch", 3, 4, 4)),),
        (OutputSpec("scores", delay=delay, length=((-1, 1),)),),
        (*caches, age, length),
        delay=delay,
    )
    return sketch.model(made, {"scores": ("batch", 3)})


def pictures(count: int, fail_after: int | None = None) -> Iterator[Picture]:
    """Pictures whose red is their number, at 10 a second."""
    for index in range(count):
        if index == fail_after:
            raise VideoError("broke off")
        image = np.zeros((6, 8, 3), np.uint8)
        image[..., 0] = index
        yield Picture(index, index / 10, image)


def played(runner: Runner, *given: Any, **options: Any) -> list[Scores]:
    return list(play(runner, *given, **{"softmax": False, **options}))


@pytest.mark.parametrize("delay", [0, 1, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 7])
def test_each_picture_gets_its_own_scores_once(delay: int, count: int) -> None:
    runner = Runner(delayed(delay) if delay else echo())
    for _ in range(2):  # a flushed runner is a fresh one
        found = played(runner, pictures(count), PLAIN)
        assert [scores.frame for scores in found] == list(range(count))
        np.testing.assert_allclose([scores.values[0] for scores in found], np.arange(count), atol=1e-3)
        np.testing.assert_allclose([scores.time for scores in found], np.arange(count) / 10)
        assert all(scores.ms > 0 for scores in found[: max(0, count - delay)])


@pytest.mark.parametrize("delay", [0, 2])
def test_what_came_before_a_break_is_played_and_flushed(delay: int) -> None:
    found = []
    with pytest.raises(VideoError, match="broke off"):  # noqa: PT012 - what came before the break is looked at
        for scores in play(Runner(delayed(delay) if delay else echo()), pictures(9, fail_after=5), PLAIN):
            found.append(scores.frame)
    assert found == list(range(5))


def test_frame_stride_takes_every_second_picture() -> None:
    found = played(Runner(echo()), pictures(7), Preprocess((4, 4), (0, 0, 0), (1, 1, 1), (0, 255), frame_stride=2))
    assert [scores.frame for scores in found] == [0, 2, 4, 6]


def test_bytes_go_to_a_network_that_takes_bytes() -> None:
    found = played(Runner(echo("uint8")), pictures(3), PLAIN)
    assert [round(scores.values[0]) for scores in found] == [0, 1, 2]


def test_softmax_and_the_best_labels() -> None:
    raw = played(Runner(echo()), pictures(4), PLAIN)[3]
    assert raw.top(2, ("red", "green", "blue"))[0][0] == "red"
    assert raw.top(1) == [("0", pytest.approx(3, abs=1e-3))]
    soft = played(Runner(echo()), pictures(4), PLAIN, softmax=True)[3]
    assert soft.values.sum() == pytest.approx(1)
    assert soft.values[0] == pytest.approx(np.exp(3) / (np.exp(3) + 2), abs=1e-3)


def test_the_file_names_its_preprocessing() -> None:
    runner = Runner(echo(preprocess=json.loads(PLAIN.to_json())))
    assert preprocess_of(runner) == (PLAIN, True)
    assert preprocess_of(Runner(echo())) == (Preprocess((4, 4)), False)


def test_what_does_not_fit() -> None:
    runner = Runner(echo())
    with pytest.raises(StreamError, match="the preprocessing makes"):
        played(runner, pictures(1), Preprocess((8, 8)))
    with pytest.raises(StreamError, match="it has scores"):
        played(runner, pictures(1), PLAIN, output="logits")
    with pytest.raises(StreamError, match="batch=1"):
        played(Runner(echo(), batch=2), pictures(1), PLAIN)


def test_labels_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("eating cake\n\nrunning\n")
    assert read_labels(tmp_path / "labels.txt") == ("eating cake", "running")
    with pytest.raises(StreamError, match="list of labels"):
        read_labels(tmp_path / "none.txt")

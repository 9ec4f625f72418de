"""Buffers and frames: nothing aliases, nothing is allocated, nothing is converted that should not be."""

from __future__ import annotations

import itertools
import time
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from step_models import allocated, convolutions, difference, offline_windows, running_sum, windows

from dissect import binding
from dissect.errors import StreamError
from dissect.runner import Runner
from dissect.sessions import Home
from dissect.tensors import Tensor


def clip(frames: int, channels: int = 2) -> NDArray[np.float32]:
    return np.random.default_rng(0).normal(size=(frames, channels)).astype(np.float32)


@pytest.mark.parametrize("home", [Home(), Home(resident=True, rebind=True)], ids=["host", "resident"])
@pytest.mark.parametrize(("shape", "dtype"), [((3, 5), "float32"), ((3,), "int64"), ((3, 0), "float16")])
def test_a_tensor_reads_back_what_was_written(home: Home, shape: tuple[int, ...], dtype: str) -> None:
    tensor = Tensor(shape, dtype, home)
    assert tensor.value.data_ptr() % 64 == 0
    every = np.arange(3)
    assert not tensor.read(every).any()
    filled = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    tensor.fill(filled)
    taken = tensor.read(every[1:])
    tensor.write(every[1:], 0)
    np.testing.assert_array_equal(taken, filled[1:])
    tensor.write(every[:2], taken)
    np.testing.assert_array_equal(tensor.read(every), np.concatenate([filled[1:], np.zeros_like(filled[:1])]))


def test_caches_are_never_read_and_written_in_one_buffer() -> None:
    table = Runner(windows((4, 1, 2)))._bound.table
    for turn in range(table.turns):
        read, written = (table.caches(at) for at in (turn, turn + 1))
        new = {cache.value.data_ptr() for at, cache in enumerate(written) if at not in table.model.moved}
        assert len(new) == len(written) - len(table.model.moved)
        assert not new & {cache.value.data_ptr() for cache in read}


def test_results_are_copies() -> None:
    run = Runner(windows((3, 2, 0)))
    x = clip(50)
    results = [run.step(frame) for frame in x]
    expected = offline_windows(x, 3, 2, 0)
    np.testing.assert_allclose(np.concatenate(results), expected, rtol=1e-5, atol=1e-5)
    results[0][:] = 7
    assert results[0].flags.writeable
    assert not any(np.shares_memory(a, b) for a, b in itertools.pairwise(results))


def test_without_a_copy_a_result_lives_until_the_next_but_one() -> None:
    run = Runner(difference())
    x = clip(9, 3)
    before = None
    for index, frame in enumerate(x):
        result = run.step(frame, copy=False)
        assert not result.flags.writeable
        if before is not None:
            np.testing.assert_array_equal(before[0], x[index - 1] - (x[index - 2] if index > 1 else 0))
        before = result


def test_the_frame_is_neither_kept_nor_changed() -> None:
    run = Runner(difference())
    frame = np.ones(3, np.float32)
    run.step(frame)
    frame[:] = 5
    np.testing.assert_array_equal(run.step(np.ones(3, np.float32)), [[0, 0, 0]])
    assert frame.tolist() == [5, 5, 5]


def test_a_step_allocates_nothing_but_its_result() -> None:
    run = Runner(convolutions(channels=8, size=32, layers=2), threads=1)
    frame = np.ones((1, 8, 32, 32), np.float32)
    for _ in range(3):
        run.step(frame, copy=False)
    assert allocated(run, frame, 20) < 4096, "one cache alone has 32 KB"


def test_a_step_costs_what_the_session_costs() -> None:
    """The target is 5% over ``session.run`` (``benchmarks/``); this only notices a step that does much more."""
    run = Runner(convolutions(channels=16, size=28, layers=2), threads=1)
    rng = np.random.default_rng(0)
    feed = {spec.name: rng.random((1, *spec.shape[1:]), np.float32) for spec in run.inputs}
    feed |= {cache.input: np.zeros((1, *cache.shape[1:]), cache.dtype) for cache in run.caches}
    frame, names = feed["frame"], [entry.name for entry in run._opened.sessions[0].get_outputs()]
    bare, step = [], []
    for _ in range(200):
        start = time.perf_counter()
        run._opened.sessions[0].run(names, feed)
        middle = time.perf_counter()
        run.step(frame)
        bare.append(middle - start)
        step.append(time.perf_counter() - middle)
    assert min(step) < 1.3 * min(bare)


# Frames.


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_frames_with_and_without_the_batch_axis(dtype: type) -> None:
    run = Runner(difference())
    np.testing.assert_array_equal(run.step(np.ones(3, dtype)), [[1, 1, 1]])
    np.testing.assert_array_equal(run.step(np.full((1, 3), 3, dtype)), [[2, 2, 2]])
    np.testing.assert_array_equal(run.step([4.0, 4.0, 4.0]), [[1, 1, 1]])


@pytest.mark.parametrize("resident", [False, True])
def test_a_frame_may_be_any_view(resident: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(binding, "home_of", lambda session: Home(resident=resident, rebind=resident))
    run = Runner(running_sum(4), batch=2)
    frame = np.arange(8, dtype=np.float64).reshape(4, 2).T[:, ::-1]
    np.testing.assert_array_equal(run.step(frame), frame)


@pytest.mark.parametrize(
    ("frame", "words"),
    [
        (np.ones(4, np.float32), r"frame: a frame has the shape \(1, 3\), or \(3,\); this one has \(4,\)"),
        (np.ones((2, 3), np.float32), r"this one has \(2, 3\)"),
        (np.ones((1, 1, 3), np.float32), r"this one has \(1, 1, 3\)"),
        (np.ones(3, np.uint8), r"frames are float32, and this one is uint8: .*run.preprocess.*/ 255"),
        (np.ones(3, np.int64), "this one is int64"),
        (np.ones(3, bool), "this one is bool"),
        (np.ones(3, np.complex64), r"complex64: convert it with frame.astype\(np.float32\)"),
        ([[1.0], [2.0, 3.0]], "numpy makes no array"),
    ],
)
def test_wrong_frames_are_refused_and_change_nothing(frame: Any, words: str) -> None:
    run = Runner(difference())
    run.step(np.ones(3, np.float32))
    with pytest.raises(StreamError, match=words):
        run.step(frame)
    assert run.frames.tolist() == [1]
    np.testing.assert_array_equal(run.step(np.ones(3, np.float32)), [[0, 0, 0]])


def test_a_batch_wants_its_axis() -> None:
    with pytest.raises(StreamError, match=r"shape \(2, 3\); this one has \(3,\)"):
        Runner(difference(), batch=2).step(np.ones(3, np.float32))


def test_a_model_of_bytes_takes_bytes() -> None:
    run = Runner(difference(dtype="uint8"))
    np.testing.assert_array_equal(run.step(np.full(3, 200, np.uint8)), [[200, 200, 200]])
    for wrong in (np.ones(3, np.float32), np.ones(3, np.int64)):
        with pytest.raises(StreamError, match=r"frames are uint8.*pixels as they come"):
            run.step(wrong)


@pytest.mark.parametrize("count", [0, 2])
def test_the_number_of_frames(count: int) -> None:
    with pytest.raises(StreamError, match=rf"takes 1 frame\(s\) \(frame\), and {count} were given"):
        Runner(difference()).step(*[np.ones(3, np.float32)] * count)

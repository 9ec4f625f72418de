"""The runner: streams against the offline definition, clocks, resets, snapshots, flushes, and what it refuses."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from step_models import difference, offline_windows, running_sum, windows

import dissect
from dissect import binding
from dissect.errors import StreamError
from dissect.runner import Runner
from dissect.sessions import Home

KERNELS = [(3, 1, 1), (3, 2, 0), (3, 0, 0), (4, 1, 2), (5, 0, 4), (2, 1, 0), (1, 0, 0)]


@pytest.fixture(params=["host", "resident", "resident, reset input", "resident, graphs"])
def graph_reset(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Host memory, or caches kept where numpy does not reach (as on a GPU, here played by the CPU); then also models
    that have the input ``reset``, which this gives."""
    if request.param != "host":
        home = Home("cpu", 0, resident=True, rebind=True, graphs=str(request.param).endswith("graphs"))
        monkeypatch.setattr(binding, "home_of", lambda session: home)
    return str(request.param).endswith("reset input")


def clip(frames: int, channels: int = 2, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(frames, channels)).astype(np.float32)


def stream(run: Runner, x: NDArray[np.float32]) -> list[Any]:
    """What the runner gives for a clip, step by step and flushed, without the steps that gave nothing."""
    given = [run.step(frame) for frame in x]
    return [result for result in given if result is not None] + run.flush()


# Streams against the offline definition.


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_stream_and_flush_are_the_offline_clip(kernel: tuple[int, int, int], stride: int, graph_reset: bool) -> None:
    run = Runner(windows(kernel, stride=stride, reset=graph_reset))
    for frames in (1, 2, 3, 4, 5, 8, 13):
        x = clip(frames, seed=frames)
        expected = offline_windows(x, *kernel, stride=stride)
        got = stream(run, x)
        assert len(got) == max(frames - run.delay, stride * (len(expected) - 1) + 1 if len(expected) else 0, 0)
        positions = [result[0] for result in got[::stride][: len(expected)]]
        np.testing.assert_allclose(np.reshape(positions, expected.shape), expected, rtol=1e-5, atol=1e-5)
        assert run.frames.tolist() == [0], "a flush ends in a fresh stream"


def test_none_for_the_first_delay_frames() -> None:
    run = Runner(windows((5, 2, 2)))
    assert run.delay == 2
    given = [run.step(frame) is None for frame in clip(4)]
    assert given == [True, True, False, False]
    assert len(run.flush()) == 2


def test_outputs_of_different_delay() -> None:
    kernels = ((1, 0, 0), (3, 1, 1), (5, 0, 4))
    run = Runner(windows(*kernels))
    assert (run.delay, [spec.delay for spec in run.outputs]) == (4, [0, 1, 4])
    for frames in (1, 3, 9):
        x = clip(frames, seed=frames)
        got = stream(run, x)
        assert all(set(result) == {"first", "rest"} and isinstance(result["rest"], tuple) for result in got)
        columns = [[result["first"] for result in got], *zip(*[result["rest"] for result in got], strict=True)]
        for kernel, column in zip(kernels, columns, strict=True):
            real = np.concatenate([leaf for leaf in column if leaf is not None])
            np.testing.assert_allclose(real, offline_windows(x, *kernel), rtol=1e-5, atol=1e-5)


def test_exists_says_which_output_is_real_in_which_row() -> None:
    run = Runner(windows((1, 0, 0), (3, 0, 2)), batch=2)
    x = clip(2)
    run.step(x)
    run.step(x)
    run.reset(1)
    result = run.step(x)
    assert run.exists.tolist() == [[True, True], [True, False]]
    assert run.ready.tolist() == [True, True]
    assert result["rest"][0].shape == (2, 2)


def test_thousands_of_steps() -> None:
    x = clip(6000)
    run = Runner(windows((5, 2, 2), stride=1))
    expected = offline_windows(x, 5, 2, 2)
    for time_, frame in enumerate(x):
        result = run.step(frame)
        if time_ >= 2:
            np.testing.assert_allclose(result[0], expected[time_ - 2], rtol=1e-4, atol=1e-4)
    assert run.frames.tolist() == [6000]
    assert len(run.flush()) == 2


# Many streams.


def test_rows_have_their_own_clocks(graph_reset: bool) -> None:
    batch, steps, kernel = 3, 40, (4, 1, 2)
    model = windows(kernel, reset=graph_reset)
    run = Runner(model, batch=batch)
    alone = [Runner(model) for _ in range(batch)]
    rng = np.random.default_rng(3)
    for _ in range(steps):
        x = rng.normal(size=(batch, 2)).astype(np.float32)
        result = run.step(x)
        singles = [single.step(frame) for single, frame in zip(alone, x, strict=True)]
        assert run.ready.tolist() == [single is not None for single in singles]
        assert (result is None) == all(single is None for single in singles)
        for row, single in enumerate(singles):
            if single is not None:
                np.testing.assert_array_equal(result[row], single[0])
        for row in np.flatnonzero(rng.random(batch) < 0.15):
            if rng.random() < 0.5:
                run.reset(int(row))
                alone[row].reset()
            else:
                np.testing.assert_array_equal(np.array(run.flush(int(row))), np.array(alone[row].flush()))
        assert run.frames.tolist() == [int(single.frames[0]) for single in alone]
    assert len({*run.frames.tolist()}) > 1, "the rows never parted: the test tests nothing"


def test_flush_of_one_row_leaves_the_others() -> None:
    run = Runner(windows((5, 0, 4)), batch=2)
    x = clip(12).reshape(6, 2, 2)
    for frame in x:
        run.step(frame)
    tail = run.flush(1)
    expected = offline_windows(x[:, 1], 5, 0, 4)
    assert [result.shape for result in tail] == [(1, 2)] * 4
    np.testing.assert_allclose(np.concatenate(tail), expected[2:], rtol=1e-5)
    assert run.frames.tolist() == [6, 0]
    assert run.ready.tolist() == [True, False]
    np.testing.assert_allclose(np.concatenate(run.flush(0)), offline_windows(x[:, 0], 5, 0, 4)[2:], rtol=1e-5)


def test_flush_of_all_rows_together() -> None:
    run = Runner(windows((3, 1, 1)), batch=3)
    x = clip(15).reshape(5, 3, 2)
    for frame in x:
        run.step(frame)
    (last,) = run.flush()
    np.testing.assert_allclose(last, np.stack([offline_windows(x[:, row], 3, 1, 1)[-1] for row in range(3)]), rtol=1e-5)


def test_flush_of_parted_clocks_is_refused() -> None:
    run = Runner(windows((3, 1, 1)), batch=2)
    run.step(clip(2))
    run.reset(1)
    run.step(clip(2))
    with pytest.raises(StreamError, match=r"\[2, 1\] frames.*flush\(row=0\)"):
        run.flush()
    assert run.frames.tolist() == [2, 1]


@pytest.mark.parametrize("frames", [0, 4])
def test_nothing_to_flush(frames: int) -> None:
    run = Runner(windows((3, 2, 0)))
    for frame in clip(frames):
        run.step(frame)
    assert run.flush() == []
    assert run.frames.tolist() == [0]
    assert Runner(difference()).flush() == []


def test_a_flush_that_was_not_exported_warns_of_what_it_loses() -> None:
    run = Runner(windows((3, 1, 1), live=True))
    for frame in clip(4):
        run.step(frame)
    with pytest.warns(RuntimeWarning, match="without a flush"):
        assert run.flush() == []
    assert run.frames.tolist() == [0]
    assert run.step(clip(1)[0]) is None


# Resets, snapshots.


@pytest.mark.parametrize("rows", [None, 1, [1], slice(1, 2), [False, True], np.array([1])], ids=str)
def test_reset_leaves_no_trace(rows: Any, graph_reset: bool) -> None:
    run = Runner(running_sum(reset=graph_reset), batch=2)
    x = np.ones((2, 3), np.float32)
    run.step(x)
    run.step(np.array([[1, 1, 1], [np.nan, np.inf, 1]], np.float32))
    assert np.isnan(run.step(x)[1, 0]), "a NaN stays until it is cleared"
    run.reset(rows)
    result = run.step(x)
    np.testing.assert_array_equal(result[1], [1, 1, 1])
    np.testing.assert_array_equal(result[0], [1, 1, 1] if rows is None else [4, 4, 4])
    np.testing.assert_array_equal(run.step(x)[1], [2, 2, 2])


def test_a_nan_does_not_cross_rows() -> None:
    run = Runner(windows((3, 1, 1)), batch=2)
    x = clip(20).reshape(10, 2, 2)
    x[4, 0] = np.nan
    results = np.stack([result for frame in x if (result := run.step(frame)) is not None])
    assert np.isfinite(results[:, 1]).all()
    assert np.isnan(results[3:6, 0]).all()
    assert np.isfinite(results[6:, 0]).all()


def test_snapshot_replays_identically(graph_reset: bool) -> None:
    run = Runner(windows((5, 1, 3), reset=graph_reset), batch=2)
    x = clip(60).reshape(30, 2, 2)
    for frame in x[:10]:
        run.step(frame)
    kept = pickle.loads(pickle.dumps(run.snapshot()))
    first = [run.step(frame) for frame in x[10:]]
    run.restore(kept)
    assert run.frames.tolist() == [10, 10]
    np.testing.assert_array_equal([run.step(frame) for frame in x[10:]], first)


def test_snapshot_moves_a_stream(graph_reset: bool) -> None:
    model = windows((3, 1, 1), reset=graph_reset)
    source, target = Runner(model), Runner(model, batch=3)
    x = clip(12)
    for frame in x[:6]:
        source.step(frame)
        target.step(np.zeros((3, 2), np.float32))
    target.reset(0)
    target.restore(source.snapshot(), rows=2)
    assert target.frames.tolist() == [0, 6, 6]
    for frame in x[6:]:
        expected, got = source.step(frame), target.step(np.stack([frame] * 3))
        np.testing.assert_array_equal(got[2], expected[0])
    np.testing.assert_array_equal(target.flush(2), source.flush())


def test_snapshot_of_a_row_that_was_just_reset_is_fresh(graph_reset: bool) -> None:
    run = Runner(running_sum(reset=graph_reset), batch=2)
    x = np.ones((2, 3), np.float32)
    run.step(x)
    run.reset(1)
    kept = run.snapshot()
    assert kept.frames.tolist() == [1, 0]
    run.step(x)
    run.restore(kept, rows=[1, 0])
    np.testing.assert_array_equal(run.step(x), [[1, 1, 1], [2, 2, 2]])


def test_snapshots_that_do_not_fit_are_refused() -> None:
    run = Runner(difference(), batch=2)
    with pytest.raises(StreamError, match="another model"):
        run.restore(Runner(difference(preset="causal"), batch=2).snapshot())
    with pytest.raises(StreamError, match=r"holds 2 stream\(s\), and 1"):
        run.restore(run.snapshot(), rows=0)
    with pytest.raises(StreamError, match="no row"):
        Runner(difference()).restore(run.snapshot(1))


@pytest.mark.parametrize("rows", [2, -3, [0, 5], "all", 1.5], ids=str)
def test_rows_that_are_not_there(rows: Any) -> None:
    with pytest.raises(StreamError, match=r"no row .* in a batch of 2"):
        Runner(difference(), batch=2).reset(rows)


def test_no_rows_at_all_is_no_work() -> None:
    run = Runner(difference(), batch=2)
    run.step(clip(2, 3))
    run.reset([])
    assert run.frames.tolist() == [1, 1]


# The file.


def test_what_a_runner_says_of_its_model() -> None:
    about = {
        "preset": "exact",
        "labels": ("a", "b", "c"),
        "preprocess": {"size": [8, 8]},
        "warmup": 1,
        "receptive_field": 2,
    }
    run = Runner(difference(**about), batch=2)
    assert (run.preset, run.labels, run.preprocess) == ("exact", ("a", "b", "c"), {"size": [8, 8]})
    assert (run.delay, run.stride, run.warmup, run.receptive_field) == (0, 1, 1, 2)
    assert (run.batch, run.cache_bytes, run.frames.tolist()) == (2, 12, [0, 0])
    assert [spec.name for spec in run.inputs] == ["frame"]
    assert [spec.input for spec in run.caches] == ["cache_000.last"]
    assert run.metadata["dissect.format_version"] == "1"
    assert "exact: 2 stream(s), delay 0" in repr(run)


def test_ready_and_frames_are_the_callers_own() -> None:
    run = Runner(difference())
    run.step(np.ones(3, np.float32))
    run.frames[:] = 9
    run.ready[:] = False
    assert (run.frames.tolist(), run.ready.tolist()) == ([1], [True])


def test_a_file_and_its_bytes_are_one_model(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(difference())
    Runner(path).restore(Runner(difference()).snapshot())
    Runner(str(path)).restore(Runner(difference()).snapshot())


def test_a_file_that_is_no_step_model() -> None:
    import onnx

    plain = onnx.load_from_string(difference())
    del plain.metadata_props[:]
    with pytest.raises(StreamError, match=r"no step model.*dissect convert"):
        Runner(plain.SerializeToString())


@pytest.mark.parametrize(
    ("find", "replace", "words"),
    [
        ('"name":"frame"', '"name":"image"', "image .* is not in the graph"),
        ('"name":"output"', '"name":"scores"', "scores .* is not in the graph"),
        ('"dtype":"float32","path"', '"dtype":"float16","path"', "is float32 in the graph"),
        ('[{"input":"cache_000.last"', "[]", "metadata do not name.*cache_000.last"),
    ],
)
def test_metadata_and_graph_must_agree(find: str, replace: str, words: str) -> None:
    import onnx

    model = onnx.load_from_string(difference())
    for entry in model.metadata_props:
        if find in entry.value:
            entry.value = "[]" if replace == "[]" else entry.value.replace(find, replace)
    with pytest.raises(StreamError, match=words):
        Runner(model.SerializeToString())


def test_batches_that_cannot_be() -> None:
    with pytest.raises(StreamError, match="batch=0"):
        Runner(difference(), batch=0)
    with pytest.raises(StreamError, match="fixed at 1, so it cannot run 2; ask for batch=1"):
        Runner(difference(batch=1), batch=2)
    assert Runner(difference(batch=1)).step(np.ones(3, np.float32)) is not None


def test_running_never_imports_torch(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(windows((3, 1, 1)))
    code = (
        "import sys, numpy, dissect\n"
        f"run = dissect.Runner({str(path)!r})\n"
        "run.step(numpy.ones(2)); run.step(numpy.ones(2)); run.restore(run.snapshot()); run.flush(); run.reset()\n"
        "sys.exit(', '.join({'torch', 'onnx', 'torchvision'} & set(sys.modules)) or 0)\n"
    )
    root = str(Path(dissect.__file__).parent.parent)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")

"""Runners of step models in the native cadence, against the user's own network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from random_networks import scrambled
from step_models import allocated
from test_cadence import Net

import dissect
from dissect import binding
from dissect.contract import Contract
from dissect.errors import ExportError, StreamError
from dissect.opening import open_step
from dissect.sessions import Home

NETWORK = scrambled(Net(2, 2, head="each"), 0).float()


def clip(frames: int, batch: int = 1, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(batch, 2, frames, 5, 5)).astype(np.float32)


@pytest.fixture(scope="module")
def stream() -> dissect.Stream:
    return dissect.convert(NETWORK, torch.from_numpy(clip(12)), "exact")


@pytest.fixture(scope="module")
def model(stream: dissect.Stream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return dissect.export(stream, tmp_path_factory.mktemp("native") / "net.onnx", cadence="native")


@pytest.fixture(params=["host", "resident", "graphs"])
def home(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Host memory, or caches kept where numpy does not reach (as on a GPU, here played by the CPU)."""
    if request.param != "host":
        home = Home("cpu", 0, resident=True, rebind=True, graphs=request.param == "graphs")
        monkeypatch.setattr(binding, "home_of", lambda session: home)


def offline(x: NDArray[np.float32]) -> NDArray[np.float32]:
    """The network's own output, ``(batch, positions, 3)``."""
    with torch.no_grad():
        out: NDArray[np.float32] = NETWORK(torch.from_numpy(x)).numpy()
    return out


def stepped(run: dissect.Runner, x: NDArray[np.float32]) -> list[Any]:
    return [run.step(x[:, :, time]) for time in range(x.shape[2])]


@pytest.mark.parametrize("batch", [1, 3])
def test_stream_and_flush_are_the_network(model: Path, batch: int, home: None) -> None:
    run = dissect.Runner(model, batch)
    assert (run.cadence, run.period, run.stride) == ("native", 4, 4)
    for frames in (12, 11, 10, 9, 21, 1):
        x = clip(frames, batch, frames)
        given = stepped(run, x)
        there = [time for time, out in enumerate(given) if out is not None]
        assert there == list(range(run.delay, frames, 4)), "an output at each position, and nothing between"
        got = [out for out in given if out is not None] + run.flush()
        np.testing.assert_allclose(np.stack(got, 1), offline(x), rtol=1e-4, atol=1e-5)


def test_exists_and_ready_follow_the_positions(model: Path) -> None:
    run = dissect.Runner(model)
    for frame in range(20):
        out = run.step(clip(1)[:, :, 0])
        due = frame >= run.delay and (frame - run.delay) % 4 == 0
        assert (out is not None, run.ready.tolist(), run.exists.tolist()) == (due, [due], [[due]])


def test_a_long_stream_and_its_restarts(model: Path, home: None) -> None:
    run = dissect.Runner(model)
    x = clip(203, seed=1)
    for start in (0, 3, 6):  # stopped in the middle of a period
        stepped(run, x[:, :, : 50 + start])
        run.reset()
    got = [out for out in stepped(run, x) if out is not None] + run.flush()
    np.testing.assert_allclose(np.stack(got, 1), offline(x), rtol=1e-4, atol=1e-5)


def test_a_result_that_is_not_copied_lives_until_the_next_but_one(model: Path) -> None:
    run, again = dissect.Runner(model), dissect.Runner(model)
    x = clip(60)
    kept: list[Any] = []
    for time in range(60):
        out, want = run.step(x[:, :, time], copy=False), again.step(x[:, :, time])
        if out is not None:
            kept = [*kept[-1:], (out, want)]
        for view, wanted in kept:
            np.testing.assert_array_equal(view, wanted)


def test_rows_share_their_phase(model: Path, home: None) -> None:
    run = dissect.Runner(model, 2)
    x = clip(40, 2)
    stepped(run, x[:, :, :6])
    for call in (lambda: run.reset(1), lambda: run.flush(1)):
        with pytest.raises(StreamError, match=r"share their phase .* frame 2 of it, not 0: .* step 2 more frames"):
            call()
    assert run.frames.tolist() == [6, 6]
    stepped(run, x[:, :, 6:8])
    run.reset([1])
    assert run.frames.tolist() == [8, 0]
    given = [out for out in stepped(run, x[:, :, 8:]) if out is not None]
    rest = run.flush(1)
    got = np.concatenate([np.stack(given, 1)[1:], np.stack(rest, 1)], 1)
    wanted = offline(x[1:, :, 8:])
    late = got[:, -wanted.shape[1] :]
    np.testing.assert_allclose(late, wanted, rtol=1e-4, atol=1e-5)
    assert run.frames.tolist() == [40, 0]
    np.testing.assert_allclose(
        np.concatenate([np.stack(given, 1)[:1], np.stack(run.flush(0), 1)], 1)[:, -5:],
        offline(x[:1])[:, -5:],
        rtol=1e-4,
        atol=1e-5,
    )


def test_snapshots(model: Path, home: None) -> None:
    x = clip(40)
    run, other, pair = dissect.Runner(model), dissect.Runner(model), dissect.Runner(model, 2)
    wanted = stepped(run, x)
    stepped(other, x[:, :, :17])
    saved = other.snapshot()
    stepped(other, x[:, :, 17:22])
    for again in (other, dissect.Runner(model)):
        again.restore(saved)
        assert again.frames.tolist() == [17]
        for got, want in zip(stepped(again, x[:, :, 17:]), wanted[17:], strict=True):
            assert (got is None) == (want is None)
            if got is not None:
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(StreamError, match="share their phase"):
        pair.restore(saved, [0])
    pair.step(np.repeat(x[:, :, 0], 2, 0))
    pair.restore(saved, [0])
    assert pair.frames.tolist() == [17, 1]
    assert pair.snapshot([0]).frames.tolist() == [17]


def test_outputs_of_two_rates(tmp_path: Path) -> None:
    network = scrambled(Net(2, 2, head="two"), 0).float()
    stream = dissect.convert(network, torch.from_numpy(clip(12)), "exact")
    run = dissect.Runner(dissect.export(stream, tmp_path / "net.onnx", cadence="native"))
    x = clip(12)
    with torch.no_grad():
        wanted = network(torch.from_numpy(x))
    results = [out for out in stepped(run, x) if out is not None] + run.flush()
    early = [out["early"] for out in results if out["early"] is not None]
    np.testing.assert_allclose(np.stack(early, 2)[:, :, :12], wanted["early"].numpy(), rtol=1e-4, atol=1e-5)
    scores = [out["scores"] for out in results if out["scores"] is not None]
    np.testing.assert_allclose(scores[-1], wanted["scores"].numpy(), rtol=1e-4, atol=1e-5)
    assert len(scores) < len(early)


def test_a_session_for_each_phase_that_differs(model: Path) -> None:
    opened = open_step(model)
    assert len(opened.sessions) == 4
    assert len(opened.distinct) == 3
    sizes = {len(session.get_inputs()) + len(session.get_outputs()) for session in opened.distinct}
    assert len(sizes) == 3, "they do not all take all caches"
    whole = {entry.name for entry in onnx.load(model).graph.output}
    assert whole == {entry.name for session in opened.distinct for entry in session.get_outputs()}


def test_the_contract_says_what_is_due(model: Path, stream: dissect.Stream) -> None:
    entries = {entry.key: entry.value for entry in onnx.load(model).metadata_props}
    contract = Contract.from_metadata(entries)
    assert (contract.cadence, contract.period, contract.stride) == ("native", 4, 4)
    assert Contract.from_metadata(contract.to_metadata()) == contract
    due = {cache.path: cache.due for cache in contract.caches}
    assert due["age"] == (0, 1)
    assert due["blocks.1.conv2"][1] == 4
    for time in range(8):
        names = contract.due(time % 4)
        assert ("output" in names) == ((time - contract.delay) % 4 == 0)
    assert contract.cache_bytes < stream.cache_bytes / 2


def test_a_network_without_strides_is_the_same_file(tmp_path: Path) -> None:
    stream = dissect.convert(scrambled(Net(1), 0).float(), torch.from_numpy(clip(6)), "exact")
    every = dissect.export(stream, tmp_path / "every.onnx")
    native = dissect.export(stream, tmp_path / "native.onnx", cadence="native")
    assert every.read_bytes() == native.read_bytes()
    assert dissect.Runner(native).cadence == "every"


def test_what_is_refused(stream: dissect.Stream, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cadence 'daily' is unknown; there are every, native"):
        dissect.export(stream, tmp_path / "net.onnx", cadence="daily")
    with pytest.raises(ExportError, match="rows share their phase"):
        dissect.export(stream, tmp_path / "net.onnx", cadence="native", reset=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change", [{"dissect.period": "3"}, {"dissect.cadence": "weekly"}, {"dissect.period": "0"}, {"dissect.period": "x"}]
)
def test_a_damaged_cadence(model: Path, change: dict[str, str]) -> None:
    damaged = onnx.load(model)
    entries = {entry.key: entry.value for entry in damaged.metadata_props} | change
    onnx.helper.set_model_props(damaged, entries)
    with pytest.raises(StreamError, match=r"does not fit its caches|is damaged"):
        dissect.Runner(damaged.SerializeToString())


def test_verify_covers_it(stream: dissect.Stream, model: Path) -> None:
    report = dissect.verify(stream, NETWORK, onnx=model).check()
    assert ["native cadence" in row.what for row in report.rows[-2:]] == [True, True]
    assert all(row.error is not None for row in report.rows[-2:])
    other = dissect.convert(scrambled(Net(2, 2, head="each"), 1).float(), torch.from_numpy(clip(12)), "exact")
    assert not dissect.verify(other, onnx=model).ok


@pytest.mark.slow
@pytest.mark.parametrize(("name", "frames", "size"), [("r3d_18", 16, 32), ("r2plus1d_18", 16, 32), ("s3d", 16, 224)])
def test_public_networks(name: str, frames: int, size: int, tmp_path: Path) -> None:
    from public_networks import network, random_clip

    model = network(name, num_classes=11)
    x = random_clip((1, 3, frames, size, size))
    stream = dissect.convert(model, x, "exact")
    path = dissect.export(stream, tmp_path / "net.onnx", cadence="native")
    dissect.verify(stream, model, onnx=path).check()
    run = dissect.Runner(path, threads=1)
    assert run.period == stream.timing.stride == 8
    assert run.cache_bytes < 0.6 * stream.cache_bytes
    outputs = [out for out in stepped(run, x.numpy()) if out is not None] + run.flush()
    with torch.no_grad():
        wanted = model(x).numpy()
    np.testing.assert_allclose(outputs[-1], wanted, rtol=1e-3, atol=1e-4 * float(np.abs(wanted).max()))


def test_a_step_allocates_nothing(model: Path) -> None:
    run = dissect.Runner(model, threads=1)
    frame = clip(1)[:, :, 0]
    for _ in range(3 * run.period):
        run.step(frame, copy=False)
    assert allocated(run, frame, 4 * run.period) < 4096

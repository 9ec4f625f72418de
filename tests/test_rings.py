"""Caches that move on without a copy, against a graph that copies them."""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import dissect
from dissect import binding, runner
from dissect.contract import CacheSpec
from dissect.opening import open_step
from dissect.rings import Rings, moves
from dissect.sessions import Home

SIDE = 32  # frames long enough for a slot each


class Deep(nn.Module):
    """Histories of one, two, four and six frames, with a temporal stride between."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 4, (5, 1, 1), padding=(2, 0, 0))
        self.second = nn.Conv3d(4, 4, 3, (2, 1, 1), 1, groups=4)
        self.third = nn.Conv3d(4, 4, (3, 1, 1), padding=(3, 0, 0), dilation=(3, 1, 1))
        self.fourth = nn.Conv3d(4, 4, (2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        x = x[:, :, ::1] + self.third(x).relu()
        return self.fourth(self.second(x).relu()).mean((3, 4))


@pytest.fixture(scope="module", params=["every", "native"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    stream = dissect.convert(Deep().eval(), torch.zeros(1, 1, 16, SIDE, SIDE), "exact")
    return dissect.export(stream, tmp_path_factory.mktemp("rings") / "net.onnx", cadence=request.param)


@pytest.fixture(params=["host", "resident", "graphs"])
def home(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param != "host":
        home = Home("cpu", 0, resident=True, rebind=True, graphs=request.param == "graphs")
        monkeypatch.setattr(binding, "home_of", lambda session: home)


def copying(monkeypatch: pytest.MonkeyPatch, model: Path, batch: int) -> dissect.Runner:
    """A runner whose graph moves the caches on by itself."""
    with monkeypatch.context() as patched:
        patched.setattr(runner, "open_step", partial(open_step, rings=False))
        return dissect.Runner(model, batch, providers="cpu")


def same(ours: Any, theirs: Any) -> None:
    assert (ours is None) == (theirs is None)
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            same(mine, other)
    elif ours is not None:
        np.testing.assert_array_equal(ours, theirs)


def frame(random: np.random.Generator, batch: int) -> NDArray[np.float32]:
    return random.standard_normal((batch, 1, SIDE, SIDE)).astype(np.float32)


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("batch", [1, 2])
def test_a_stream_is_what_it_is_with_copies(model: Path, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    ours, theirs = dissect.Runner(model, batch, providers="cpu"), copying(monkeypatch, model, batch)
    table, reference = ours._bound.table, theirs._bound.table
    assert len(table.model.moved) >= (7 if ours.period == 1 else 3)
    assert not reference.model.moved
    assert len({id(buffer) for ring in table.buffers for buffer in ring}) <= 2 * len(ours.caches)
    assert table.turns > reference.turns
    random = np.random.default_rng(0)
    for time in range(2 * table.turns + 3):
        x = frame(random, batch)
        same(ours.step(x), theirs.step(x))
        every = np.arange(batch)
        for mine, other in zip(ours._bound.read(every), theirs._bound.read(every), strict=True):
            np.testing.assert_array_equal(mine, other)
        if time % 7 == 5:  # into each other's runners, as well
            for run, other_run in ((ours, theirs), (theirs, ours)):
                run.restore(other_run.snapshot())
        if time % 13 == 11:
            rows = [batch - 1] if ours.period == 1 else None
            ours.reset(rows)
            theirs.reset(rows)
    if batch == 2 and ours.period == 1:
        same(ours.flush(row=0), theirs.flush(row=0))
        x = frame(random, batch)
        same(ours.step(x), theirs.step(x))
    for run in (ours, theirs):
        run.reset()
        for _ in range(10):
            run.step(np.ones((batch, 1, SIDE, SIDE), np.float32))
    same(ours.flush(), theirs.flush())


def specs(*dues: tuple[int, int], **changes: Any) -> list[CacheSpec]:
    return [replace(CacheSpec(f"c{at}", f"n{at}", ("batch", 3)), due=due, **changes) for at, due in enumerate(dues)]


def test_only_what_fits_is_moved() -> None:
    caches = specs(*[(0, 1)] * 6)
    assert moves(caches, {"n0": "c1", "n1": "c2", "n4": "c3"}) == {0: 1, 1: 2, 4: 3}
    assert moves(caches, {"n0": "c0"}) == {}
    assert moves(caches, {"n0": "c1", "n1": "c0", "n2": "c3"}) == {2: 3}
    assert moves(caches, {"n0": "c1", "n2": "c1"}) == {0: 1}
    assert moves(caches, {"n0": "frame", "y": "c1"}) == {}
    assert moves([caches[0], replace(caches[1], dtype="uint8")], {"n0": "c1"}) == {}
    assert moves([caches[0], replace(caches[1], shape=("batch", 4))], {"n0": "c1"}) == {}
    assert moves(specs((0, 2), (1, 2)), {"n0": "c1"}) == {}


@pytest.mark.parametrize("due", [(0, 1), (1, 2), (3, 6)])
@pytest.mark.parametrize("depth", range(1, 9))
def test_a_ring_holds_the_last_frames(depth: int, due: tuple[int, int]) -> None:
    """Against a queue, with another cache beside it; nothing that is still wanted is overwritten."""
    caches = specs(*[due] * depth, (0, 1))
    rings = Rings(caches, {index: index + 1 for index in range(depth - 1)}, due[1])
    assert rings.first == [*[depth - 1] * depth, depth]
    assert depth < rings.sizes[0] <= 2 * depth
    buffers: list[Any] = [None] * rings.sizes[0]
    queue: deque[int | None] = deque([None] * depth, maxlen=depth)
    for turn in itertools.islice(itertools.count(), 3 * rings.turns):
        assert [buffers[rings.place(turn, at)] for at in range(depth)] == list(queue)
        if turn % due[1] == due[0]:
            buffers[rings.place(turn + 1, depth - 1)] = turn
            queue.append(turn)
        assert rings.place(turn, depth) != rings.place(turn + 1, depth)

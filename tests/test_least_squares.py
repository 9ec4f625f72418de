"""Least squares for a layer: it finds the weights that made what is wanted, and a ridge holds it back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dissect.convolution import FrameConv, TemporalConv
from dissect.least_squares import NormalEquations
from dissect.primitives import History

FRAMES, BATCH = 7, 2
SPACES: dict[str, dict[str, Any]] = {
    "no space": {"stride": [], "padding": [], "dilation": []},
    "1d": {"stride": [2], "padding": [(1, 1)], "dilation": [1]},
    "2d": {"stride": [1, 1], "padding": [(1, 1), (1, 1)], "dilation": [1, 1]},
    "2d, strided and uneven": {"stride": [2, 1], "padding": [(0, 1), (2, 0)], "dilation": [1, 2]},
}


def layer(space: str, taps: int, groups: int, bias: bool, seed: int) -> FrameConv:
    random = torch.Generator().manual_seed(seed)
    setting = SPACES[space]
    shape = (4, 6 // groups, taps, *[3] * len(setting["stride"]))
    weight = torch.randn(shape, generator=random, dtype=torch.float64)
    offset = torch.randn(4, generator=random, dtype=torch.float64) if bias else None
    if taps == 1:
        return FrameConv(weight, offset, time=0, groups=groups, **setting)
    return TemporalConv(weight, offset, time=0, groups=groups, ages=[2, 0], **setting)


def read(kind: FrameConv, x: torch.Tensor) -> Any:
    """What the layer reads of frames (N * T, C, ...)."""
    if not isinstance(kind, TemporalConv):
        return x
    known, _ = History(x.shape[1:], 2)(x, frames=FRAMES)
    return known


def frames_of(space: str, seed: int) -> torch.Tensor:
    size = (9, 8)[: len(SPACES[space]["stride"])]
    random = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH * FRAMES, 6, *size, generator=random, dtype=torch.float64) + 0.5


def gathered(mine: FrameConv, wanted: FrameConv, space: str, free: bool, shift: float = 0.0) -> NormalEquations:
    """Both layers on the same frames, some of them left out."""
    sums = NormalEquations(mine, free)
    with torch.no_grad():
        for seed in range(12 if space == "no space" else 2):
            x = frames_of(space, 100 + seed)
            known = read(mine, x)
            out = wanted(known, frames=FRAMES).unflatten(0, (BATCH, FRAMES)).transpose(0, 1) + shift
            kept = [0, 1, 3, 4, 6]
            sums.add(known, out[kept], kept, FRAMES)
    return sums


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("taps", [1, 2])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("bias", [False, True])
def test_it_finds_the_weights_that_made_what_is_wanted(space: str, taps: int, groups: int, bias: bool) -> None:
    mine, wanted = layer(space, taps, groups, bias, 0), layer(space, taps, groups, bias, 1)
    gathered(mine, wanted, space, free=False).solve(0.0)
    torch.testing.assert_close(mine.weight, wanted.weight, rtol=0, atol=1e-8)
    if bias:
        torch.testing.assert_close(mine.bias, wanted.bias, rtol=0, atol=1e-8)


def test_a_mean_that_does_not_count_does_not_bend_the_weights() -> None:
    mine, wanted = layer("2d", 2, 1, False, 0), layer("2d", 2, 1, False, 1)
    gathered(mine, wanted, "2d", free=True, shift=3.0).solve(0.0)
    torch.testing.assert_close(mine.weight, wanted.weight, rtol=0, atol=1e-8)
    bent = layer("2d", 2, 1, False, 0)
    gathered(bent, wanted, "2d", free=False, shift=3.0).solve(0.0)
    assert float((bent.weight - wanted.weight).detach().abs().max()) > 1e-2


def test_a_ridge_draws_towards_what_was() -> None:
    before = layer("2d", 2, 1, False, 0).weight
    wanted = layer("2d", 2, 1, False, 1)
    moved = []
    for ridge in (0.0, 0.1, 10.0, 1e6):
        mine = layer("2d", 2, 1, False, 0)
        gathered(mine, wanted, "2d", free=False).solve(ridge)
        moved.append(float((mine.weight - before).detach().norm()))
    assert moved == sorted(moved, reverse=True)
    assert moved[-1] < 1e-4


def test_inputs_that_are_always_zero_leave_their_weights_alone() -> None:
    mine = layer("2d", 1, 1, False, 0)
    before = mine.weight.clone()
    sums = NormalEquations(mine, free=False)
    x = frames_of("2d", 5)
    x[:, :2] = 0
    out = torch.zeros(FRAMES, BATCH, 4, 9, 8, dtype=torch.float64)
    sums.add(x, out, list(range(FRAMES)), FRAMES)
    sums.solve(0.0)
    torch.testing.assert_close(mine.weight[:, :2], before[:, :2])
    torch.testing.assert_close(mine.weight[:, 2:], torch.zeros_like(mine.weight[:, 2:]), rtol=0, atol=1e-8)


def test_large_inputs_are_taken_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = layer("2d", 2, 1, True, 0), layer("2d", 2, 1, True, 0)
    wanted = layer("2d", 2, 1, True, 1)
    gathered(whole, wanted, "2d", free=False).solve(1e-3)
    monkeypatch.setattr("dissect.least_squares._MOST", 1)
    gathered(parts, wanted, "2d", free=False).solve(1e-3)
    torch.testing.assert_close(whole.weight, parts.weight, rtol=0, atol=1e-10)

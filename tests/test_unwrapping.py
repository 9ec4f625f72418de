"""Rolls whose wrapped frames are cut off or written over at once are shifts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from laws import law, offline
from random_networks import scrambled
from torch import Tensor, nn

import dissect
from dissect.errors import NotStreamable


def written(x: Tensor, shift: int, where: int | slice) -> Tensor:
    x = x.roll(shift, 2)
    x[:, :, where] = 0
    return x


CASES: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "cut in front": (lambda x: torch.cat([torch.zeros_like(x[:, :, :1]), x.roll(1, 2)[:, :, 1:]], 2), 0),
    "cut behind": (lambda x: torch.cat([x.roll(-2, 2)[:, :, :-2], torch.zeros_like(x[:, :, :2])], 2), 2),
    "written over in front": (lambda x: written(x, 1, 0), 0),
    "written over in front, two": (lambda x: written(x, 2, slice(None, 2)), 0),
    "written over behind": (lambda x: written(x, -1, -1), 1),
    "written over behind, two": (lambda x: written(x, -2, slice(-2, None)), 2),
}


class Shifted(nn.Module):
    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run
        self.conv = nn.Conv3d(2, 3, (2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.run(x)).relu()


@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
@pytest.mark.parametrize("name", CASES)
def test_a_roll_that_is_a_shift(name: str, preset: str) -> None:
    run, wait = CASES[name]
    network = scrambled(Shifted(run), 0)
    clip = torch.randn(1, 2, 7, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    stream = dissect.convert(network, clip, preset=preset)
    law(stream, clip.repeat(2, 1, 1, 1, 1))
    if preset == "exact":
        assert stream.plan.exact
        assert stream.timing.delay == 1 + wait
        assert offline(stream, network, clip, [7, 6, 5]) == 3


def test_a_roll_that_is_seen_to_wrap_is_refused() -> None:
    network = scrambled(Shifted(lambda x: x.roll(2, 2)[:, :, 1:]), 0)
    with pytest.raises(NotStreamable, match="last frame in front of its first"):
        dissect.convert(network, torch.rand(1, 2, 7, 2, 2, dtype=torch.float64), preset="exact")

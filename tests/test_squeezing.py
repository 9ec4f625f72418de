"""Squeezing: the same numbers, and no tensor above rank 4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from laws import Ranks, close, leaves
from torch import Tensor, nn

import dissect
from dissect.lowering import lower
from dissect.squeezing import squeeze


class Around(nn.Module):
    """A function between two layers."""

    def __init__(self, run: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.before = nn.Conv3d(2, 4, 3, padding=1)
        self.small, self.wide = nn.Conv3d(4, 4, 1), nn.Conv3d(4, 4, 3, padding=1)
        self.spread = nn.Conv3d(4, 4, (3, 1, 1), padding=(2, 0, 0), dilation=(2, 1, 1))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.before(x))


def put_back(x: Tensor) -> Tensor:
    """Frames through a network of pictures, and a clip of them again."""
    return x.transpose(1, 2).flatten(0, 1).relu().unflatten(0, (x.shape[0], -1)).transpose(1, 2)


CASES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "gate": lambda net, x: net.wide(x * net.small(x.mean((2, 3, 4), keepdim=True)).sigmoid()),
    "one position, 3x3x3": lambda net, x: net.wide(x.mean(2, keepdim=True)).relu().mean((2, 3, 4)),
    "one position, dilated": lambda net, x: net.spread(x.mean(2, keepdim=True)).mean((2, 3, 4)),
    "one position, selected": lambda net, x: net.small(x.mean(2, keepdim=True))[:, :, 0].amax((2, 3)),
    "one position, rows": lambda net, x: net.small(x.mean(2, keepdim=True)).mean(3),
    "one position, pooled": lambda net, x: (
        F.avg_pool3d(x.mean(2, keepdim=True), (1, 2, 2), (1, 1, 2)) + net.small(x.amax((2, 3, 4), keepdim=True))
    ).square(),
    "one position, largest": lambda net, x: F.max_pool3d(x.mean(2, keepdim=True), (1, 3, 2), 1, (0, 1, 1)).relu(),
    "one position, rows pooled": lambda net, x: F.avg_pool3d(x.mean((2, 4), keepdim=True), (1, 2, 1), 1).square(),
    "one position, divided": lambda net, x: F.avg_pool3d(x.mean(2, keepdim=True), (1, 2, 2), 1, 0, False, True, 3),
    "one position, spread": lambda net, x: F.adaptive_avg_pool3d(x.mean((2, 3, 4), keepdim=True), (3, 1, 1)).square(),
    "one position, padded": lambda net, x: (
        F.pad(net.small(x.mean((2, 3, 4), keepdim=True)), (0, 0, 0, 0, 1, 0)).square().amax(4)
    ),
    "one position, put back": lambda net, x: torch.cat([y := x.amax(2, keepdim=True), put_back(y)], 1).relu().amax(4),
    "window of maps": lambda net, x: (x * net.small(x.mean((2, 3, 4), keepdim=True)).sigmoid()).mean((2, 3, 4)),
    "window, by rows": lambda net, x: (x - x.mean((2, 4), keepdim=True)).abs().mean((2, 3, 4)),
    "window, kept": lambda net, x: (x - x.mean((2, 3, 4), keepdim=True)).square().mean((2, 3, 4), keepdim=True),
    "window, rows alone": lambda net, x: (x - x.mean((2, 3, 4), keepdim=True)).abs().mean((2, 3)),
    "window, time alone": lambda net, x: (x - x.mean((2, 3, 4), keepdim=True)).abs().mean(2),
    "window of pairs": lambda net, x: torch.cat([x, x * x.mean((2, 3, 4), keepdim=True)], 1).amax((2, 3, 4)),
    "softmax over time": lambda net, x: (x.softmax(2) * x).sum((2, 3, 4)),
}


@pytest.mark.parametrize("preset", ["exact", "d3d"])
@pytest.mark.parametrize("name", CASES)
def test_every_value_is_what_it_was(name: str, preset: str) -> None:
    torch.manual_seed(0)
    network = Around(CASES[name]).double().eval()
    x = torch.randn(2, 2, 6, 4, 3, dtype=torch.float64)
    stream = dissect.convert(network, x[:, :, :5], preset=preset)
    module = lower(stream, torch.float64)
    squeeze(module, [x[:, :, 0], *stream.caches(2)])
    ours: Any = stream.caches(2)
    theirs: Any = ours
    with torch.no_grad():
        for time in range(6):
            out, *ours = stream.step(x[:, :, time], *ours)
            recorder = Ranks(module)
            values = recorder.run(x[:, :, time], *theirs)
            theirs = values[len(leaves(out)) :]
            close(values, (*leaves(out), *ours), 1e-12)
            assert recorder.highest <= max(4, *(leaf.dim() for leaf in leaves(out)))
    assert stream.plan.exact or preset != "exact" or name == "gate"

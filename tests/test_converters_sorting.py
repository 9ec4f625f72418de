"""Sorting, ranking and places: exact inside a frame, refused over time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import law, offline
from torch import Tensor, nn

import dissect


class Ordered(nn.Module):
    def __init__(self, order: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 5, (3, 1, 1), (2, 1, 1), (1, 0, 0))
        self.order = order

    def forward(self, x: Tensor) -> Any:
        return self.order(self.conv(x))


INSIDE: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda x: x.argmax(1),
    "argmin kept": lambda x: x.argmin(1, keepdim=True),
    "topk": lambda x: x.topk(2, 1),
    "smallest": lambda x: x.topk(2, 1, largest=False)[0],
    "sort": lambda x: x.sort(1, descending=True),
    "stable sort": lambda x: torch.sort(x, dim=1, stable=True)[0],
    "argsort": lambda x: x.argsort(1),
    "median": lambda x: x.median(1),
    "kthvalue": lambda x: x.kthvalue(2, 1, keepdim=True)[0],
    "max and its place": lambda x: x.max(1),
    "min and its place, last dimension": lambda x: x.min(-1),
}

OVER_TIME: dict[str, Callable[[Tensor], Any]] = {
    "aten.argmax": lambda x: x.argmax(2),
    "aten.topk": lambda x: x.topk(2, 2)[1],
    "aten.sort": lambda x: x.sort(2)[1],
    "aten.median": lambda x: x.median(2)[1],
    "aten.max": lambda x: x.max(2)[1],
    "aten.argmin": lambda x: x.argmin(),
}


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
def test_inside_a_frame(name: str, preset: str) -> None:
    torch.manual_seed(0)
    network = Ordered(INSIDE[name]).double().eval()
    clip = torch.randn(2, 2, 7, 2, 3, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset=preset)
    law(stream, clip)
    if preset == "exact":
        assert offline(stream, network, clip, (7, 6, 5)) == 3


@pytest.mark.parametrize("name", OVER_TIME)
def test_over_time_is_refused(name: str) -> None:
    network = Ordered(OVER_TIME[name]).eval()
    with pytest.raises(dissect.NotStreamable) as refused:
        dissect.convert(network, torch.randn(1, 2, 7, 2, 3), preset="exact")
    (refusal,) = refused.value.refusals
    assert refusal.op.startswith(name)
    assert "order" in refusal.reason
    assert refusal.fix
    assert refusal.source.startswith("test_converters_sorting.py")


@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
@pytest.mark.parametrize("largest", [True, False])
def test_the_largest_of_a_window(largest: bool, preset: str) -> None:
    """Their places are refused, the values are those of the last positions."""
    torch.manual_seed(0)
    network = Ordered(lambda x: x.topk(2, 2, largest)[0].mean(2)).double().eval()
    clip = torch.randn(2, 2, 7, 2, 3, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset=preset)
    law(stream, clip)
    if preset == "exact":
        assert stream.plan.exact
        assert offline(stream, network, clip, (7, 6, 5)) == 3

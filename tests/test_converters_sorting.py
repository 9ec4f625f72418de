"""Sorting, ranking and places: inside a frame, and over time in a window of all positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import close, law, offline, streamed
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


def picked(x: Tensor, index: Tensor) -> Tensor:
    """Frames of ``(N, T, C)`` by their places ``(N, k)``."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def magnitudes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RTFM: the features and the scores of the frames whose features are the largest."""
    x = x.mean((3, 4)).transpose(1, 2)
    scores, index = x.sum(2, keepdim=True).sigmoid(), x.norm(p=2, dim=2).topk(3, dim=1)[1]
    return scores.gather(1, index.unsqueeze(2)).mean(1), picked(x, index), scores


def frames(x: Tensor) -> Tensor:
    return x.mean((3, 4)).transpose(1, 2)


def tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)


OVER_TIME: dict[str, Callable[[Tensor], Any]] = {
    "argmax": lambda x: x.argmax(2),
    "argmin of the frames": lambda x: frames(x).sum(2).argmin(1, keepdim=True),
    "topk": lambda x: x.topk(2, 2),
    "the smallest": lambda x: x.topk(3, 2, largest=False),
    "sort": lambda x: x.sort(2, descending=True),
    "argsort": lambda x: picked(frames(x), frames(x).sum(2).argsort(1)[:, :2]).sum(1),
    "median": lambda x: x.median(2),
    "max": lambda x: x.max(2),
    "number two": lambda x: x.kthvalue(2, 2),
    "the best frame": lambda x: picked(frames(x), frames(x).sum(2, keepdim=True).max(1)[1]).squeeze(1),
    "the best frame, counted from the end": lambda x: (
        x.mean((3, 4)).gather(-1, x.sum((1, 3, 4)).argmax(1)[:, None, None].expand(-1, 5, -1)).squeeze(-1)
    ),
    "the largest of a matrix of whole numbers": lambda x: (
        (100 * frames(x) @ frames(x).transpose(1, 2)).round().int().amax(2)[:, -1]
    ),
    "magnitudes": magnitudes,
    "the best tokens": lambda x: picked(tokens(x), tokens(x).norm(dim=2).topk(5, 1)[1]).mean(1),
    "values of tokens": lambda x: (tokens(x).topk(5, 1)[0], tokens(x).median(1)[0]),
    "whole numbers": lambda x: ((100 * x).round().int().max(2), (100 * x).round().int().amin(2)),
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


@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
@pytest.mark.parametrize("name", OVER_TIME)
def test_places_over_time(name: str, preset: str) -> None:
    """Where the clip ends, a place in the window is that place in the clip; before, it is the same in every runtime."""
    torch.manual_seed(0)
    network = Ordered(OVER_TIME[name]).double().eval()
    clip = torch.randn(1, 2, 7, 2, 3, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset=preset)
    dissect.verify(stream, network, runtime=name in ("topk", "number two", "magnitudes")).check()
    if preset == "exact":
        assert stream.plan.exact
        other = torch.randn(clip.shape, dtype=torch.float64)
        close(streamed(stream, other, frames=7), network(other))


@pytest.mark.parametrize(
    ("order", "op", "reason"),
    [
        (lambda x: x.argmin(), "aten.argmin", "an order of all elements mixes the rows"),
        (lambda x: frames(x).transpose(1, 2).flatten(1).topk(3, 1), "aten.topk", "entries that stand in front of time"),
    ],
    ids=["of everything", "of features before frames"],
)
def test_what_has_no_place_is_refused(order: Callable[[Tensor], Any], op: str, reason: str) -> None:
    with pytest.raises(dissect.NotStreamable) as refused:
        dissect.convert(Ordered(order).eval(), torch.randn(1, 2, 7, 2, 3), preset="exact")
    (refusal,) = refused.value.refusals
    assert refusal.op.startswith(op)
    assert reason in refusal.reason
    assert refusal.fix
    assert refusal.source.startswith("test_converters_sorting.py")


@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
@pytest.mark.parametrize("largest", [True, False])
def test_the_largest_of_a_window(largest: bool, preset: str) -> None:
    """The values alone are those of the last positions, of shorter clips, too."""
    torch.manual_seed(0)
    network = Ordered(lambda x: x.topk(2, 2, largest)[0].mean(2)).double().eval()
    clip = torch.randn(2, 2, 7, 2, 3, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset=preset)
    law(stream, clip)
    if preset == "exact":
        assert stream.plan.exact
        assert offline(stream, network, clip, (7, 6, 5)) == 3

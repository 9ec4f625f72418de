"""Loops over frames, written out by a capture, become one copy of their body again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from laws import close, law, offline, streamed
from torch import Tensor, nn

import dissect
from dissect.convolution import FrameConv


class Looping(nn.Module):
    """A temporal layer, a loop over frames, another temporal layer."""

    def __init__(self, run: Callable[[Looping, Tensor], Tensor]) -> None:
        super().__init__()
        self.before = nn.Conv3d(3, 4, 3, padding=1)
        self.each = nn.Conv2d(4, 4, 3, padding=1)
        self.score = nn.Linear(4, 3)
        self.last = nn.Conv3d(4, 4, 3, padding=1)
        self.wide = nn.Conv2d(32, 4, 3, padding=1)
        self.three = nn.Conv2d(12, 4, 3, padding=1)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, self.before(x) - 0.2)


def stacked(net: Looping, x: Tensor) -> Tensor:
    return net.last(torch.stack([net.each(x[:, :, t]).relu() for t in range(x.shape[2])], 2))


def joined(net: Looping, x: Tensor) -> Tensor:
    return net.last(torch.cat([net.each(x[:, :, t]).relu().unsqueeze(2) for t in range(x.shape[2])], 2))


def kept(net: Looping, x: Tensor) -> Tensor:
    return net.last(torch.cat([x[:, :, t : t + 1].tanh() for t in range(x.shape[2])], 2))


def unbound(net: Looping, x: Tensor) -> Tensor:
    return net.last(torch.stack([net.each(frame).relu() for frame in x.unbind(2)], 2))


def split(net: Looping, x: Tensor) -> Tensor:
    return net.last(torch.cat([net.each(frame.squeeze(2)).relu().unsqueeze(2) for frame in x.split(1, 2)], 2))


def appended(net: Looping, x: Tensor) -> Tensor:
    features = []
    for t in range(x.shape[2]):
        features.append(net.score(net.each(x[:, :, t]).relu().mean((2, 3))))
    return torch.stack(features, 0).transpose(0, 1)


def written(net: Looping, x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for t in range(x.shape[2]):
        out[:, :, t] = net.each(x[:, :, t]).relu()
    return net.last(out)


def written_over(net: Looping, x: Tensor) -> Tensor:
    out = x.tanh()
    for t in range(x.shape[2]):
        out[:, :, t] = net.each(x[:, :, t]).relu()
    return net.last(out)


def two_lists(net: Looping, x: Tensor) -> Tensor:
    first = [net.each(x[:, :, t]) for t in range(x.shape[2])]
    second = [frame.relu() for frame in first]
    return net.last(torch.stack(first, 2)) + torch.stack(second, 2)


def pairs(net: Looping, x: Tensor) -> Tensor:
    return net.last(torch.stack([net.each(x[:, :, t + 1] - x[:, :, t]) for t in range(x.shape[2] - 1)], 2))


def every_second(net: Looping, x: Tensor) -> Tensor:
    return net.last(torch.stack([net.each(x[:, :, t]).relu() for t in range(0, x.shape[2], 2)], 2))


def summed(net: Looping, x: Tensor) -> Tensor:
    return sum(net.score(net.each(x[:, :, t]).relu().mean((2, 3))) for t in range(x.shape[2])) / x.shape[2]


def greatest(net: Looping, x: Tensor) -> Tensor:
    best = net.each(x[:, :, 0])
    for t in range(1, x.shape[2]):
        best = torch.maximum(best, net.each(x[:, :, t]))
    return net.score(best.mean((2, 3)))


def on_channels(net: Looping, x: Tensor) -> Tensor:
    return net.wide(torch.cat([net.each(x[:, :, t]).relu() for t in range(x.shape[2])], 1))


def with_the_first(net: Looping, x: Tensor) -> Tensor:
    gate = net.score(x[:, :, 0].mean((2, 3)))[:, :1, None, None]
    return net.last(torch.stack([net.each(x[:, :, t]) * gate for t in range(x.shape[2])], 2))


def motion(net: Looping, x: Tensor) -> Tensor:
    """Differences of neighbours, and zeros behind the last, as motion modules have them."""
    later = x.tanh()
    frames = [net.each(later[:, :, i + 1] - x[:, :, i]) for i in range(x.shape[2] - 1)]
    return net.last(torch.stack([*frames, torch.zeros_like(frames[0])], 2))


def motion_in_front(net: Looping, x: Tensor) -> Tensor:
    frames = [net.each(x[:, :, i + 1] - x[:, :, i]).unsqueeze(2) for i in range(x.shape[2] - 1)]
    return net.last(torch.cat([torch.zeros_like(frames[0]), *frames], 2))


def sliding(net: Looping, x: Tensor) -> Tensor:
    """Three neighbours at a time, as video super-resolution takes them."""
    padded = torch.cat([x[:, :, :1], x, x[:, :, -1:]], 2)
    frames = [padded[:, :, i : i + 3].transpose(1, 2).flatten(1, 2) for i in range(x.shape[2])]
    return net.last(torch.stack([net.three(frame) for frame in frames], 2))


def sliding_by_two(net: Looping, x: Tensor) -> Tensor:
    return net.last(torch.stack([net.three(x[:, :, i : i + 3].flatten(1, 2)) for i in range(0, x.shape[2] - 2, 2)], 2))


LOOPS = [
    stacked,
    joined,
    kept,
    unbound,
    split,
    appended,
    written,
    written_over,
    two_lists,
    pairs,
    every_second,
    summed,
    greatest,
    on_channels,
    with_the_first,
    motion,
    motion_in_front,
    sliding,
    sliding_by_two,
]


def made(run: Callable[[Looping, Tensor], Tensor]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Looping(run).double().eval(), torch.randn(1, 3, 8, 5, 5, dtype=torch.float64)


@pytest.mark.parametrize("run", LOOPS)
def test_exact(run: Callable[[Looping, Tensor], Tensor]) -> None:
    network, clip = made(run)
    stream = dissect.convert(network, clip, preset="exact")
    assert stream.plan.exact, str(stream.plan)
    law(stream, torch.randn(2, 3, 11, 5, 5, dtype=torch.float64))
    fixed = run is on_channels or run is summed
    assert offline(stream, network, clip, [8] if fixed else [8, 7, 6]) == (1 if fixed else 3)


@pytest.mark.parametrize("run", LOOPS)
@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
def test_the_body_runs_once_a_frame(run: Callable[[Looping, Tensor], Tensor], preset: str) -> None:
    network, clip = made(run)
    stream = dissect.convert(network, clip, preset=preset)
    live = {node.target for node in stream.step.graph.nodes if node.op == "call_module"}
    layers = [name for name in live if isinstance(stream.step.get_submodule(name), FrameConv)]
    used = {name for name in ("before", "each", "last", "wide", "three") if any(name == layer for layer in layers)}
    assert len(layers) == len(used), layers
    assert {"each", "three"} & used or run is kept


@pytest.mark.parametrize("preset", ["causal", "d3d"])
@pytest.mark.parametrize("run", LOOPS)
def test_keeps_its_promises(run: Callable[[Looping, Tensor], Tensor], preset: str) -> None:
    network, clip = made(run)
    dissect.verify(dissect.convert(network, clip, preset=preset), network, runtime=run in (stacked, summed)).check()


def test_a_value_of_the_whole_clip_inside_a_loop_is_no_promise() -> None:
    def run(net: Looping, x: Tensor) -> Tensor:
        mean = x.mean((2, 3, 4))[:, :, None, None]
        return net.last(torch.stack([net.each(x[:, :, t]) * mean for t in range(x.shape[2])], 2))

    network, clip = made(run)
    stream = dissect.convert(network, clip, preset="exact")
    assert any("broadcast back" in row.reason for row in stream.plan.approximate)


@pytest.mark.parametrize(
    "body",
    [
        lambda net, frame, t: net.each(frame) * (t + 1),
        lambda net, frame, t: net.each(frame) if t % 2 else net.each(frame).relu(),
        lambda net, frame, t: (net.each if t else net.last2)(frame),
    ],
    ids=["scaled by its number", "every second rectified", "the first by a layer of its own"],
)
def test_copies_that_differ_are_left_as_they_are(body: Callable[[nn.Module, Tensor, int], Tensor]) -> None:
    def run(net: Looping, x: Tensor) -> Tensor:
        return torch.stack([body(net, x[:, :, t], t).mean((2, 3)) for t in range(x.shape[2])], 2)

    network, clip = made(run)
    network.last2 = nn.Conv2d(4, 4, 3, padding=1).double()
    stream = dissect.convert(network, clip, preset="exact")
    with torch.no_grad():
        law(stream, torch.randn(2, 3, 9, 5, 5, dtype=torch.float64))
        assert stream.plan.exact, str(stream.plan)
        close(streamed(stream, clip, frames=8), network(clip))


class Neighbours(nn.Module):
    """Shifts of the clip put together, then a 2D convolution of every position."""

    def __init__(self, join: Callable[[Tensor], Tensor], channels: int) -> None:
        super().__init__()
        self.before, self.after = nn.Conv3d(2, 3, 3, padding=1), nn.Conv2d(channels, 2, 3, padding=1)
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        y = self.join(self.before(x))
        return self.after(y.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(y), -1)).mean((3, 4))


NEIGHBOURS: dict[
    str, tuple[Callable[[Tensor], Tensor], int, int]
] = {  # the join, its channels, the frames it waits for
    "pairs": (lambda y: torch.cat([y[:, :, :-1], y[:, :, 1:]], 1), 6, 1),
    "later first": (lambda y: torch.cat([y[:, :, 1:], y[:, :, :-1]], 1), 6, 1),
    "triples": (lambda y: torch.cat([y[:, :, :-2], y[:, :, 1:-1], y[:, :, 2:]], 1), 9, 2),
    "two apart": (lambda y: torch.cat([y[:, :, :-4], y[:, :, 2:-2], y[:, :, 4:]], 1), 9, 4),
    "sum": (lambda y: y[:, :, :-1] + y[:, :, 1:], 3, 1),
    "sum of three": (lambda y: y[:, :, :-2] + y[:, :, 1:-1] + y[:, :, 2:], 3, 2),
    "larger of two": (lambda y: torch.maximum(y[:, :, :-1], y[:, :, 1:]), 3, 1),
    "stack": (lambda y: torch.stack([y[:, :, :-1], y[:, :, 1:]], 1).amax(1), 3, 1),
}


@pytest.mark.parametrize("frames", [6, 9])
@pytest.mark.parametrize("name", NEIGHBOURS)
def test_neighbours_are_no_windows(name: str, frames: int) -> None:
    join, channels, waits = NEIGHBOURS[name]
    network = Neighbours(join, channels).double().eval()
    clip = torch.randn(1, 2, frames + 4, 5, 5, dtype=torch.float64)
    stream = dissect.convert(network, clip[:, :, :frames])
    dissect.verify(stream, network, runtime=False).check()
    stream = dissect.convert(network, clip[:, :, :frames], "exact")
    assert stream.plan.exact
    assert stream.timing.delay == waits + 1
    assert stream.cache_bytes < 12_000  # of frames, not of windows of the clip
    assert offline(stream, network, clip, range(frames, frames + 5)) == 5

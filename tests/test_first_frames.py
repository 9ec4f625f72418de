"""Python loops over time whose first frames differ from the others, against the network itself on clips of any length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import law, offline
from torch import Tensor, nn

import dissect

FRAMES = 6


class Net(nn.Module):
    """A trunk in 3D, layers for a loop, and the loop."""

    def __init__(self, run: Callable[[Net, Tensor], Any], stride: int = 1, reach: int = 0) -> None:
        super().__init__()
        self.trunk = nn.Conv3d(2, 3, (1 + 2 * reach, 1, 1), (stride, 1, 1), (reach, 0, 0))
        self.each = nn.Conv2d(3, 3, 3, padding=1)
        self.begin = nn.Conv2d(3, 3, 1)
        self.pair = nn.Conv2d(6, 3, 1)
        self.three = nn.Conv2d(9, 2, 1)
        self.share = nn.Parameter(torch.tensor(0.3))
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, self.trunk(x))

    def cell(self, x: Tensor, h: Tensor) -> Tensor:
        return torch.tanh(self.pair(torch.cat([x, h], 1)))


def frames(x: Tensor) -> list[Tensor]:
    return list(x.unbind(2))


def average(net: Net, x: Tensor) -> Tensor:
    """SalEMA's: the state is None at first."""
    state, out = None, []
    for frame in frames(x):
        y = net.each(frame)
        state = y if state is None else net.share * y + (1 - net.share) * state
        out.append(state)
    return torch.stack(out, 2)


def average_last(net: Net, x: Tensor) -> Tensor:
    state = None
    for t in range(x.shape[2]):
        y = net.each(x[:, :, t])
        state = y if state is None else net.share * y + (1 - net.share) * state
    assert state is not None
    return state.mean((2, 3))


def from_the_first(net: Net, x: Tensor) -> Tensor:
    """A state of its own layer from the first frame, and a head on every state."""
    h = net.begin(x[:, :, 0])
    out = [net.each(h)]
    for t in range(1, x.shape[2]):
        h = net.cell(x[:, :, t], h)
        out.append(net.each(h))
    return torch.stack(out, 2)


def joined(net: Net, x: Tensor) -> Tensor:
    h = net.begin(x[:, :, 0])
    out = [h.unsqueeze(2)]
    for t in range(1, x.shape[2]):
        h = net.cell(net.each(x[:, :, t]), h)
        out.append(h.unsqueeze(2))
    return torch.cat(out, 2)


def begun_before(net: Net, x: Tensor) -> Tensor:
    """The state begins as a function of the first frame, which the loop then takes, too."""
    h = net.begin(x[:, :, 0])
    out = []
    for t in range(x.shape[2]):
        h = net.cell(x[:, :, t], h)
        out.append(h)
    return torch.stack(out, 2)


def background(net: Net, x: Tensor) -> Tensor:
    model, out = x[:, :, 0], []
    for frame in frames(x):
        out.append(net.each((frame - model).abs()))
        model = 0.9 * model + 0.1 * frame
    return torch.stack(out, 2)


def two_states(net: Net, x: Tensor) -> Tensor:
    """One state begins as the first frame, another as zeros; both are one value at first in the third."""
    h, c, out = None, None, []
    for frame in frames(x):
        y = net.each(frame)
        if h is None or c is None:
            h = c = y
        else:
            c = net.share * c + y
            h = net.cell(c, h)
        out.append(h)
    return torch.stack(out, 2)


def only_later(net: Net, x: Tensor) -> Tensor:
    """Pairs of neighbours and a state: no result for the first frame."""
    h, out = torch.zeros_like(x[:, :, 0]), []
    for t in range(1, x.shape[2]):
        h = net.cell(net.each(x[:, :, t]) - net.each(x[:, :, t - 1]), h)
        out.append(h)
    return torch.stack(out, 2)


def before_or_first(net: Net, x: Tensor) -> Tensor:
    """RRN's: the frame before, the first one twice."""
    h, out = torch.zeros_like(x[:, :, 0]), []
    for t in range(x.shape[2]):
        both = torch.cat([x[:, :, t - 1] if t > 0 else x[:, :, 0], x[:, :, t]], 1)
        h = net.cell(net.pair(both), h)
        out.append(h)
    return torch.stack(out, 2)


def before_or_zeros(net: Net, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, :, 0]), []
    for t in range(x.shape[2]):
        both = torch.cat([x[:, :, t - 1] if t > 0 else torch.zeros_like(x[:, :, 0]), x[:, :, t]], 1)
        h = net.cell(net.pair(both), h)
        out.append(h)
    return torch.stack(out, 2)


def features_before(net: Net, x: Tensor) -> Tensor:
    """What a layer makes of the frame before."""
    h, out = torch.zeros_like(x[:, :, 0]), []
    for t in range(x.shape[2]):
        h = net.cell(net.each(x[:, :, t]) - net.each(x[:, :, max(t - 1, 0)]), h)
        out.append(h)
    return torch.stack(out, 2)


def carried_frame(net: Net, x: Tensor) -> Tensor:
    h, before, out = torch.zeros_like(x[:, :, 0]), x[:, :, 0], []
    for t in range(x.shape[2]):
        h = net.cell(net.pair(torch.cat([before, x[:, :, t]], 1)), h)
        before = x[:, :, t]
        out.append(h)
    return torch.stack(out, 2)


def two_ago(net: Net, x: Tensor) -> Tensor:
    h = older = torch.zeros_like(x[:, :, 0])
    out = []
    for frame in frames(x):
        h, older = net.cell(frame + older, h), h
        out.append(h)
    return torch.stack(out, 2)


def two_ago_from_the_first(net: Net, x: Tensor) -> Tensor:
    h, older, out = x[:, :, 0], net.begin(x[:, :, 0]), []
    for frame in frames(x):
        h, older = net.cell(frame + older, h), h
        out.append(h)
    return torch.stack(out, 2)


def beside_the_states(net: Net, x: Tensor) -> Tensor:
    """Three neighbouring states together, after the loop."""
    h, states = torch.zeros_like(x[:, :, 0]), []
    for frame in frames(x):
        h = net.cell(frame, h)
        states.append(h)
    return torch.stack([net.three(torch.cat(states[t - 1 : t + 2], 1)) for t in range(1, len(states) - 1)], 2)


def written(net: Net, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, :, 0]), torch.zeros_like(x)
    for t in range(x.shape[2]):
        h = net.cell(x[:, :, t], h)
        out[:, :, t] = h
    return out


def written_as_slices(net: Net, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, :, 0]), torch.zeros(x.shape, dtype=x.dtype)
    for t in range(x.shape[2]):
        h = net.cell(x[:, :, t], h)
        out[:, :, t : t + 1] = h.unsqueeze(2)
    return out


def added_into_zeros(net: Net, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, :, 0]), torch.zeros(x.shape[2], *x[:, :, 0].shape, dtype=x.dtype)
    for t in range(x.shape[2]):
        h = net.cell(x[:, :, t], h)
        out[t] += net.each(h)
    return out.movedim(0, 2)


def behind_a_layer_in_place(net: Net, x: Tensor) -> Tensor:
    """RVM's decoder: every view of what was written in place is captured anew for each that reads it."""
    both = net.pair(torch.cat([x, x], 1).transpose(1, 2).flatten(0, 1)).relu_().unflatten(0, (x.shape[0], -1))
    still, moving = both.split([1, 2], dim=2)
    h, out = torch.zeros_like(moving[:, 0]), []
    for frame in moving.unbind(1):
        h = torch.tanh(frame + 0.5 * h)
        out.append(h)
    return torch.cat([still, torch.stack(out, 1)], 2).transpose(1, 2)


def largest_so_far(net: Net, x: Tensor) -> Tensor:
    """From minus infinity, to which no cache could hold the difference."""
    most, least, out = torch.full_like(x[:, :, 0], -torch.inf), torch.full_like(x[:, :, 0], 1e9), []
    for frame in frames(x):
        most, least = torch.maximum(most, net.each(frame)), torch.minimum(least, frame)
        out.append(most - least)
    return torch.stack(out, 2)


def used_before_it_is_updated(net: Net, x: Tensor) -> Tensor:
    """RWKV's: the result is made of both carried values, and then they are updated."""
    total = most = torch.zeros_like(x[:, :, 0])
    out = []
    for frame in frames(x):
        now = torch.maximum(most, frame + 1)
        out.append(torch.exp(most - now) * total + torch.exp(frame + 1 - now) * net.each(frame))
        now = torch.maximum(most, frame)
        total = torch.exp(most - now) * total + torch.exp(frame - now) * frame
        most = now
    return torch.stack(out, 2)


def read_back(net: Net, x: Tensor) -> Tensor:
    """The state before is read from where it was written."""
    out = torch.zeros_like(x)
    out[:, :, 0] = net.begin(x[:, :, 0])
    for t in range(1, x.shape[2]):
        out[:, :, t] = net.cell(x[:, :, t], out[:, :, t - 1])
    return out


def grown(net: Net, x: Tensor) -> Tensor:
    h, out = torch.zeros_like(x[:, :, 0]), None
    for frame in frames(x):
        h = net.cell(frame, h)
        out = h.unsqueeze(2) if out is None else torch.cat([out, h.unsqueeze(2)], 2)
    assert out is not None
    return out


def running_sum(net: Net, x: Tensor) -> Tensor:
    total: Any = 0
    out = []
    for frame in frames(x):
        total = total + net.each(frame)
        out.append(total)
    return torch.stack(out, 2)


def with_the_last_frame(net: Net, x: Tensor) -> Tensor:
    h = net.begin(x[:, :, 0])
    for t in range(1, x.shape[2]):
        h = net.cell(x[:, :, t], h)
    return h + x[:, :, -1]


def flattened(net: Net, x: Tensor) -> Tensor:
    """One dimension of the state is several of a frame."""
    state, out = None, []
    for frame in frames(x):
        y = net.each(frame).flatten(1)
        state = y if state is None else net.share * y + (1 - net.share) * state
        out.append(state.unflatten(1, frame.shape[1:]))
    return torch.stack(out, 2)


def tokens(net: Net, x: Tensor) -> Tensor:
    """The batch and the places of a frame are one dimension of the state."""
    state, out = None, []
    for frame in frames(x):
        y = net.each(frame).permute(0, 2, 3, 1).reshape(-1, 3)
        state = y if state is None else torch.tanh(y @ net.begin.weight[:, :, 0, 0] + state)
        out.append(state.view(frame.shape[0], *frame.shape[2:], 3).permute(0, 3, 1, 2))
    return torch.stack(out, 2)


def lstm(net: Net, x: Tensor) -> Tensor:
    """Both hidden values from the features of the first frame."""
    features = net.each(x.transpose(1, 2).flatten(0, 1)).mean((2, 3)).view(x.shape[0], -1, 3)
    weight = net.three.weight.flatten()[:9].view(3, 3)
    h, c = features[:, 0] @ weight, torch.tanh(features[:, 0])
    out = []
    for t in range(features.shape[1]):
        c = torch.sigmoid(h) * c + features[:, t] @ weight
        h = torch.tanh(c)
        out.append(h)
    return torch.stack(out, 2)


LOOPS = [
    average,
    average_last,
    from_the_first,
    joined,
    begun_before,
    background,
    two_states,
    only_later,
    before_or_first,
    before_or_zeros,
    features_before,
    carried_frame,
    two_ago,
    two_ago_from_the_first,
    beside_the_states,
    written,
    written_as_slices,
    added_into_zeros,
    behind_a_layer_in_place,
    largest_so_far,
    used_before_it_is_updated,
    read_back,
    grown,
    running_sum,
    with_the_last_frame,
    flattened,
    tokens,
    lstm,
]


def mean(net: Net, x: Tensor) -> Tensor:
    """Added up in the loop, from the number 0."""
    h, total = torch.zeros_like(x[:, :, 0]), 0.0
    for frame in frames(x):
        h = net.cell(frame, h)
        total = total + h  # type: ignore[assignment]
    return total / x.shape[2]  # type: ignore[return-value]


def mean_of_a_list(net: Net, x: Tensor) -> Tensor:
    h, states = torch.zeros_like(x[:, :, 0]), []
    for frame in frames(x):
        h = net.cell(frame, h)
        states.append(h)
    return sum(states) / len(states)  # type: ignore[return-value]


def made(run: Callable[[Net, Tensor], Any], **settings: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Net(run, **settings).double().eval(), torch.randn(1, 2, 2 * FRAMES, 3, 2, dtype=torch.float64)


def rolled(stream: dissect.Stream) -> bool:
    """One round a step, and nothing that holds a window of the clip."""
    held = sum(cache.numel() for cache in stream.caches(1))
    return any("loop over time" in row.decision for row in stream.plan) and held < FRAMES * 3 * 3 * 2


@pytest.mark.parametrize("run", LOOPS)
def test_every_length_is_the_networks_own(run: Callable[[Net, Tensor], Any]) -> None:
    network, clip = made(run)
    stream = dissect.convert(network, clip[:, :, :FRAMES], preset="exact")
    assert stream.plan.exact, str(stream.plan)
    assert rolled(stream), str(stream.plan)
    law(stream, clip)
    lengths = (2 * FRAMES, FRAMES + 1, FRAMES, 3, 2, 1)
    short = {only_later: 1, beside_the_states: 2, with_the_last_frame: 0}.get(run, 0)
    assert offline(stream, network, clip, lengths) == len(lengths) - short


@pytest.mark.parametrize("run", LOOPS)
@pytest.mark.parametrize("preset", [pytest.param("causal", marks=pytest.mark.slow), "d3d"])
def test_keeps_its_promises(run: Callable[[Net, Tensor], Any], preset: str) -> None:
    network, clip = made(run)
    stream = dissect.convert(network, clip[:, :, :FRAMES], preset=preset)
    assert rolled(stream), str(stream.plan)
    dissect.verify(stream, network, runtime=run in (average, before_or_first)).check()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("run", [average, from_the_first, before_or_first, two_ago, average_last])
def test_the_first_position_may_be_late(run: Callable[[Net, Tensor], Any], stride: int) -> None:
    """Behind a layer that looks ahead, or takes every second frame, the first position is not the first frame."""
    network, clip = made(run, stride=stride, reach=1)
    stream = dissect.convert(network, clip[:, :, : FRAMES * stride], preset="exact")
    assert stream.plan.exact, str(stream.plan)
    assert any("loop over time" in row.decision for row in stream.plan)
    law(stream, clip)
    assert offline(stream, network, clip, (12, 7, 6, 5, 3, 1)) == 6


@pytest.mark.parametrize("run", [mean, mean_of_a_list])
def test_a_sum_over_a_loop_is_a_pool(run: Callable[[Net, Tensor], Any]) -> None:
    """The window of the example, as torch.stack(states).mean(0) is, or everything so far."""
    network, clip = made(run)
    window = dissect.convert(network, clip[:, :, :FRAMES], preset="exact")
    assert any("loop over time" in row.decision for row in window.plan)
    assert any("window of 6, sum" in row.decision for row in window.plan)
    law(window, clip)
    assert offline(window, network, clip, (FRAMES,)) == 1
    running = dissect.convert(network, clip[:, :, :FRAMES], preset="exact", pool="cumulative")
    law(running, clip)
    assert offline(running, network, clip, (2 * FRAMES, FRAMES + 1, FRAMES, 2)) == 4


def test_what_a_recurrence_would_refuse_stays_written_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from dissect.converters import carrying

    def refuse(*_: Any) -> None:
        raise carrying.Refused("a shape")

    monkeypatch.setattr(carrying, "fitted", refuse)
    network, clip = made(average)
    stream = dissect.convert(network, clip[:, :, :FRAMES], preset="exact")
    assert not any("loop over time" in row.decision for row in stream.plan)
    assert offline(stream, network, clip, (FRAMES,)) == 1


class Masked(nn.Module):
    """The state begins as what a layer makes of an input without time: the first frame's mask."""

    def __init__(self, pooled: bool = False) -> None:
        super().__init__()
        self.each, self.begin = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(1, 3, 1)
        self.pair = nn.Conv2d(6, 3, 1)
        self.pooled = pooled

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.begin(mask) + (x.mean((1, 2), keepdim=False).unsqueeze(1) if self.pooled else 0)
        out = []
        for frame in frames(x):
            h = torch.tanh(self.pair(torch.cat([self.each(frame), h], 1)))
            out.append(h)
        return torch.stack(out, 2)


@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
def test_a_state_may_begin_with_an_input_without_time(preset: str) -> None:
    torch.manual_seed(0)
    network = Masked().double().eval()
    clip = torch.randn(1, 2, FRAMES, 3, 2, dtype=torch.float64), torch.randn(1, 1, 3, 2, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset=preset, time_dim=(2, None))
    assert rolled(stream), str(stream.plan)
    dissect.verify(stream, network, runtime=preset == "exact").check()


def test_a_state_that_begins_with_the_whole_clip_is_refused() -> None:
    clip = torch.randn(1, 2, FRAMES, 3, 2), torch.randn(1, 1, 3, 2)
    with pytest.raises(dissect.NotStreamable, match="computed from the clip"):
        dissect.convert(Masked(pooled=True).eval(), clip, preset="exact", time_dim=(2, None))

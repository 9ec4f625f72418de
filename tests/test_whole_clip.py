"""One answer for the clip out of all of its frames: rows of attention, queries, orders; exact where the plan says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dissect

T = 6


class Features(nn.Module):
    """Layers, and a function of them and of frame features ``(N, T, 4)``."""

    def __init__(self, function: Callable[[Features, Tensor], Any]) -> None:
        super().__init__()
        self.function = function
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.heads = nn.MultiheadAttention(4, 2, batch_first=True)
        self.gru, self.lstm = nn.GRU(4, 4, batch_first=True), nn.LSTM(4, 4, batch_first=True)
        self.cell, self.score = nn.GRUCell(4, 4), nn.Linear(4, 1)
        self.point, self.flat = nn.Conv1d(4, 3, 1), nn.Conv2d(4 * T, 4 * T, 1)
        self.valid, self.beside, self.query = nn.Conv1d(4, 4, 3), nn.Linear(8, 4), nn.Linear(4, 4)
        self.uneven = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def attend(x: Tensor) -> Tensor:
    return torch.softmax(x @ x.transpose(1, 2), -1) @ x


def with_token(net: Features, x: Tensor) -> Tensor:
    return torch.cat([net.token.expand(x.shape[0], -1, -1), x], 1)


def asked(net: Features, x: Tensor, query: Tensor) -> Tensor:
    """Luong: the query beside every frame."""
    return (torch.softmax((x * query.unsqueeze(1)).sum(2, keepdim=True), 1) * x).sum(1)


def lstm_attention(net: Features, x: Tensor) -> Tensor:
    y, (h, _) = net.lstm(x)
    return asked(net, y, h[-1])


def loop_attention(net: Features, x: Tensor) -> Tensor:
    h, states = x.new_zeros(x.shape[0], 4), []
    for t in range(x.shape[1]):
        h = net.cell(x[:, t], h)
        states.append(h)
    return asked(net, torch.stack(states, 1), h)


def bahdanau(net: Features, y: Tensor, query: Tensor) -> Tensor:
    """The query repeated, and joined to every frame."""
    beside = net.beside(torch.cat([query.unsqueeze(1).repeat(1, y.shape[1], 1), y], 2))
    return (torch.softmax(net.score(torch.tanh(beside)), 1) * y).sum(1)


def repeated_first(net: Features, x: Tensor) -> Tensor:
    """The last hidden value repeated in front of the frames, turned round, and sent through a layer."""
    y, h = net.gru(x)
    query = net.query(h[-1].repeat(x.shape[1], 1, 1).permute(1, 0, 2))
    return (torch.softmax(net.score(torch.tanh(query + y)), 1) * y).sum(1)


def queried(net: Features, x: Tensor) -> Tensor:
    y, h = net.gru(x)
    return F.scaled_dot_product_attention(h.transpose(0, 1), y, y).squeeze(1)


EXACT: dict[str, Callable[[Features, Tensor], Any]] = {
    "a class token's row": lambda net, x: attend(with_token(net, x))[:, 0],
    "a class token's row of a layer": lambda net, x: net.layer(with_token(net, x))[:, 0],
    "the first frame's row": lambda net, x: attend(x)[:, 0],
    "the third frame's row of a layer": lambda net, x: net.layer(x)[:, 2],
    "the last frame's row": lambda net, x: attend(x)[:, -1],
    "the first frame behind a gate": lambda net, x: (x * x.mean(1, keepdim=True).sigmoid())[:, 0],
    "the third frame less the mean": lambda net, x: (x - x.mean(1, keepdim=True))[:, 2],
    "the first state less the last": lambda net, x: (net.gru(x)[0] - net.gru(x)[1][-1].unsqueeze(1))[:, 0],
    "the last two frames": lambda net, x: net.layer(x)[:, -2:].flatten(1),
    "the last three frames of a sequence": lambda net, x: net.gru(x)[0][:, -3:].mean(1),
    "a recurrence over the last three frames": lambda net, x: net.gru(x[:, -3:])[1][0],
    "the last hidden value asks": lstm_attention,
    "the last of a loop asks": loop_attention,
    "the last hidden value asks, in one operator": queried,
    "the last frame asks, a slice": lambda net, x: F.scaled_dot_product_attention(x[:, -1:], x, x)[:, 0],
    "the last frame is joined to all": lambda net, x: bahdanau(net, x, x[:, -1]),
    "the mean is joined to all": lambda net, x: bahdanau(net, x, x.mean(1)),
    "the last hidden value is joined to all": lambda net, x: bahdanau(net, *(lambda y, h: (y, h[-1]))(*net.gru(x))),
    "the last hidden value, repeated first": repeated_first,
    "frames unevenly spaced": lambda net, x: net.uneven(x[:, (0, 1, 3, 5)].flatten(1)),
    "frames in another order": lambda net, x: net.uneven(x[:, [5, 4, 1, 0]].flatten(1)),
    "tokens put back, and pooled": lambda net, x: F.adaptive_avg_pool3d(
        net.layer(x).reshape(-1, T, 1, 1, 4).permute(0, 4, 1, 2, 3), 1
    ).flatten(1),
    "a parameter asks": lambda net, x: net.heads(net.token.expand(x.shape[0], -1, -1), x, x, need_weights=False)[0],
    "the mean asks": lambda net, x: F.scaled_dot_product_attention(x.mean(1, keepdim=True), x, x)[:, 0],
    "sorted": lambda net, x: x.sort(1, descending=True)[0][:, :2].mean(1),
    "sorted upwards, all": lambda net, x: x.sort(1)[0].flatten(1),
    "the median": lambda net, x: x.median(1)[0],
    "a background": lambda net, x: (x - x.median(1, keepdim=True)[0]).abs().mean(1),
    "points of merged axes": lambda net, x: net.point(x.transpose(1, 2).reshape(-1, 2, 2, T).flatten(1, 2)).mean(2),
    "points of tokens": lambda net, x: net.point(x.unsqueeze(1).repeat(1, 2, 1, 1).permute(0, 3, 2, 1).flatten(2)).amax(
        2
    ),
    "frames on channels of points": lambda net, x: net.flat(x.reshape(-1, 4 * T, 1, 1)).flatten(1),
    "rank pooling": lambda net, x: (
        x * torch.tensor([2.0 * i - x.shape[1] for i in range(x.shape[1])], dtype=x.dtype).view(1, -1, 1)
    ).sum(1),
    "brought to a fixed rate": lambda net, x: F.interpolate(x.transpose(1, 2)[..., ::2], T),
    "distances to prototypes": lambda net, x: torch.cdist(x, net.cell.weight_ih[:5]).amin(1),
}


def made(function: Callable[[Features, Tensor], Any]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Features(function).double().eval(), torch.rand(1, T, 4, dtype=torch.float64)


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("preset", ["exact", "causal", "d3d"])
def test_the_clips_answer(name: str, preset: str) -> None:
    network, clip = made(EXACT[name])
    stream = dissect.convert(network, clip, preset=preset, time_dim=1)
    dissect.verify(stream, network, runtime=preset == "exact").check()
    if preset == "exact":
        assert stream.plan.exact, str(stream.plan)


def test_shares_of_the_positions_that_there_are() -> None:
    """Attentive pooling behind a convolution without padding: two positions fewer than frames."""

    def pooled(net: Features, x: Tensor) -> Tensor:
        y = net.valid(x.transpose(1, 2))
        return (y * y.softmax(2)).sum(2)

    network, clip = made(pooled)
    for preset in ("exact", "causal", "d3d"):
        dissect.verify(dissect.convert(network, clip, preset=preset, time_dim=1), network, runtime=False).check()


def test_what_is_nothing_of_a_still_scene_is_compared_on_the_scale_of_a_moving_one() -> None:
    network, clip = made(lambda net, x: net.valid(x.transpose(1, 2)).std(2))
    for seed in range(4):
        dissect.verify(dissect.convert(network, clip, time_dim=1), network, runtime=False, seed=seed).check()


def test_pairs_put_back_into_frames_are_refused_in_every_preset() -> None:
    """Two frames a step would come out of it."""

    def grouped(net: Features, x: Tensor) -> Tensor:
        pairs = x.reshape(-1, T // 2, 2 * 4).flip(2)
        return x + pairs.reshape(-1, T, 4)

    network, clip = made(grouped)
    for preset in ("exact", "causal", "d3d"):
        with pytest.raises(dissect.NotStreamable):
            dissect.convert(network, clip, preset=preset, time_dim=1)


def test_a_decoder_that_begins_with_the_last_hidden_values_is_refused() -> None:
    network, clip = made(lambda net, x: net.lstm(torch.zeros_like(x), net.lstm(x)[1])[0])
    with pytest.raises(dissect.NotStreamable, match="decoder"):
        dissect.convert(network, clip, preset="exact", time_dim=1)

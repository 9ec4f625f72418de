"""Attention inside a frame and across time, against the network itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from laws import law, offline
from torch import Tensor, nn
from torch.nn import functional as F

import dissect


def sdpa(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, **options)


def heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n, t, c = q.shape
    split = [x.reshape(n, t, 2, c // 2).transpose(1, 2) for x in (q, k, v)]
    return sdpa(*split).transpose(1, 2).reshape(n, t, c)


def scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(1, 2) * 0.4


def joined(q: Tensor, k: Tensor) -> Tensor:
    """Each query repeated beside each key, and a convolution of points over the pairs (non-local blocks)."""
    q, k = q.transpose(1, 2).unsqueeze(3), k.transpose(1, 2).unsqueeze(2)
    pairs = torch.cat([q.repeat(1, 1, 1, k.shape[3]), k.repeat(1, 1, q.shape[2], 1)], 1)
    weight = torch.linspace(-1, 1, pairs.shape[1]).to(q).reshape(1, -1, 1, 1)
    return F.conv2d(pairs, weight).relu().squeeze(1)


def early(t: int) -> Tensor:
    return torch.ones(t, t, dtype=torch.bool).tril()


#: queries, keys and values of frames, ``(N, T, C)``
ACROSS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "softmax": lambda q, k, v: scores(q, k).softmax(-1) @ v,
    "bmm": lambda q, k, v: torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(2), v),
    "keys first": lambda q, k, v: (k @ q.transpose(1, 2)).softmax(1).transpose(1, 2) @ v,
    "values first": lambda q, k, v: (v.transpose(1, 2) @ scores(q, k).softmax(-1).transpose(1, 2)).transpose(1, 2),
    "divided by the number of keys": lambda q, k, v: scores(q, k) / k.shape[1] @ v,
    "not scaled at all": lambda q, k, v: scores(q, k) @ v,
    "sdpa": sdpa,
    "heads": heads,
    "bias": lambda q, k, v: (
        (scores(q, k) + torch.linspace(-1, 1, 36).reshape(6, 6).to(q)[: q.shape[1], : q.shape[1]]).softmax(-1) @ v
    ),
    "baddbmm": lambda q, k, v: (
        torch.baddbmm(
            torch.ones(1, 1, 1).to(q).expand(len(q), q.shape[1], q.shape[1]), q, k.transpose(1, 2), alpha=0.4
        ).softmax(-1)
        @ v
    ),
    "added": lambda q, k, v: (q.unsqueeze(2) + k.unsqueeze(1)).tanh().sum(3).softmax(-1) @ v,
    "distances": lambda q, k, v: (-(q.unsqueeze(2) - k.unsqueeze(1)).pow(2).sum(3)).softmax(-1) @ v,
    "distances, keys first": lambda q, k, v: (
        (-(k.unsqueeze(2) - q.unsqueeze(1)).abs().sum(3)).softmax(1).transpose(1, 2) @ v
    ),
    "joined": lambda q, k, v: joined(q, k) / k.shape[1] @ v,
    "linear": lambda q, k, v: q.softmax(-1) @ (k.softmax(1).transpose(1, 2) @ v),
}

#: the same, with no look at the future
CAUSAL: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "is_causal": lambda q, k, v: sdpa(q, k, v, is_causal=True),
    "mask": lambda q, k, v: sdpa(q, k, v, attn_mask=early(q.shape[1])),
    "band": lambda q, k, v: sdpa(q, k, v, attn_mask=early(q.shape[1]).triu(-2)),
    "added": lambda q, k, v: (scores(q, k) + torch.full((q.shape[1],) * 2, float("-inf")).triu(1)).softmax(-1) @ v,
    "filled": lambda q, k, v: scores(q, k).masked_fill(~early(q.shape[1]), -1e9).softmax(-1) @ v,
    "filled, with heads": lambda q, k, v: (
        scores(q, k).unsqueeze(1).masked_fill(early(q.shape[1])[None, None] == 0, -1e9).softmax(-1).squeeze(1) @ v
    ),
    "where": lambda q, k, v: (
        torch.where(early(q.shape[1]), scores(q, k), torch.tensor(float("-inf")).to(q)).softmax(-1) @ v
    ),
    "bias and mask": lambda q, k, v: (
        (scores(q, k) + torch.linspace(-1, 1, 36).reshape(6, 6).to(q)[: q.shape[1], : q.shape[1]])
        .masked_fill(~early(q.shape[1]), float("-inf"))
        .softmax(-1)
        @ v
    ),
}

ENDS: dict[str, Callable[[Tensor], Tensor]] = {
    "last": lambda y: y[:, -1],
    "mean": lambda y: y.mean(1),
    "max": lambda y: y.max(1)[0],
    "frames": lambda y: y,
}


class Attention(nn.Module):
    def __init__(
        self, attend: Callable[[Tensor, Tensor, Tensor], Tensor], end: Callable[[Tensor], Tensor], stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, (stride, 1, 1), 1)
        self.qkv = nn.Linear(4, 12)
        self.fc = nn.Linear(4, 3)
        self.attend, self.end = attend, end

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).relu().mean((3, 4)).transpose(1, 2)
        return self.fc(self.end(self.attend(*self.qkv(y).chunk(3, -1))))


def check(network: nn.Module, exact: bool, frames: int = 6, lengths: tuple[int, ...] = (6, 5, 3)) -> dissect.Stream:
    network = network.double().eval()
    clip = torch.randn(2, 2, frames, 3, 2, dtype=torch.float64)
    for preset in ("causal", "d3d"):
        dissect.verify(dissect.convert(network, clip, preset=preset), network, runtime=False).check()
    stream = dissect.convert(network, clip, preset="exact")
    law(stream, clip, chunks=(2, 4))
    assert stream.plan.exact is exact
    if exact:
        assert offline(stream, network, clip, lengths) == len(lengths)
    return stream


@pytest.mark.parametrize("name", ACROSS)
def test_the_newest_frame_is_exact(name: str) -> None:
    torch.manual_seed(0)
    check(Attention(ACROSS[name], ENDS["last"]), exact=True)


@pytest.mark.parametrize("end", ["mean", "max"])
@pytest.mark.parametrize("name", ["softmax", "heads", "divided by the number of keys", "linear", "bias"])
def test_a_summary_of_the_window_is_exact(name: str, end: str) -> None:
    torch.manual_seed(0)
    check(Attention(ACROSS[name], ENDS[end]), exact=True)


@pytest.mark.parametrize("name", ["softmax", "heads", "linear"])
def test_frames_that_saw_the_future_are_approximate(name: str) -> None:
    torch.manual_seed(0)
    stream = check(Attention(ACROSS[name], ENDS["frames"]), exact=False)
    (row,) = stream.plan.approximate
    assert "window of the past" in row.reason
    assert row.future


def test_the_last_of_all_frames_is_the_clips_own() -> None:
    torch.manual_seed(0)
    network = Attention(heads, ENDS["frames"]).double().eval()
    clip = torch.randn(2, 2, 6, 3, 2, dtype=torch.float64)
    stream = dissect.convert(network, clip, preset="exact")
    torch.testing.assert_close(stream.offline(clip)[:, -1], network(clip)[:, -1])


@pytest.mark.parametrize("end", ["frames", "mean"])
@pytest.mark.parametrize("name", CAUSAL)
def test_a_causal_mask_makes_every_frame_exact(name: str, end: str) -> None:
    torch.manual_seed(0)
    check(Attention(CAUSAL[name], ENDS[end]), exact=True)


@pytest.mark.parametrize("name", ["softmax", "sdpa", "linear"])
def test_positions_of_a_strided_network(name: str) -> None:
    torch.manual_seed(0)
    check(Attention(ACROSS[name], ENDS["last"], stride=2), exact=True, frames=9, lengths=(9, 7, 5))


@pytest.mark.parametrize("name", ["softmax", "heads", "filled"])
def test_a_step_is_an_onnx_model(name: str) -> None:
    torch.manual_seed(0)
    network = Attention({**ACROSS, **CAUSAL}[name], ENDS["mean"]).eval()
    dissect.verify(dissect.convert(network, torch.randn(1, 2, 6, 3, 2), preset="exact"), network).check()


def test_only_keys_and_values_are_kept() -> None:
    """The newest frame asks; of the others their keys and values are there, and nothing is computed again."""
    torch.manual_seed(0)
    stream = dissect.convert(
        Attention(ACROSS["softmax"], ENDS["last"]).eval(), torch.randn(1, 2, 6, 3, 2), preset="causal"
    )
    shapes = [tuple(cache.spec.shape) for cache in stream.cache_list if cache.spec.role == "cache"]
    assert shapes.count((5 * 4,)) == 2
    assert len(shapes) == 3  # and the convolution's


class Encoder(nn.Module):
    """torch's own transformer over frame features, with or without positions."""

    def __init__(self, levels: int, positions: bool, first: bool, end: str) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=first)
        self.conv = nn.Conv3d(2, 4, 3, padding=1)
        self.encoder = nn.TransformerEncoder(layer, levels, enable_nested_tensor=False)
        self.positions = nn.Parameter(torch.randn(1, 6, 4)) if positions else None
        self.end = ENDS[end]

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).mean((3, 4)).transpose(1, 2)
        if self.positions is not None:
            y = y + self.positions[:, : y.shape[1]]
        return self.end(self.encoder(y))


@pytest.mark.parametrize("end", ["last", "mean"])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize(("levels", "first"), [(1, False), (2, True)])
def test_a_transformer_over_frames(levels: int, first: bool, positions: bool, end: str) -> None:
    torch.manual_seed(0)
    check(Encoder(levels, positions, first, end), exact=True)


class Tokens(nn.Module):
    """Attention among the tokens of each frame; time is in the batch, or beside it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, (3, 1, 1), padding=(1, 0, 0))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        n, c, t, h, w = x.shape
        tokens = x.permute(0, 2, 3, 4, 1)
        if self.how == "merged":
            y, _ = self.attention(*[tokens.reshape(n * t, h * w, c)] * 3, need_weights=False)
        elif self.how == "weights":
            y, _ = self.attention(*[tokens.reshape(n * t, h * w, c)] * 3)
        elif self.how == "beside":
            y = tokens.reshape(n, t, h * w, c)
            y = (y @ y.transpose(2, 3)).softmax(-1) @ y
        elif self.how == "masked":
            y = tokens.reshape(n, t, h * w, c)
            y = sdpa(y, y, y, attn_mask=early(h * w))
        else:
            y = tokens.flatten(2, 3)
            y = y @ (y.transpose(2, 3) @ y) @ torch.ones(c, c).to(y)
        return y.reshape(n, t, h, w, c)


@pytest.mark.parametrize("how", ["merged", "weights", "beside", "masked", "gram"])
def test_inside_a_frame(how: str) -> None:
    torch.manual_seed(0)
    check(Tokens(how), exact=True)


@pytest.mark.parametrize("how", ["merged", "masked"])
def test_inside_a_frame_goes_to_onnx(how: str) -> None:
    torch.manual_seed(0)
    network = Tokens(how).eval()
    dissect.verify(dissect.convert(network, torch.randn(1, 2, 6, 3, 2)), network).check()


class EveryPixel(nn.Module):
    """Attention over time at each pixel: the pixels are in the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        n, c, t, h, w = x.shape
        y = x.permute(0, 3, 4, 2, 1).reshape(n * h * w, t, c)
        y, _ = self.attention(y, y, y)
        return y.reshape(n, h, w, t, c)[:, :, :, -1]


def test_attention_over_time_at_every_pixel() -> None:
    torch.manual_seed(0)
    check(EveryPixel(), exact=True)


class NonLocal(nn.Module):
    """The non-local block: every position of space and time looks at all."""

    def __init__(self, mode: str, pooled: bool, end: str) -> None:
        super().__init__()
        self.stem = nn.Conv3d(2, 4, 3, padding=1)
        self.theta, self.phi, self.g = (nn.Conv3d(4, 2, 1) for _ in range(3))
        self.w = nn.Sequential(nn.Conv3d(2, 4, 1), nn.BatchNorm3d(4))
        self.pool = nn.MaxPool3d((1, 2, 2)) if pooled else nn.Identity()
        self.mode, self.end = mode, end

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        n = x.shape[0]
        theta = self.theta(x).view(n, 2, -1).permute(0, 2, 1)
        phi = self.pool(self.phi(x)).view(n, 2, -1)
        g = self.pool(self.g(x)).view(n, 2, -1).permute(0, 2, 1)
        f = torch.matmul(theta, phi)
        f = f.softmax(-1) if self.mode == "softmax" else f / f.size(-1)
        y = torch.matmul(f, g).permute(0, 2, 1).contiguous().view(n, 2, *x.shape[2:])
        z = self.w(y) + x
        return z[:, :, -1] if self.end == "last" else z.mean((2, 3, 4)) if self.end == "mean" else z


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("mode", ["softmax", "dot"])
@pytest.mark.parametrize("end", ["last", "mean", "map"])
def test_non_local_blocks(mode: str, pooled: bool, end: str) -> None:
    torch.manual_seed(0)
    stream = check(NonLocal(mode, pooled, end), exact=end == "last")
    if end != "last":
        assert [row.op for row in stream.plan.approximate] == ["aten.matmul"]


class Weighted(nn.Module):
    """A softmax over time, and what is made of the weights."""

    def __init__(self, use: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.conv = nn.Conv3d(2, 4, 3, padding=1)
        self.score = nn.Linear(4, 1)
        self.use = use

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x).relu().mean((3, 4)).transpose(1, 2)
        return self.use(torch.softmax(torch.tanh(self.score(y)), 1), y)


USES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "sum": lambda w, y: (w * y).sum(1),
    "bmm": lambda w, y: torch.bmm(w.transpose(1, 2), y).squeeze(1),
    "matmul": lambda w, y: (y.transpose(1, 2) @ w).squeeze(2),
    "einsum": lambda w, y: torch.einsum("ntk,ntc->nkc", w, y),
    "mean": lambda w, y: (w * y).mean(1),
    "max": lambda w, y: (w * y).amax(1),
    "expanded": lambda w, y: (w.expand(-1, -1, y.shape[2]) * y).sum(1, keepdim=True),
    "the weights, too": lambda w, y: ((w * y).sum(1), w),
    "variance": lambda w, y: (w * (y - (w * y).sum(1, keepdim=True)).square()).sum(1),
    "beside": lambda w, y: torch.cat([w, y], 2).mean(1),
    "tokens of space and time": lambda w, y: y.flatten(1).softmax(1).sum(1),
    "log": lambda w, y: (F.log_softmax(y, 1) * w).sum(1),
}


@pytest.mark.parametrize("name", USES)
def test_temporal_attention_is_exact_where_time_ends(name: str) -> None:
    torch.manual_seed(0)
    check(Weighted(USES[name]), exact=True)


@pytest.mark.parametrize(
    "use",
    [
        lambda w, y: w * y,
        lambda w, y: y + (w * y).sum(1, keepdim=True),
        lambda w, y: (w * y).transpose(1, 2).unsqueeze(-1)[:, :, 1:],
    ],
    ids=["weighted frames", "broadcast back", "cropped"],
)
def test_temporal_attention_goes_back_to_frames_as_an_approximation(use: Callable[[Tensor, Tensor], Any]) -> None:
    torch.manual_seed(0)
    stream = check(Weighted(use), exact=False)
    assert all(row.future for row in stream.plan.approximate)


class Asked(nn.Module):
    """Learned questions to all frames, by torch's own module."""

    def __init__(self) -> None:
        super().__init__()
        self.questions = nn.Parameter(torch.randn(1, 3, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attention(self.questions.expand(len(x), -1, -1), x, x)[0]
        return out


def test_learned_questions_are_asked_by_every_row_and_head() -> None:
    torch.manual_seed(0)
    network, x = Asked().double().eval(), torch.randn(1, 9, 8, dtype=torch.float64)
    for preset in ("exact", "d3d", "causal"):
        stream = dissect.convert(network, x, preset, time_dim=1)
        dissect.verify(stream, network, runtime=preset == "exact").check()
        assert preset != "exact" or stream.plan.exact
